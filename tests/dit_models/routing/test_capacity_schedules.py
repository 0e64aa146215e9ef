"""Capacity schedules: exactly the stated C at every layer, stage and noise level."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_models.backbone import DiT
from dit_models.routing.capacity import CapacityOptions
from dit_models.routing.layers import set_progress
from dit_models.trainer import Trainer

from ..training import tiny_config
from .models import inputs_for, moved, router_of, tiny

STAGES = [[0.0, 2.0], [0.25, 0.5], [0.5, 1.0]]
NOISE = [[0.2, 0.5], [0.6, 1.0], [0.8, 2.0]]


def _capacities(model: DiT, **inputs: Any) -> list[int | None]:
    return [plan.capacity for plan in model(**inputs).plans]


def test_each_layer_has_its_own_capacity() -> None:
    # Nucleus-Image: 4, 4, then 2
    schedule = {"capacity_by_layer": [2, 2, 1, 1]}
    model = moved(tiny("EC-DiT-tiny", depth=8, num_experts=8, routing_options=schedule))
    assert _capacities(model, **inputs_for(model.config)) == [32, 32, 16, 16]  # 64 tokens


@pytest.mark.parametrize(
    ("progress", "capacity"),
    [(0.0, 64), (0.2499, 64), (0.25, 16), (0.4999, 16), (0.5, 32), (0.9, 32), (1.0, 32)],
)
def test_each_stage_has_its_capacity(progress: float, capacity: int) -> None:
    model = moved(tiny("EC-DiT-tiny", routing_options={"capacity_by_stage": STAGES}))
    set_progress(model, progress)
    assert _capacities(model, **inputs_for(model.config)) == [capacity]


def test_a_new_model_is_at_the_last_stage_and_a_loaded_one_at_the_saved_stage() -> None:
    config = tiny("EC-DiT-tiny", routing_options={"capacity_by_stage": STAGES})
    model, copy = moved(config), moved(config)
    assert _capacities(model, **inputs_for(config)) == [32]
    set_progress(model, 0.3)
    copy.load_state_dict(model.state_dict())
    assert _capacities(copy, **inputs_for(config)) == [16]
    copy.reset_parameters()
    assert _capacities(copy, **inputs_for(config)) == [32]


def test_the_trainer_tells_model_and_average_the_stage_and_a_checkpoint_keeps_it(
    tmp_path: Path,
) -> None:
    options = (
        "model_options.routing_options.capacity_by_stage=[[0.0,2.0],[0.5,1.0]]",
        "steps=4",
        "model_options.capacity_factor=1.0",
    )
    trainer = Trainer(tiny_config(tmp_path, *options), tmp_path)
    seen = []
    backbone = trainer.model.backbone
    backbone.register_forward_hook(lambda _, __, out: seen.append(out.plans[0].capacity))
    for _ in range(2):
        trainer.train_step()
    assert router_of(trainer.ema.model.backbone).capacity(64) == 32
    trainer.save()
    resumed = Trainer(tiny_config(tmp_path, *options), tmp_path)
    assert resumed.resume()
    assert router_of(resumed.model.backbone).capacity(64) == 32
    for _ in range(2):
        trainer.train_step()
    assert seen == [32, 32, 16, 16]
    assert router_of(trainer.ema.model.backbone).capacity(64) == 16


@pytest.mark.parametrize(("level", "capacity"), [(0.2, 48), (0.3, 44), (0.7, 28), (0.9, 20)])
def test_timesteps_in_fp32_give_no_token_less(level: float, capacity: int) -> None:
    options = {"capacity_by_noise": [[0.0, 1.75], [1.0, 0.5]]}
    model = moved(tiny("EC-DiT-tiny", routing_options=options))
    inputs = inputs_for(model.config) | {"timesteps": torch.full((3,), level)}
    assert _capacities(model, **inputs) == [capacity]


@pytest.mark.parametrize("max_timestep", [1.0, 1000.0])
@pytest.mark.parametrize(
    ("level", "capacity"),
    [(0.0, 16), (0.2, 16), (0.4, 24), (0.5, 28), (0.6, 32), (0.7, 48), (0.8, 64), (1.0, 64)],
)
def test_each_noise_level_has_its_capacity(
    max_timestep: float, level: float, capacity: int
) -> None:
    options = {"capacity_by_noise": NOISE}
    config = tiny("EC-DiT-tiny", routing_options=options, max_timestep=max_timestep)
    model = moved(config)
    inputs = inputs_for(config)
    inputs["timesteps"] = torch.full((3,), level * max_timestep, dtype=torch.float64)
    assert _capacities(model, **inputs) == [capacity]


def test_images_of_a_batch_have_the_capacities_of_their_own_noise_levels() -> None:
    config = tiny("EC-DiT-tiny", routing_options={"capacity_by_noise": NOISE})
    model = moved(config).double()  # fp32 rounding would hide a small dependence
    inputs = inputs_for(config)
    inputs["latents"] = inputs["latents"].double()
    inputs["timesteps"] = torch.tensor([0.1, 0.6, 0.95])
    output = model(**inputs)
    (plan,) = output.plans
    plan.validate()
    image = plan.token_indices.long() // config.seq_len
    per_image = torch.zeros(4, 3, dtype=torch.long)
    per_image.index_put_((plan.expert_of_row.long(), image), torch.tensor(1), accumulate=True)
    assert per_image.tolist() == [[16, 32, 64]] * 4
    for index in range(3):
        alone = model(**{name: value[index : index + 1] for name, value in inputs.items()})
        torch.testing.assert_close(
            alone.sample, output.sample[index : index + 1], rtol=1e-9, atol=1e-12
        )


def test_equal_noise_levels_are_plain_expert_choice_to_the_bit() -> None:
    config = tiny("EC-DiT-tiny", routing_options={"capacity_by_noise": NOISE})
    scheduled = moved(config)
    plain = moved(tiny("EC-DiT-tiny", capacity_factor=1.0))
    plain.load_state_dict(scheduled.state_dict())
    inputs = inputs_for(config) | {"timesteps": torch.full((3,), 0.2)}
    assert torch.equal(scheduled(**inputs).sample, plain(**inputs).sample)


def test_schedules_multiply() -> None:
    schedule = {
        "capacity_by_layer": [1.0, 0.5],
        "capacity_by_stage": [[0.0, 2.0], [0.5, 1.0]],
        "capacity_by_noise": [[0.0, 0.5], [1.0, 1.0]],
    }
    config = tiny("EC-DiT-tiny", depth=4, num_experts=8, routing_options=schedule)
    model = moved(config)
    inputs = inputs_for(config) | {"timesteps": torch.full((3,), 0.5)}
    for progress, stage in ((0.0, 2.0), (0.7, 1.0)):
        set_progress(model, progress)
        expected = [math.floor(64 * 2 * layer * stage * 0.75 / 8) for layer in (1.0, 0.5)]
        assert _capacities(model, **inputs) == expected


def test_a_schedule_by_stage_keeps_other_pools() -> None:
    options = {"capacity_by_stage": STAGES}
    model = moved(tiny("EC-DiT-tiny", group="batch", routing_options=options))
    (plan,) = model(**inputs_for(model.config)).plans
    assert (plan.num_groups, plan.capacity) == (1, 3 * 64 * 2 // 4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True), st.floats(0, 1))
def test_the_multiplier_stays_between_its_neighbours(places: list[float], level: float) -> None:
    points = [[place, 1.0 + index] for index, place in enumerate(sorted(places))]
    options = CapacityOptions(capacity_by_noise=points)
    got = options.noise_multiplier(level)
    below = [m for place, m in points if place <= level] or [points[0][1]]
    above = [m for place, m in points if place >= level] or [points[-1][1]]
    assert below[-1] - 1e-9 <= got <= above[0] + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_by_layer": [1.0, 1.0]}, "expected 1 numbers, one for each MoE layer"),
        ({"capacity_by_layer": [0.0]}, "expected numbers above 0"),
        ({"capacity_by_layer": 2}, "capacity_by_layer=2: expected a list"),
        ({"capacity_by_stage": 0.5}, "capacity_by_stage=0.5: expected a list"),
        ({"capacity_by_layer": [3.0]}, "reaches 6: expected at most num_experts=4"),
        ({"capacity_by_stage": [[0.1, 1.0]]}, "expected the first stage at 0"),
        ({"capacity_by_stage": [[0.0, 1.0], [0.0, 2.0]]}, "rising"),
        ({"capacity_by_stage": [0.5]}, "expected .*position from 0 to 1"),
        ({"capacity_by_noise": [[1.5, 1.0]]}, "expected .*position from 0 to 1"),
        ({"capacity_by_noise": [[0.5, -1.0]]}, "expected .*position from 0 to 1"),
        ({"capacity_by_noise": [[0.5, 2.5]]}, "reaches 5"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("EC-DiT-tiny", routing_options=options)


def test_noise_levels_of_a_pool_of_several_images_are_refused() -> None:
    with pytest.raises(ValueError, match="group='batch' must be \"image\""):
        tiny("EC-DiT-tiny", group="batch", routing_options={"capacity_by_noise": NOISE})
