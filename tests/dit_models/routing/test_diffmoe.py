"""DiffMoE: the pool of the batch, the predictor and its thresholds, both inference modes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_models.backbone import DiT
from dit_models.routing.layers import update_routers
from dit_models.routing.threshold import RunningThreshold

from .models import context_of, inputs_for, moved, router_of, tiny


def _router(**options: Any) -> Any:
    return router_of(moved(tiny("diffmoe", routing_options=options)))


def _trained(inference: str) -> DiT:
    """A model whose thresholds have seen a batch."""
    model = moved(tiny("diffmoe", routing_options={"inference": inference}))
    update_routers(model, [model(**inputs_for(model.config, seed=9)).observed])
    return model.eval()


def test_training_takes_exactly_the_capacity_from_the_whole_batch() -> None:
    router = _router()
    x = torch.randn(3, 16, 32)
    plan = router(x, context_of(x)).plan
    assert (plan.num_groups, plan.capacity, plan.num_rows) == (1, 3 * 16 * 2 // 4, 3 * 16 * 2)
    image = plan.token_indices.view(4, 24) // 16
    assert len({tuple(torch.bincount(row, minlength=3).tolist()) for row in image}) > 1


def test_the_predictor_learns_from_the_chosen_mask_and_moves_nothing_else() -> None:
    router = _router().double()
    x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    routing = router(x, context_of(x))
    plan, tokens = routing.plan, x.detach().flatten(0, 1)
    first, second = router.capacity_predictor[0], router.capacity_predictor[2]
    scores = F.silu(tokens @ first.weight.T + first.bias) @ second.weight.T + second.bias
    chosen = torch.zeros_like(scores)
    chosen[plan.token_indices.long(), plan.expert_of_row.long()] = 1
    p = scores.sigmoid()
    expected = -(chosen * p.log() + (1 - chosen) * (1 - p).log()).mean()
    loss = routing.losses["capacity_predictor"]
    torch.testing.assert_close(loss, expected)
    smallest = scores.sort(dim=0, descending=True).values[plan.capacity - 1].sigmoid()
    torch.testing.assert_close(routing.observed["threshold"], smallest)
    assert not routing.observed["threshold"].requires_grad
    wanted = (x, router.weight, first.weight, second.bias)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert grads[0] is None
    assert grads[1] is None
    assert grads[2].abs().max() > 0
    assert grads[3].abs().max() > 0


def test_predictor_scores_stay_in_fp32_under_autocast() -> None:
    router = _router()
    x = torch.randn(2, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = router.scores(x)
    assert torch.equal(low, router.scores(x))


def test_thresholds_are_a_mean_at_first_and_a_running_mean_later() -> None:
    threshold = RunningThreshold((2,), 0.75)
    values = torch.rand(8, 2, dtype=torch.float64)
    for value in values[:4]:
        threshold.update(value)
    torch.testing.assert_close(threshold.value.double(), values[:4].mean(0), rtol=1e-6, atol=0)
    expected = values[:4].mean(0)
    for value in values[4:]:
        threshold.update(value)
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(threshold.value.double(), expected, rtol=1e-6, atol=0)
    assert threshold.updates.item() == 8


def test_evaluation_learns_nothing() -> None:
    model = moved(tiny("diffmoe")).eval()
    assert [dict(each) for each in model(**inputs_for(model.config)).observed] == [{}]


def test_a_batch_sized_predictor_finds_the_tokens_that_training_chooses() -> None:
    """On a toy the learnt thresholds select about the capacity, and mostly the same tokens."""
    torch.manual_seed(0)
    router = _router()
    mean = 0.5 * torch.randn(32)  # so that the classes are linear in the token
    optimizer = torch.optim.Adam(router.capacity_predictor.parameters(), lr=3e-3)
    for _ in range(250):
        x = mean + torch.randn(8, 16, 32)
        routing = router(x, context_of(x))
        optimizer.zero_grad()
        routing.losses["capacity_predictor"].backward()
        optimizer.step()
        router.update(routing.observed)
    x = mean + torch.randn(64, 16, 32)
    wanted = _chosen(router(x, context_of(x)).plan)
    router.eval()
    got = _chosen(router(x, context_of(x)).plan)
    share = got.float().mean(0)  # the capacity is half of the tokens
    assert (share - 0.5).abs().max() < 0.06
    assert (got == wanted).float().mean() > 0.9


def _chosen(plan: Any) -> Tensor:
    chosen = torch.zeros(plan.num_tokens, plan.num_experts, dtype=torch.bool)
    chosen[plan.token_indices.long(), plan.expert_of_row.long()] = True
    return chosen


def test_threshold_inference_takes_each_token_over_the_threshold() -> None:
    model = _trained("threshold")
    router = router_of(model)
    x = torch.randn(3, 16, 32)
    plan = router(x, context_of(x)).plan.validate()
    scores = router.scores(x).sigmoid()
    assert torch.equal(_chosen(plan), scores > router.threshold.value)
    expected = plan.router_logits.softmax(1)[plan.token_indices.long(), plan.expert_of_row.long()]
    torch.testing.assert_close(plan.routing_weights, expected)


def test_batch_topk_inference_takes_as_many_by_affinity() -> None:
    model = _trained("batch_topk")
    router = router_of(model)
    x = torch.randn(3, 16, 32)
    plan = router(x, context_of(x)).plan.validate()
    counts = (router.scores(x).sigmoid() > router.threshold.value).sum(0)
    assert plan.tokens_per_expert.tolist() == counts.tolist()
    affinity = plan.router_logits.softmax(1)
    chosen = _chosen(plan)
    for expert, count in enumerate(counts.tolist()):
        best = affinity[:, expert].topk(count).indices
        assert set(best.tolist()) == set(chosen[:, expert].nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("inference", "independent"), [("threshold", True), ("batch_topk", False)])
def test_only_threshold_inference_leaves_an_image_alone(inference: str, independent: bool) -> None:
    model = _trained(inference)
    inputs = inputs_for(model.config)
    with torch.inference_mode():
        whole = model(**inputs).sample
        alone = torch.cat(
            [model(**{n: v[i : i + 1] for n, v in inputs.items()}).sample for i in range(3)]
        )
    difference = float((whole - alone).abs().max())
    assert difference < 1e-5 if independent else difference > 1e-3


def test_no_token_over_any_threshold_is_an_output_of_the_rest_of_the_model() -> None:
    model = _trained("threshold")
    router_of(model).threshold.value.fill_(2.0)
    output = model(**inputs_for(model.config))
    assert output.plans[0].num_rows == 0
    assert output.sample.isfinite().all()


def test_gradients_of_weights_and_loss() -> None:
    router = router_of(moved(tiny("diffmoe", hidden_size=4, num_heads=1))).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> Tensor:
        return router(x, context_of(x)).plan.routing_weights

    assert torch.autograd.gradcheck(outputs, (x,))
    bias = router.capacity_predictor[0].bias

    def loss(bias: Tensor) -> Tensor:
        return torch.func.functional_call(
            router, {"capacity_predictor.0.bias": bias}, (x.detach(), context_of(x.detach()))
        ).losses["capacity_predictor"]

    assert torch.autograd.gradcheck(loss, (bias.detach().clone().requires_grad_(),))
