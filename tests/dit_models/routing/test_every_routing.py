"""What holds for every routing: it trains, resumes, samples, compiles, recomputes and counts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_kernels as mk
from dit_models import train
from dit_models.count import count_model
from dit_models.drawing import Prompts
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.routing import ROUTINGS
from dit_models.routing.__main__ import describe
from dit_models.run_folder import load_run
from dit_models.trainer import Trainer

from ..training import tiny_config
from .models import ROUTED, gradients, inputs_for, moved, router_of, tiny

RECIPES = ("digits-decoupled", "digits-diffmoe", "digits-expert-race", "digits-loss-free")
STAGES = "model_options.routing_options.capacity_by_stage=[[0.0,2.0],[0.5,1.0]]"
NOISE = "model_options.routing_options.capacity_by_noise=[[0.2,0.5],[0.8,1.0]]"


def _steps(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    values = [trainer.train_step() for _ in range(count)]
    return [{name: torch.as_tensor(v).tolist() for name, v in each.items()} for each in values]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        *((recipe, ()) for recipe in RECIPES),
        ("digits", (STAGES, NOISE)),
        ("digits-ddpm", (NOISE,)),
        ("digits-loss-free", ("accumulate=2", "gradient_checkpointing=true", "precision=bf16")),
    ],
)
def test_a_recipe_trains_resumes_exactly_and_samples(
    tmp_path: Path, recipe: str, overrides: tuple[str, ...]
) -> None:
    whole = Trainer(tiny_config(tmp_path / "a", *overrides, recipe=recipe), tmp_path / "a")
    expected = _steps(whole, 4)
    router = router_of(whole.model.backbone)
    if hasattr(router, "threshold"):
        assert router.threshold.updates.item() == 4
        assert router.threshold.value.abs().min() > 0
    if hasattr(router, "selection_bias"):
        assert router.selection_bias.abs().max() > 0
    buffers = zip(whole.model.buffers(), whole.ema.model.buffers(), strict=True)
    assert all(torch.equal(mine, averaged) for mine, averaged in buffers)
    first = Trainer(tiny_config(tmp_path / "b", *overrides, recipe=recipe), tmp_path / "b")
    half = _steps(first, 2)
    first.save()
    config = tiny_config(tmp_path / "b", *overrides, recipe=recipe)
    second = Trainer(config, tmp_path / "b")
    assert second.resume()
    assert half + _steps(second, 2) == expected
    for ours, theirs in ((whole.model, second.model), (whole.ema.model, second.ema.model)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    second.save()
    train.save_config(second.config, tmp_path / "b" / "config.yaml")
    train.save_info(tmp_path / "b", second.info)
    prompts = Prompts(torch.tensor([3, 7]), None)
    drawn = load_run(tmp_path / "b", "cpu").artist.draw(prompts, [0, 1])
    assert drawn.isfinite().all()
    assert torch.equal(drawn, whole.artist().draw(prompts, [0, 1]))


@pytest.mark.parametrize("name", ROUTED)
def test_gradients_reach_every_parameter_and_are_the_same_bits_again(name: str) -> None:
    model = moved(tiny(name))
    inputs = inputs_for(model.config)
    sample, first = gradients(model, inputs)
    again, second = gradients(model, inputs)
    assert torch.equal(sample, again)
    for parameter, _ in model.named_parameters():
        assert first[parameter].isfinite().all(), parameter
        assert first[parameter].abs().max() > 0, parameter
        assert torch.equal(first[parameter], second[parameter]), parameter


@pytest.mark.parametrize("name", ROUTED)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = moved(tiny(name))
    inputs = inputs_for(model.config)
    sample, plain = gradients(model, inputs)
    runs: list[object] = []
    router_of(model).register_forward_hook(lambda *_: runs.append(None))
    model.gradient_checkpointing = True
    again, checkpointed = gradients(model, inputs)
    assert len(runs) == 2, "the block was not recomputed"
    assert torch.equal(sample, again)
    assert plain.keys() == checkpointed.keys()
    for parameter, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[parameter]), parameter


@pytest.mark.parametrize("name", ["decoupled", "diffmoe", "expert_race", "loss_free"])
def test_training_compiles_without_a_graph_break(name: str) -> None:
    model = moved(tiny(name, depth=1, moe_every=1))
    inputs = inputs_for(model.config)
    sample, eager = gradients(model, inputs)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    compiled_sample, compiled = gradients(model, inputs)
    torch.testing.assert_close(compiled_sample, sample, rtol=1e-5, atol=1e-5)
    for parameter, gradient in eager.items():
        torch.testing.assert_close(compiled[parameter], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["diffmoe", "expert_race"])
def test_a_routing_over_the_batch_refuses_micro_batches(tmp_path: Path, name: str) -> None:
    recipe = {"diffmoe": "digits-diffmoe", "expert_race": "digits-expert-race"}[name]
    options = ("accumulate=2", "router_loss.similarity=0")
    with pytest.raises(ValueError, match=f"accumulate=2 with routing '{name}'.*share a pool"):
        Trainer(tiny_config(tmp_path, *options, recipe=recipe), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("digits-decoupled", ()), ("digits-loss-free", ()), ("digits", (NOISE,))],
)
def test_micro_batches_equal_the_large_batch(
    tmp_path: Path, recipe: str, overrides: tuple[str, ...]
) -> None:
    trainers = []
    for accumulate in (1, 4):
        config = tiny_config(tmp_path, f"accumulate={accumulate}", *overrides, recipe=recipe)
        trainer = Trainer(config, tmp_path)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        trainer.train_step()
        trainers.append(trainer)
    large, small = (trainer.model for trainer in trainers)
    for (name, a), b in zip(large.named_parameters(), small.parameters(), strict=True):
        difference = (a.grad.double() - b.grad.double()).norm()
        assert difference <= 2e-5 * a.grad.double().norm() + 1e-9, name
    for (name, a), b in zip(large.named_buffers(), small.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ROUTED)
def test_reset_parameters_after_to_empty_is_a_fresh_model(name: str) -> None:
    config = tiny(name)
    model = build_model(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(77)
    model.reset_parameters()
    fresh = build_model(config)
    for (parameter, got), expected in zip(
        model.named_parameters(), fresh.parameters(), strict=True
    ):
        spread = expected.std(correction=0)
        torch.testing.assert_close(
            got.std(correction=0), spread, rtol=0.3, atol=1e-6, msg=parameter
        )
    for (buffer, got), expected in zip(model.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(got, expected), buffer


@pytest.mark.parametrize("name", ROUTED)
def test_configurations_survive_json_and_deepcopy(name: str) -> None:
    config = tiny(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = moved(config)
    inputs = inputs_for(config)
    assert torch.equal(copy.deepcopy(model)(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("name", ROUTED)
def test_warmup_runs_a_routed_layer_without_its_model(name: str) -> None:
    model = moved(tiny(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mk.warmup(model, shapes=[(2, 16)])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ROUTED)
def test_counted_multiplications_are_weights_times_the_tokens_they_see(name: str) -> None:
    # Independent of the formula: each weight matrix of the built model times its token count.
    config = tiny(name)
    model = build_model(config, device="meta")
    seq_len = config.seq_len
    used = config.top_k or config.capacity_factor
    mean = {"noise": 0.5 * 0.2 + 1.0 * 0.6 + 1.5 * 0.2}.get(name, 1.0)
    expected = 0.0
    for parameter, weight in model.named_parameters():
        if weight.ndim < 2 or parameter.endswith(("embedding_table.weight", "_bias")):
            continue
        if "layer_head" in parameter:
            continue  # in training alone
        uses: float = seq_len
        if "adaLN" in parameter or parameter.startswith("t_embedder"):
            uses = 1
        elif ".experts." in parameter:
            uses = seq_len * used * mean // config.num_experts  # the capacity is rounded down
        expected += weight.numel() * uses
        if parameter.endswith("router.weight") and name == "decoupled":
            expected += weight.numel() / 2 * (1 - seq_len)  # the timestep half, once an image
    count = count_model(model)
    assert count.macs == expected
    held = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    unused = held * (1 - used * mean / config.num_experts)
    assert count.total - count.activated == round(unused)


def test_options_join_those_of_the_preset_and_the_objective_gives_the_noise_scale(
    tmp_path: Path,
) -> None:
    def config_of(recipe: str, *overrides: str) -> ModelConfig:
        return Trainer(
            tiny_config(tmp_path, *overrides, recipe=recipe), tmp_path
        ).model.backbone.config

    one = config_of("digits-diffmoe", "model_options.routing_options.inference=batch_topk")
    assert (one.routing, one.routing_options) == ("diffmoe", {"inference": "batch_topk"})
    other = config_of("digits-diffmoe", "model_options.routing=expert_choice")
    assert (other.routing, other.routing_options) == ("expert_choice", {})
    assert config_of("digits", NOISE).max_timestep == 1.0
    assert config_of("digits-ddpm", NOISE).max_timestep == 1000.0
    assert config_of("digits-ddpm").max_timestep == 1.0


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_command_lists_fields_options_and_losses(name: str) -> None:
    routing = ROUTINGS[name]
    text = describe(routing)
    assert text.startswith(f"{name} (family {routing.family})")
    for option in routing.options.__dataclass_fields__:
        assert f"routing_options.{option}=" in text
    for loss in routing.losses:
        assert f"router_loss.own.{loss}=" in text


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("EC-DiT-tiny", {"routing": "magic"}, "routing='magic': family 'ec_dit' has expert_choice"),
        ("EC-DiT-tiny", {"routing": "loss_free"}, "family 'ec_dit' has"),
        ("DiT-MoE-tiny", {"routing": "diffmoe"}, "family 'dit_moe' has token_choice, loss_free"),
        ("DiT-tiny", {"routing": "diffmoe", "num_experts": 0}, "family 'dit' does not use it"),
        ("DiT-MoE-tiny", {"routing_options": {"capacity_by_layer": [1.0]}}, "it has none"),
        ("diffmoe", {"group": "batch"}, "group='batch': routing 'diffmoe' does not use it"),
        ("diffmoe", {"routing_options": {"inference": "magic"}}, "inference='magic'.*batch_topk"),
        ("diffmoe", {"routing_options": {"decay": 0.9}}, r"has no \['decay'\]; known: inference"),
        ("diffmoe", {"routing_options": {"threshold_decay": 1.0}}, "threshold_decay=1.0"),
        ("expert_race", {"routing_options": {"threshold_decay": "a"}}, "threshold_decay='a'"),
        ("expert_race", {"routing_options": {"layer_head": "off"}}, "expected true or false"),
        ("expert_race", {"rounding": "ceil"}, "routing 'expert_race' does not use it"),
        ("expert_race", {"capacity_factor": 5.0}, "at most num_experts=4"),
        ("loss_free", {"routing_options": {"bias_update_rate": 0}}, "bias_update_rate=0"),
        ("loss_free", {"capacity_factor": 1.0}, "routing 'loss_free' does not use it"),
        ("diffmoe", {"max_timestep": 1000.0}, "max_timestep=1000.0: routing 'diffmoe'"),
        ("EC-DiT-tiny", {"routing_options": []}, "expected options by name"),
    ],
)
def test_settings_without_effect_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name, **changes)


def test_a_coefficient_of_a_loss_that_the_routing_lacks_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "router_loss.own.layer_head=0.1")
    with pytest.raises(ValueError, match=r"router_loss\.own has layer_head.*it has none"):
        Trainer(config, tmp_path)
    words = ("model_options.routing_options.layer_head=false", "router_loss.own.layer_head=0.1")
    config = tiny_config(tmp_path, *words, recipe="digits-expert-race")
    with pytest.raises(ValueError, match=r"router_loss\.own has layer_head.*it has none"):
        Trainer(config, tmp_path)


def test_options_that_are_no_options_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model_options.routing_options=5")
    with pytest.raises(ValueError, match="routing_options=5: expected options by name"):
        Trainer(config, tmp_path)


def test_own_losses_are_logged_and_added(tmp_path: Path) -> None:
    for own, coefficient in (((), 0.01), (("router_loss.own.layer_head=0.5",), 0.5)):
        config = tiny_config(tmp_path, *own, recipe="digits-expert-race")
        values = _steps(Trainer(config, tmp_path), 1)[0]
        total = values["diffusion_loss"] + 1e-4 * values["similarity_loss"]
        total += coefficient * values["layer_head_loss"]
        assert values["loss"] == pytest.approx(total, rel=1e-6)
    config = tiny_config(tmp_path, "router_loss.own.capacity_predictor=0", recipe="digits-diffmoe")
    values = _steps(Trainer(config, tmp_path), 1)[0]
    assert values["loss"] == values["diffusion_loss"]
