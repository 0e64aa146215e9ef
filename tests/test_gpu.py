"""What only a CUDA device can show: equality with the CPU, determinism with atomics about, bf16."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import make_logits, relative_error

from .gpu_cases import ROUTED_BY

pytestmark = pytest.mark.gpu

ROUTERS = {
    "expert choice": lambda logits: mk.expert_choice(logits, num_groups=4),
    "expert choice per token": lambda logits: mk.expert_choice(
        logits, num_groups=4, normalize="per_token"
    ),
    "token choice": lambda logits: mk.token_choice(logits, 2, normalize="per_token"),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("routed_by", ROUTED_BY)
def test_routing_equals_the_cpu(name, kind, routed_by):
    logits = make_logits(256, 8, kind)
    on_cpu = ROUTERS[name](logits)
    with mk.use_backend(routed_by):
        on_gpu = ROUTERS[name](logits.cuda()).validate()
    if kind == "normal":  # among ties, the last bit of the device's exp may decide
        assert torch.equal(on_gpu.token_indices.cpu(), on_cpu.token_indices)
        assert relative_error(on_gpu.routing_weights.cpu(), on_cpu.routing_weights) < 2e-6


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routed_by", ROUTED_BY)
def test_two_runs_are_equal_bit_for_bit(name, dtype, routed_by):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    logits = random(4096, 8).requires_grad_()
    x = random(4096, 64).to(dtype).requires_grad_()
    w_in = random(8, 256, 64).mul(0.1).to(dtype).requires_grad_()
    w_out = random(8, 64, 128).mul(0.1).to(dtype).requires_grad_()
    upstream = random(4096, 64).to(dtype)
    runs = []
    for _ in range(2):
        with mk.use_backend(routed_by):
            plan = ROUTERS[name](logits)
            out = mk.expert_mlp(x, plan, w_in, w_out, activation="swiglu")
            loss = (out * upstream).sum() + mk.load_balance_loss(plan) + mk.router_z_loss(plan)
        runs.append((out, *torch.autograd.grad(loss, [logits, x, w_in, w_out])))
    for a, b in zip(*runs, strict=True):
        assert bool(torch.isfinite(a).all())
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["digits", "digits-token-choice", "digits-ddpm"])
def test_a_run_trains_and_goes_on_in_bf16(tmp_path, recipe):
    for extra in ("omegaconf", "sklearn", "diffusers"):  # of the trainer, not of the kernels
        pytest.importorskip(extra)
    from dit_models.trainer import Trainer

    from .dit_models.training import tiny_config

    config = tiny_config(tmp_path, "device=cuda", recipe=recipe)
    first = Trainer(config, tmp_path)
    for _ in range(2):
        first.train_step()
    first.save()
    expected = first.train_step()["loss"]
    second = Trainer(config, tmp_path)
    assert second.resume()
    assert float(second.train_step()["loss"]) == pytest.approx(float(expected), rel=1e-3)
