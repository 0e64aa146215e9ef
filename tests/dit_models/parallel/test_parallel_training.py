"""Training on several processes: the same run as on one, whatever the division."""

import json
import os
import shutil
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed

import dit_models.trainer
from dit_models.checkpoints import CheckpointError
from dit_models.config import TrainConfig
from dit_models.routing import LayerRouting, RouterContext
from dit_models.routing.loss_free import LossFreeRouter
from dit_models.run_folder import load_run
from dit_models.train import train
from dit_models.trainer import Trainer, check_batch

from ...ranks import run_outcomes, run_ranks
from ..training import tiny_config

# Enough to see the weights that the first steps made, and no drawing at the end.
SHORT = ("optimizer.lr=1e-3", "stop_at=4", "save_every=100", "evaluation.enabled=false")
Run = tuple[Path, str, tuple[str, ...]]


def _train(*runs: Run) -> None:
    for run_dir, recipe, overrides in runs:
        assert train(tiny_config(run_dir, *SHORT, *overrides, recipe=recipe)) == 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def differences(run_dir: Path, other_dir: Path) -> dict[str, float]:
    """The largest relative difference of each value that two runs logged."""
    ours, theirs = metrics(run_dir), metrics(other_dir)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] != []
    largest: dict[str, float] = {}
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"step", "steps_per_second"}:
            a, b = (torch.tensor(value, dtype=torch.float64) for value in (mine[name], other[name]))
            error = float((a - b).norm() / b.norm().clamp_min(1e-12))
            largest[name] = max(largest.get(name, 0.0), error)
    return largest


def _assert_averages_close(run_dir: Path, other_dir: Path) -> None:
    """Averaged weights, and what routers learn without a gradient (biases, thresholds)."""
    ours, theirs = (load_run(folder, "cpu").artist.model for folder in (run_dir, other_dir))
    for (name, mine), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        # Four steps of 1e-3 move a weight by up to 4e-3.
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)


DIVISIONS = [
    ("digits", (), ["expert=1", "data=4,expert=2", "expert=4", "replicate=2,expert=2"]),
    ("digits", ("model_options.group=batch", "gradient_checkpointing=true"), ["expert=2"]),
    ("digits", ("masking.ratio=0.5", "model_options.mask_decoder_depth=1"), ["expert=2"]),
    ("digits-token-choice", (), ["expert=2,debug=true", "replicate=4,reshard_after_forward=false"]),
    ("digits-token-choice", ("accumulate=2",), ["expert=4"]),
    ("digits-loss-free", (), ["expert=4"]),
    ("digits-diffmoe", (), ["expert=2"]),
    ("digits-expert-race", (), ["expert=2"]),
    ("digits-decoupled", ("optimizer.kind=rmsprop",), ["expert=2"]),
    ("digit-scenes", ("text.max_length=64",), ["expert=2"]),
]


@pytest.mark.parametrize(("recipe", "options", "divisions"), DIVISIONS)
def test_four_processes_follow_the_losses_of_one(
    tmp_path: Path, recipe: str, options: tuple[str, ...], divisions: list[str]
) -> None:
    _train((tmp_path / "one", recipe, options))
    runs: list[Run] = []
    for division in divisions:
        parts = tuple(f"parallel.{part}" for part in division.split(","))
        runs.append((tmp_path / division, recipe, (*options, *parts)))
    run_ranks(_train, 4, *runs)
    for division in divisions:
        found = differences(tmp_path / division, tmp_path / "one")
        assert found["loss"] < 1e-6
        assert max(found.values()) < 1e-4, (division, found)
        _assert_averages_close(tmp_path / division, tmp_path / "one")


def _loads_that_routers_learn_from(run_dir: Path) -> list[list[float]]:
    """Where every process sees other loads; a new model routes all images alike."""
    seen: list[list[float]] = []
    route = LossFreeRouter.forward

    def shifted(router: LossFreeRouter, x: Tensor, context: RouterContext) -> LayerRouting:
        routing = route(router, x, context)
        load = routing.observed["load"] + distributed.get_rank() / 4
        return routing._replace(observed={"load": load})

    with (
        patch.object(LossFreeRouter, "forward", shifted),
        patch.object(LossFreeRouter, "update", lambda _, o: seen.append(o["load"].tolist())),
    ):
        _train((run_dir, "digits-loss-free", ("stop_at=1",)))
    return seen


def test_routers_learn_from_what_all_processes_observed(tmp_path: Path) -> None:
    first, second = run_ranks(_loads_that_routers_learn_from, 2, tmp_path)
    assert first == second
    assert all(load % 0.5 == 1 / 8 for layer in first for load in layer)


def test_bf16_products_follow_one_process_with_autocast(tmp_path: Path) -> None:
    _train((tmp_path / "one", "digits", ("precision=bf16",)))
    run_ranks(_train, 4, (tmp_path / "four", "digits", ("precision=bf16", "parallel.expert=2")))
    found = differences(tmp_path / "four", tmp_path / "one")
    # Products are rounded to 8 bits; a gradient that is summed over processes is rounded earlier.
    assert found["loss"] < 1e-4
    assert found["grad_norm"] < 1e-2


def test_blocks_are_compiled_one_by_one(tmp_path: Path) -> None:
    options = ("compile=true", "parallel.expert=2", "stop_at=2")
    recomputed = (*options, "gradient_checkpointing=true")
    _train((tmp_path / "one", "digits", ("stop_at=2",)))
    runs = ((tmp_path / "two", "digits", options), (tmp_path / "again", "digits", recomputed))
    run_ranks(_train, 2, *runs, timeout=300)
    for name in ("two", "again"):
        assert max(differences(tmp_path / name, tmp_path / "one").values()) < 1e-4


def test_a_run_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    _train((tmp_path / "one", "digits", ("stop_at=5",)))
    many = tmp_path / "many"
    for count, stop_at, division in ((4, 2, 2), (2, 3, 1), (1, 4, 1), (2, 5, 2)):
        run: Run = (many, "digits", (f"stop_at={stop_at}", f"parallel.expert={division}"))
        if count == 1:
            _train((many, "digits", (f"stop_at={stop_at}",)))
        else:
            run_ranks(_train, count, run)
    assert max(differences(many, tmp_path / "one").values()) < 1e-4


# The last one enters its second stage with the third step.
STATEFUL = {
    "digits-loss-free": (),
    "digits-diffmoe": (),
    "digits": ("model_options.routing_options.capacity_by_stage=[[0.0,2.0],[0.3,1.0]]",),
}


def _train_in_one_go_and_in_two(folder: Path) -> None:
    # What is saved of routers must be the same in all processes.
    warnings.filterwarnings("error", ".*holds the first process's values")
    for recipe, options in STATEFUL.items():
        whole, parts = (folder / name / recipe for name in ("whole", "parts"))
        _train(
            # What it draws in between changes nothing.
            (whole, recipe, (*options, "stop_at=3", "sample_every=2")),
            (parts, recipe, (*options, "stop_at=2")),
            (parts, recipe, (*options, "stop_at=3")),
        )


def test_what_routers_have_learned_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(_train_in_one_go_and_in_two, 2, tmp_path)
    for recipe in STATEFUL:
        whole, parts = (tmp_path / name / recipe for name in ("whole", "parts"))
        assert max(differences(parts, whole).values()) == 0
        ours, theirs = (
            {path.name: path.read_bytes() for path in run.glob("checkpoints/*3/rank_*")}
            for run in (whole, parts)
        )
        assert ours == theirs
        assert len(ours) == 2
        assert (whole / "samples_00000002.png").is_file()
    # One process draws from what two have averaged, in the stage that they had reached.
    shutil.rmtree(parts / "checkpoints" / "step_00000003")
    trainer = Trainer(tiny_config(parts, *SHORT, *STATEFUL["digits"]), parts)
    assert trainer.resume()
    with trainer.ema.drawing_model() as model:
        routers = [module for module in model.modules() if hasattr(module, "factor")]
        assert {router.factor() / router.capacity_factor for router in routers} == {2.0}


def _finish(run_dir: Path) -> None:
    assert train(tiny_config(run_dir, "save_every=100", "parallel.expert=2")) == 0


def test_several_processes_draw_and_evaluate_together(tmp_path: Path) -> None:
    run_ranks(_finish, 2, tmp_path / "two")
    assert train(tiny_config(tmp_path / "one", "save_every=100")) == 0
    ours, theirs = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("two", "one"))
    assert ours["processes"] == 2
    # Three steps of a larger learning rate apart, and an image may round to another level.
    assert ours["class_accuracy"] == pytest.approx(theirs["class_accuracy"], abs=0.11)
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_distance"], rel=1e-2)
    assert ours["parameters_total"] == theirs["parameters_total"]
    assert (tmp_path / "two" / "samples.png").is_file()
    assert (tmp_path / "two" / "expert_load.png").is_file()


def _refused(run_dir: Path, overrides: tuple[str, ...]) -> str:
    try:
        train(tiny_config(run_dir, *SHORT, *overrides))
    except (ValueError, CheckpointError) as error:
        return str(error)
    return "was not refused"


def test_pools_of_each_process_are_asked_for_by_name(tmp_path: Path) -> None:
    options = ("model_options.group=batch", "save_every=2")
    local = (*options, "parallel.pool=local")
    run_ranks(
        _train, 2, (tmp_path / "global", "digits", options), (tmp_path / "local", "digits", local)
    )
    found = differences(tmp_path / "local", tmp_path / "global")
    assert found["mean_prob"] > 1e-6
    # What each process's own images decided does not go on with another number of processes.
    longer = (*local, "stop_at=5")
    message = _refused(tmp_path / "local", longer)
    assert "was made by 2 processes, and 1 go on" in message
    run_ranks(_train, 2, (tmp_path / "local", "digits", longer))


def test_uneven_batches_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    config = TrainConfig(name="x", batch_size=24, accumulate=2)
    check_batch(config, 4)
    with pytest.raises(ValueError, match="batch_size=24 does not divide into accumulate=2"):
        check_batch(config, 8)


def _config_errors(run_dir: Path) -> list[str]:
    return [
        _refused(run_dir, override)
        for override in (
            ("parallel.data=3",),
            ("parallel.expert=4",),
            ("batch_size=7",),
            ("parallel.expert=2", "model=DiT-tiny", "model_options.num_experts=0"),
            (
                "model_options.group=batch",
                "router_loss.balance=0.01",
                "router_loss.balance_pool=sequence",
            ),
        )
    ]


def test_a_wrong_division_is_an_error_in_every_process(tmp_path: Path) -> None:
    for messages in run_ranks(_config_errors, 2, tmp_path / "run"):
        assert "parallel.data=3, and 2 processes started" in messages[0]
        assert "does not divide the 2 processes" in messages[1]
        assert "batch_size=7 does not divide" in messages[2]
        assert "parallel.expert=2 and DiT-tiny, which has no experts" in messages[3]
        assert 'balance_pool="sequence" on several processes' in messages[4]
    one = _refused(tmp_path / "one", ("parallel.expert=2", "parallel.replicate=2"))
    assert one.endswith(
        "and 1 process started. Start a multiple of that (torchrun --nproc-per-node ...)."
    )


def _differ(run_dir: Path) -> str:
    """Settings that only one process has, and then a missing VAE that only one notices."""
    rank = int(os.environ["RANK"])
    message = _refused(run_dir, (f"parallel.expert={1 + rank}",))
    dit_models.trainer.why_no_vae = lambda *_: "no VAE here" if rank else None
    file = run_dir.with_name(f"said_{rank}")
    with open(file, "w") as stream, redirect_stdout(stream):
        assert train(tiny_config(run_dir, *SHORT, "sample_every=1", "stop_at=1")) == 0
    return message


def test_processes_that_differ(tmp_path: Path) -> None:
    for message in run_ranks(_differ, 2, tmp_path / "run"):
        assert "rank 1 was started with parallel.expert=2, rank 0 with 1;" in message
    assert "without sample grids: another process lacks" in (tmp_path / "said_0").read_text()
    assert not list((tmp_path / "run").glob("samples*"))


def _fail_in_the_lead(run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "other.txt").write_text("not a run")
    train(tiny_config(run_dir, *SHORT))


def test_only_the_first_process_says_what_it_finds_wrong(tmp_path: Path) -> None:
    first, second = run_outcomes(_fail_in_the_lead, 2, tmp_path / "run")
    assert "is not empty and not the folder of a run" in first.error
    assert second.error.strip().endswith("SystemExit: 1")


def test_one_process_needs_no_torch_distributed_of_its_own(tmp_path: Path) -> None:
    assert "WORLD_SIZE" not in os.environ
    trainer = Trainer(tiny_config(tmp_path, "parallel.timeout=1"), tmp_path)
    assert trainer.checkpoints.writer is None
    with trainer.watched():
        assert trainer.watchdog is None
