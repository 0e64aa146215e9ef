"""Expert Race: the best pairs, the learnt threshold, the layer heads and their loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.backbone import DiT
from dit_models.embeddings import patchify
from dit_models.router_losses import layer_head_losses
from dit_models.routing.layers import update_routers

from .models import context_of, inputs_for, moved, router_of, tiny


def _trained(inference: str = "threshold") -> DiT:
    model = moved(tiny("expert_race", routing_options={"inference": inference}))
    update_routers(model, [model(**inputs_for(model.config, seed=9)).observed])
    return model.eval()


def _pairs(plan: mk.RoutingPlan) -> set[tuple[int, int]]:
    return set(zip(plan.token_indices.tolist(), plan.expert_of_row.tolist(), strict=True))


@pytest.mark.parametrize("factor", [0.01, 0.5, 2.0, 4.0])
def test_training_takes_exactly_the_best_pairs_of_the_batch(factor: float) -> None:
    router = router_of(moved(tiny("expert_race", capacity_factor=factor)))
    x = torch.randn(3, 16, 32)
    routing = router(x, context_of(x))
    plan = routing.plan.validate()
    assert plan.num_rows == max(1, round(3 * 16 * factor))
    logits = plan.router_logits
    best = logits.flatten().topk(plan.num_rows).indices.tolist()
    assert _pairs(plan) == {(pair // 4, pair % 4) for pair in best}
    rows = (plan.token_indices.long(), plan.expert_of_row.long())
    assert torch.equal(plan.routing_weights, logits[rows])
    assert torch.equal(routing.observed["threshold"], logits[rows].min())


@pytest.mark.parametrize("affinity", ["identity", "softmax", "sigmoid"])
def test_threshold_inference_takes_every_pair_that_reaches_it(affinity: str) -> None:
    router = router_of(moved(tiny("expert_race", affinity=affinity)))
    x = torch.randn(3, 16, 32)
    routing = router(x, context_of(x))
    router.update(routing.observed)
    router.eval()
    # the threshold of one batch selects that batch's pairs, the smallest included
    assert _pairs(router(x, context_of(x)).plan) == _pairs(routing.plan)
    other = torch.randn(3, 16, 32)
    plan = router(other, context_of(other)).plan.validate()
    scores = {"identity": plan.router_logits, "softmax": plan.router_logits.softmax(1)}
    table = scores.get(affinity, plan.router_logits.sigmoid())
    won = (table >= router.threshold.value).nonzero().tolist()
    assert _pairs(plan) == {tuple(pair) for pair in won}


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


def test_layer_heads_predict_the_target_in_training_alone() -> None:
    model = moved(tiny("expert_race", depth=4))
    inputs = inputs_for(model.config)
    seen: list[Tensor] = []
    router_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model(**inputs)
    assert len(output.layer_predictions) == 2
    head = router_of(model).layer_head
    expected = seen[0] @ head.weight.T + head.bias
    torch.testing.assert_close(output.layer_predictions[1], expected)
    assert model.eval()(**inputs).layer_predictions == ()
    headless = moved(tiny("expert_race", routing_options={"layer_head": False}))
    assert headless(**inputs).layer_predictions == ()
    assert not [name for name, _ in headless.named_parameters() if "layer_head" in name]


@pytest.mark.parametrize("kept", [None, 40])
def test_the_layer_head_loss_is_the_error_of_the_patches_that_count(kept: int | None) -> None:
    config = tiny("expert_race", depth=4, mask_decoder_depth=2 if kept else 0)
    model = moved(config)
    inputs: dict[str, Any] = inputs_for(config)
    kept_tokens = None
    if kept is not None:
        order = torch.rand(3, config.seq_len).argsort(1)
        kept_tokens = inputs["kept_tokens"] = order[:, :kept].sort(1).values
    output = model(**inputs)
    target = torch.randn_like(inputs["latents"])
    losses = layer_head_losses(output, target, config.patch_size, kept_tokens)
    sizes = [prediction.shape[1] for prediction in output.layer_predictions]
    assert sizes == ([64, 64] if kept is None else [kept, 64])
    patches = patchify(target, config.patch_size)
    for loss, prediction in zip(losses, output.layer_predictions, strict=True):
        total, count = 0.0, 0
        for image in range(3):
            places = range(64) if kept_tokens is None else kept_tokens[image].tolist()
            for row, place in enumerate(places):
                mine = prediction[image, place if prediction.shape[1] == 64 else row]
                total += float((mine - patches[image, place]).detach().square().sum())
                count += mine.numel()
        assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_gradients_of_weights_and_predictions() -> None:
    config = tiny("expert_race", hidden_size=4, num_heads=1)
    router = router_of(moved(config)).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router(x, context_of(x))
        return routing.plan.routing_weights, routing.prediction

    assert torch.autograd.gradcheck(outputs, (x,))
