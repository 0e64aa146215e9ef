"""Loss-free balancing: the bias follows the load, and changes the selection alone."""

from typing import Any

import pytest
import torch

from dit_models.routing.layers import update_routers

from .models import context_of, inputs_for, moved, router_of, tiny


def _router(**changes: Any) -> Any:
    return router_of(moved(tiny("loss_free", **changes)))


def test_the_bias_moves_by_the_rate_towards_the_mean_load() -> None:
    router = _router(routing_options={"bias_update_rate": 0.25})
    router.update({"load": torch.tensor([8.0, 2.0, 4.0, 2.0])})  # mean 4
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    router.update({"load": torch.tensor([5.0, 5.0, 5.0, 1.0])})
    assert router.selection_bias.tolist() == [-0.5, 0.0, -0.25, 0.5]


def test_a_bias_changes_who_is_chosen_and_no_weight() -> None:
    router = _router(top_k=1, normalize="none")
    x = torch.randn(2, 16, 32)
    router.selection_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    plan = router(x, context_of(x)).plan
    assert plan.tokens_per_expert.tolist() == [32, 0, 0, 0]
    torch.testing.assert_close(plan.routing_weights, plan.router_logits.sigmoid()[:, 0])


def test_the_load_is_that_of_all_micro_batches() -> None:
    model = moved(tiny("loss_free"))
    inputs = inputs_for(model.config, batch_size=4)
    parts = [{n: v[i : i + 2] for n, v in inputs.items()} for i in (0, 2)]
    observed = [model(**part).observed for part in parts]
    for layer, block in enumerate(model.blocks):
        load = sum(seen[layer]["load"] for seen in observed)
        expected = 1e-3 * torch.sign(load.mean() - load)
        before = block.ffn.router.selection_bias.clone()
        if layer == 0:
            update_routers(model, observed)
        after = block.ffn.router.selection_bias
        assert torch.equal(after, before + expected if layer == 0 else expected)


def test_routers_learn_from_the_mean_over_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(tiny("loss_free"))
    got: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(router_of(model), "update", got.append)
    layers = len(model.config.moe_blocks)
    micro_batches = [[{"load": torch.tensor([v, 2.0, 0.0, 0.0])}] * layers for v in (1.0, 4.0)]
    update_routers(model, micro_batches)
    assert [each["load"].tolist() for each in got] == [[2.5, 2.0, 0.0, 0.0]]


def test_evaluation_leaves_the_bias_alone() -> None:
    model = moved(tiny("loss_free")).eval()
    output = model(**inputs_for(model.config))
    update_routers(model, [output.observed])
    assert all(not dict(each) for each in output.observed)
    assert router_of(model).selection_bias.abs().max() == 0


@pytest.mark.parametrize("experts", [4, 8])
def test_a_skewed_router_is_flattened(experts: int) -> None:
    router = _router(num_experts=experts, routing_options={"bias_update_rate": 0.005})
    mean = torch.randn(32)
    with torch.no_grad():  # every token prefers expert 0, then 1
        router.weight.copy_(0.05 * torch.randn(experts, 32))
        router.weight[:2] += torch.tensor([[1.0], [0.5]]) * mean / mean.square().sum()

    def load() -> torch.Tensor:
        torch.manual_seed(7)
        x = mean + torch.randn(16, 32, 32)
        return router(x, context_of(x)).plan.tokens_per_expert.float()

    before = load()
    assert before.max() > 1.8 * before.mean()
    for _ in range(300):
        x = mean + torch.randn(16, 32, 32)
        router.update(router(x, context_of(x)).observed)
    after = load()
    assert after.max() < 1.15 * after.mean()
    assert after.min() > 0.85 * after.mean()
