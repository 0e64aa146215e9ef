"""The decoupled router: what it reads, its capacity and its weights."""

import math

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.routing import RouterContext

from .models import inputs_for, moved, router_of, tiny


def test_logits_are_those_of_timestep_and_unmodulated_token() -> None:
    router = router_of(moved(tiny("decoupled"))).double()
    x, unmodulated = (torch.randn(3, 16, 32, dtype=torch.float64) for _ in range(2))
    timestep = torch.randn(3, 32, dtype=torch.float64)
    plan = router(x, RouterContext(unmodulated, timestep, torch.randn(3, 32))).plan
    joined = torch.cat([timestep[:, None].expand(-1, 16, -1), unmodulated], dim=2)
    expected = (joined @ router.weight.T).flatten(0, 1)
    torch.testing.assert_close(plan.router_logits, expected, rtol=1e-12, atol=1e-12)


def test_the_model_hands_over_what_modulation_has_not_touched() -> None:
    model = moved(tiny("decoupled"))
    seen: list[RouterContext] = []
    router_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    modulated: list[Tensor] = []
    router_of(model).register_forward_pre_hook(lambda _, args: modulated.append(args[0]))
    normed: list[Tensor] = []
    model.blocks[-1].norm2.register_forward_hook(lambda _, __, out: normed.append(out))
    inputs = inputs_for(model.config)
    model(**inputs)
    assert torch.equal(seen[0].unmodulated, normed[0])
    assert torch.equal(seen[0].timestep_embedding, model.t_embedder(inputs["timesteps"]))
    assert not torch.equal(seen[0].timestep_embedding, seen[0].conditioning)
    assert not torch.equal(modulated[0], normed[0])


@pytest.mark.parametrize(("factor", "seq_len"), [(2.0, 64), (1.3, 64), (0.05, 16)])
def test_the_capacity_is_rounded_up_and_the_weights_of_a_token_sum_to_the_scale(
    factor: float, seq_len: int
) -> None:
    router = router_of(moved(tiny("decoupled", capacity_factor=factor)))
    x = torch.randn(2, seq_len, 32)
    plan = router(x, RouterContext(x, x[:, 0], x[:, 0])).plan
    assert plan.capacity == max(1, math.ceil(factor * seq_len / 4))
    sums = mk.combine(torch.ones(plan.num_rows, 1), plan)[:, 0]
    expected = torch.where(plan.experts_per_token > 0, 2.5, 0.0)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


def test_gradients_of_the_weights() -> None:
    router = router_of(moved(tiny("decoupled", hidden_size=4, num_heads=1))).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    timestep = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)

    def weights(tokens: Tensor, timestep: Tensor) -> Tensor:
        return router(x, RouterContext(tokens, timestep, timestep)).plan.routing_weights

    # one sum over experts makes single weights of 2.5: a gradient needs tokens with two
    assert torch.autograd.gradcheck(weights, (tokens, timestep))


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = moved(tiny("decoupled")).double().eval()
    inputs = inputs_for(model.config)
    inputs["latents"] = inputs["latents"].double()
    whole = model(**inputs).sample
    alone = model(**{name: value[1:2] for name, value in inputs.items()}).sample
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-9, atol=1e-12)
