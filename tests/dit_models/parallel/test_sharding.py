"""A model divided among four processes computes what one process does, to rounding of fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dit_models.assemble import build_conditioned_model
from dit_models.conditioned import ConditionedModel
from dit_models.config import ParallelConfig
from dit_models.data import DatasetInfo
from dit_models.parallel.ema import ShardedEMA
from dit_models.parallel.gradients import clip_grad_norm_
from dit_models.parallel.shard import Sharding
from dit_models.parallel.world import World, check_division, join_world

from ...ranks import run_ranks
from ..training import tiny_config

INFO = DatasetInfo("digits", 16, 1, 10, False)
IMAGES = 8
# Every division of four processes: (experts, copies).
MESHES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]


def _perturb(module: nn.Module) -> None:
    """A new model predicts 0, whatever is in it; every parameter is to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def _build(model: str, overrides: tuple[str, ...], sharding: Sharding | None) -> ConditionedModel:
    torch.manual_seed(0)
    config = tiny_config("unused", f"model={model}", *overrides)  # type: ignore[arg-type]

    def on_block(block: nn.Module) -> None:
        _perturb(block)
        if sharding is not None:
            sharding.shard_block(block)

    built = build_conditioned_model(config, INFO, "cpu", on_block)
    blocks = {id(p) for block in built.backbone.blocks for p in block.parameters()}
    with torch.no_grad():
        for parameter in built.parameters():
            if id(parameter) not in blocks:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if sharding is not None:
        sharding.shard_rest(built)
    return built


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(IMAGES, 1, 16, 16, generator=generator, dtype=torch.float64)
    upstream = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    timesteps = torch.rand(IMAGES, generator=generator, dtype=torch.float64)
    return images, upstream, timesteps, torch.arange(IMAGES) % 10


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _compare(
    model: str,
    overrides: tuple[str, ...],
    accumulate: int,
    meshes: Any,
    checkpointing: bool = False,
) -> Any:
    """Relative errors, and shares of each parameter that this process holds, by mesh."""
    torch.set_default_dtype(torch.float64)
    images, upstream, timesteps, labels = _inputs()
    single = _build(model, overrides, None)
    expected = single(images, timesteps, labels=labels).sample
    expected.backward(upstream)
    results = {}
    for experts, copies in meshes:
        with join_world(ParallelConfig(expert=experts, replicate=copies), "cpu") as world:
            sharding = Sharding(world, checkpointing=checkpointing)
            sharded = _build(model, overrides, sharding)
            own = torch.arange(IMAGES)[world.part_of(IMAGES)]
            errors = {}
            for some in own.chunk(accumulate):
                ours = sharded(images[some], timesteps[some], labels=labels[some]).sample
                ours.backward(upstream[some])
                errors[f"output {some[0]}"] = _error(ours, expected[some])
            results[experts, copies] = (errors | _gradient_errors(sharded, single, world),
                                        _shares(sharded, single))  # fmt: skip
    return results


def _gradient_errors(sharded: nn.Module, single: nn.Module, world: World) -> dict[str, float]:
    gradients = {name: parameter.grad for name, parameter in single.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    norm = torch.nn.utils.get_total_norm(gradients.values())
    clipped = norm / 2 / (norm + 1e-6)
    errors = {"norm": _error(clip_grad_norm_(sharded.parameters(), float(norm) / 2, world), norm)}
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.grad is not None, name
        # Keys share a bias without effect: its gradient is rounding alone.
        least = 1e-3 * norm
        errors[name] = _error(_whole(parameter.grad), gradients[name] * clipped, least)
    return errors


def _shares(sharded: nn.Module, single: nn.Module) -> dict[str, float]:
    whole = {name: parameter.numel() for name, parameter in single.named_parameters()}
    return {n: p.to_local().numel() / whole[n] for n, p in sharded.named_parameters()}


def _error(ours: Any, theirs: Any, least: Any = 0.0) -> float:
    difference, size = (ours - theirs).detach().norm(), theirs.detach().norm()
    return float(difference / size.clamp_min(float(least)))


def _wrong(errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error < 1e-11}


@pytest.mark.parametrize("model", ["EC-DiT-tiny", "DiT-MoE-tiny"])
def test_gradients_and_their_norm_are_those_of_one_process(model: str) -> None:
    for outcome in run_ranks(_compare, 4, model, (), 1, MESHES):
        assert list(outcome) == MESHES
        for (_, copies), (errors, shares) in outcome.items():
            assert not _wrong(errors)
            # Experts too are divided among all processes that share a copy.
            held = {share for name, share in shares.items() if name.endswith("experts.down_proj")}
            assert held == {copies / 4}


@pytest.mark.parametrize("model", ["EC-DiT-tiny", "DiT-MoE-tiny"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "accumulation"])
def test_checkpointing_and_accumulation_change_nothing(model: str, checkpointing: bool) -> None:
    accumulate = 1 if checkpointing else 2
    for outcome in run_ranks(_compare, 4, model, (), accumulate, [(2, 1)], checkpointing):
        errors, _ = outcome[2, 1]
        assert not _wrong(errors)


# Fewer experts of a process than parts, and a number that does not come out even.
@pytest.mark.parametrize("num_experts", [2, 6])
def test_experts_are_cut_where_they_do_not_come_out_even(num_experts: int) -> None:
    options = (f"model_options.num_experts={num_experts}",)
    for outcome in run_ranks(_compare, 4, "DiT-MoE-tiny", options, 1, [(1, 1), (2, 1)]):
        for errors, shares in outcome.values():
            assert not _wrong(errors)
            held = {share for name, share in shares.items() if ".experts." in name}
            assert held == {1 / 4}


def _exchange_twice() -> Any:
    """What is drawn from the averages in the middle of a training, and what it leaves behind."""
    with join_world(ParallelConfig(expert=2), "cpu") as world:
        model = _build("EC-DiT-tiny", (), Sharding(world))
        ema = ShardedEMA(model, 0.9)
        images, _, timesteps, labels = (value.float() if value.is_floating_point() else value
                                        for value in _inputs())  # fmt: skip
        with torch.no_grad():
            first = model(images, timesteps, labels=labels).sample
            for parameter in model.parameters():
                parameter.mul_(1.5)
            ema.update(model, 1)
            for module in (model.backbone, *model.backbone.modules()):
                if hasattr(module, "reshard"):
                    module.reshard()
            trained = model(images, timesteps, labels=labels).sample
            with ema.drawing_model() as averaged:
                assert not averaged.training
                drawn = averaged(images, timesteps, labels=labels).sample
            after = model(images, timesteps, labels=labels).sample
        assert model.training
        name = "backbone.final_layer.linear.weight"
        parameter = dict(model.named_parameters())[name]
        return (
            not torch.equal(first, trained),
            not torch.equal(drawn, trained),
            torch.equal(after, trained),
            # d = min(0.9, 2 / 11) after the first step
            _error(_whole(ema.tensors[name]), _whole(parameter) * (2 / 11 / 1.5 + 9 / 11)) < 1e-6,
        )


def test_averages_take_the_place_of_the_weights_only_to_draw() -> None:
    assert run_ranks(_exchange_twice, 4) == [(True,) * 4] * 4


def test_processes_that_do_not_divide_are_refused() -> None:
    for config, size, words in (
        (ParallelConfig(data=4), 2, "parallel.data=4, and 2 processes started"),
        (ParallelConfig(data=2), 1, "parallel.data=2, and 1 process started"),
        (ParallelConfig(expert=3), 4, "does not divide the 4 processes"),
        (ParallelConfig(expert=2, replicate=4), 4, "does not divide the 4 processes"),
    ):
        with pytest.raises(ValueError, match=words):
            check_division(config, size)
