"""The trainer: exact resume, exact accumulation, checkpoints that are whole or refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dit_models import checkpoints, train
from dit_models.checkpoints import CheckpointError, list_checkpoints
from dit_models.config import OptimizerConfig
from dit_models.drawing import Prompts
from dit_models.ema import EMA
from dit_models.metrics import read_metrics
from dit_models.optimization import build_optimizer, learning_rate
from dit_models.run_folder import checkpoint_folder, load_run, run_lock
from dit_models.trainer import Trainer, TrainingDiverged

from .training import TINY, tiny_config


def run_steps(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    values = [trainer.train_step() for _ in range(steps)]
    return [
        {name: torch.as_tensor(value).tolist() for name, value in each.items()} for each in values
    ]


def assert_same_state(a: Trainer, b: Trainer) -> None:
    for mine, other in ((a.model, b.model), (a.ema.model, b.ema.model)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(a.generator.get_state(), b.generator.get_state())
    assert a.loader.position == b.loader.position


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits", ("optimizer.warmup_steps=2",)),
        ("digits-token-choice", ("optimizer.kind=rmsprop", "optimizer.lr=1e-4")),
        ("digits-ddpm", ()),
        ("digits", ("data.num_workers=2",)),
        ("digits", ("accumulate=2", "gradient_checkpointing=true", "ema_decay=0.5")),
        ("digit-scenes", ("model_options.text_dim=32",)),
    ],
)
def test_n_plus_n_steps_equal_2n_steps_bit_for_bit(tmp_path, recipe, overrides):
    whole = Trainer(tiny_config(tmp_path / "a", *overrides, recipe=recipe), tmp_path / "a")
    expected = run_steps(whole, 6)
    first = Trainer(tiny_config(tmp_path / "b", *overrides, recipe=recipe), tmp_path / "b")
    half = run_steps(first, 3)
    first.save()
    torch.manual_seed(999)  # whatever happens in between must not matter
    torch.randn(10)
    second = Trainer(tiny_config(tmp_path / "b", *overrides, recipe=recipe), tmp_path / "b")
    assert second.resume()
    assert second.step == 3
    rest = run_steps(second, 3)
    assert half + rest == expected
    assert_same_state(whole, second)


def test_sampling_in_between_does_not_change_training(tmp_path):
    plain = Trainer(tiny_config(tmp_path / "a"), tmp_path / "a")
    expected = run_steps(plain, 4)
    drawing = Trainer(tiny_config(tmp_path / "b"), tmp_path / "b")
    got = run_steps(drawing, 2)
    train._save_samples(drawing, tmp_path / "grid.png")
    got += run_steps(drawing, 2)
    assert got == expected
    assert_same_state(plain, drawing)


@pytest.mark.parametrize("recipe", ["digits", "digits-token-choice"])
def test_accumulation_equals_the_large_batch(tmp_path, recipe):
    gradients, losses = [], []
    for accumulate in (1, 4):
        config = tiny_config(
            tmp_path, f"accumulate={accumulate}", "router_loss.balance=1.0", recipe=recipe
        )
        trainer = Trainer(config, tmp_path)
        torch.manual_seed(5)
        with torch.no_grad():  # away from the zero start, where most gradients vanish
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        losses.append(float(trainer.train_step()["loss"]))
        gradients.append([parameter.grad.double() for parameter in trainer.model.parameters()])
    assert math.isclose(*losses, rel_tol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(a.norm()) + 1e-9


def test_micro_batch_pool_is_not_the_large_batch(tmp_path):
    losses = []
    for pool in ("batch", "micro_batch"):
        config = tiny_config(
            tmp_path, "accumulate=4", "router_loss.balance=1.0",
            f"router_loss.balance_pool={pool}", recipe="digits-token-choice",
        )  # fmt: skip
        losses.append(float(Trainer(config, tmp_path).train_step()["balance_loss"]))
    assert not math.isclose(*losses, rel_tol=1e-4)


def test_checkpointed_blocks_train_the_same(tmp_path):
    runs = [
        run_steps(Trainer(tiny_config(tmp_path, f"gradient_checkpointing={on}"), tmp_path), 3)
        for on in ("false", "true")
    ]
    assert runs[0] == runs[1]


def test_bf16_autocast_trains(tmp_path):
    exact = run_steps(Trainer(tiny_config(tmp_path), tmp_path), 3)[-1]["loss"]
    bf16 = run_steps(Trainer(tiny_config(tmp_path, "precision=bf16"), tmp_path), 3)[-1]["loss"]
    assert bf16 != exact
    assert math.isclose(bf16, exact, rel_tol=0.05)


def test_the_loss_falls(tmp_path):
    config = tiny_config(tmp_path, "steps=60", "batch_size=32")
    values = run_steps(Trainer(config, tmp_path), 60)
    first = sum(v["diffusion_loss"] for v in values[:5]) / 5
    last = sum(v["diffusion_loss"] for v in values[-10:]) / 10
    assert last < 0.6 * first


def test_all_router_losses_are_logged_and_added(tmp_path):
    config = tiny_config(
        tmp_path, "router_loss.balance=0.5", "router_loss.z=0.25", "router_loss.similarity=2.0"
    )
    values = run_steps(Trainer(config, tmp_path), 1)[0]
    total = (
        values["diffusion_loss"]
        + 0.5 * values["balance_loss"]
        + 0.25 * values["z_loss"]
        + 2.0 * values["similarity_loss"]
    )
    assert math.isclose(values["loss"], total, rel_tol=1e-6)
    assert {"router_entropy", "unrouted_fraction", "grad_norm", "lr"} <= set(values)


@pytest.fixture
def saved_run(tmp_path):
    trainer = Trainer(tiny_config(tmp_path), tmp_path)
    run_steps(trainer, 2)
    return tmp_path, trainer.save()


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "training_state.pt"])
def test_a_damaged_checkpoint_is_refused(saved_run, name):
    run_dir, checkpoint = saved_run
    data = bytearray((checkpoint / name).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        Trainer(tiny_config(run_dir), run_dir).resume()


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_an_incomplete_checkpoint_is_refused(saved_run, name):
    run_dir, checkpoint = saved_run
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.*missing"):
        Trainer(tiny_config(run_dir), run_dir).resume()


def test_other_settings_are_refused_and_named(saved_run):
    run_dir, _ = saved_run
    with pytest.raises(CheckpointError, match=r"batch_size: 8 before, 16 now"):
        Trainer(tiny_config(run_dir, "batch_size=16"), run_dir).resume()
    with pytest.raises(CheckpointError, match=r"steps: 6 before, 9 now"):
        Trainer(tiny_config(run_dir, "steps=9"), run_dir).resume()  # cosine: every rate changes
    assert Trainer(tiny_config(run_dir, "log_every=5", "save_every=1"), run_dir).resume()


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rubbish(saved_run, monkeypatch):
    run_dir, checkpoint = saved_run
    trainer = Trainer(tiny_config(run_dir), run_dir)
    trainer.resume()
    run_steps(trainer, 1)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    folder = checkpoint_folder(run_dir)
    assert [path.name for path in folder.iterdir()] == [checkpoint.name]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(saved_run):
    run_dir, _ = saved_run
    leftover = checkpoint_folder(run_dir) / ".writing-step_00000099-1"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    trainer = Trainer(tiny_config(run_dir), run_dir)
    assert trainer.resume()
    assert trainer.step == 2
    assert not leftover.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, "keep_checkpoints=2"), tmp_path)
    for _ in range(4):
        run_steps(trainer, 1)
        trainer.save()
    names = [path.name for path in list_checkpoints(checkpoint_folder(tmp_path))]
    assert names == ["step_00000003", "step_00000004"]


def test_checkpoints_hold_no_pickled_code(saved_run):
    run_dir, checkpoint = saved_run
    evil = checkpoint / "training_state.pt"

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {run_dir}/owned",))

    torch.save(Payload(), evil)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load_training_state(checkpoint)
    assert not (run_dir / "owned").exists()


def test_ema_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    expected = model.weight.detach().clone()
    for step in (1, 2, 20):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


def test_learning_rate_schedule():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert math.isclose(rates[8], 1.0)
    assert math.isclose(rates[12], 0.0, abs_tol=1e-12)
    constant = OptimizerConfig(lr=2.0, warmup_steps=1)
    assert learning_rate(constant, 0, 10) == learning_rate(constant, 9, 10) == 2.0


def test_optimizers_are_the_configured_ones():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    adamw = build_optimizer(weights, OptimizerConfig(lr=0.1, beta2=0.9, weight_decay=0.2))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.9)
    assert adamw.defaults["weight_decay"] == 0.2
    rmsprop = build_optimizer(weights, OptimizerConfig(kind="rmsprop", momentum=0.7))
    assert isinstance(rmsprop, torch.optim.RMSprop)
    assert rmsprop.defaults["momentum"] == 0.7


def test_a_diverged_run_stops_with_an_error(tmp_path):
    config = tiny_config(tmp_path, "optimizer.lr=1e30", "optimizer.clip_norm=0", "log_every=1")
    with pytest.raises((TrainingDiverged, ValueError), match=r"no longer finite|non-finite"):
        train.train(config)


def test_a_whole_run_leaves_everything_it_promises(tmp_path, monkeypatch, capsys):
    cache = Path(os.environ.get("MOE_KERNELS_CACHE", tmp_path / "cache"))
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(cache))
    run_dir = tmp_path / "run"
    config = tiny_config(run_dir, "sample_every=3")
    assert train.train(config) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in (
        "class_accuracy", "frechet_distance", "frechet_floor", "wall_seconds", "steps_per_second",
        "parameters_total", "parameters_activated", "classifier_accuracy", "guidance_sweep",
    ):  # fmt: skip
        assert key in summary, key
    best = min(summary["guidance_sweep"], key=lambda figures: figures["frechet_distance"])
    assert summary["guidance_scale"] == best["guidance_scale"]
    assert summary["classifier_accuracy"] > 0.97
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["expert_load"] == [[0.25] * 4]  # one MoE layer, expert choice
    assert math.isclose(sum(lines[-1]["experts_per_token"][0]), 1.0, rel_tol=1e-5)
    for name in ("samples.png", "samples_00000003.png", "expert_load.png",
                 "experts_per_token.png"):  # fmt: skip
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG"), name
    assert str(run_dir / "samples.png") in capsys.readouterr().out

    before = (run_dir / "summary.json").read_bytes()
    assert train.train(config) == 0  # a finished run is not trained again
    assert "is complete" in capsys.readouterr().out
    assert (run_dir / "summary.json").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"seed: 0 before, 3 now"):
        train.train(tiny_config(run_dir, "seed=3"))
    loaded = load_run(run_dir, "cpu")
    assert loaded.step == 6


def test_a_finished_run_with_a_constant_schedule_can_be_made_longer(tmp_path):
    overrides = ("optimizer.schedule=constant", "evaluation.enabled=false")
    assert train.train(tiny_config(tmp_path, *overrides)) == 0
    assert train.train(tiny_config(tmp_path, *overrides, "steps=8")) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 8
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


def test_an_image_size_without_a_classifier_is_no_error(tmp_path, capsys):
    assert train.train(tiny_config(tmp_path, "steps=1", "data.image_size=8")) == 0
    assert "No quality figure: the classifier of digits reads images of 16" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "samples.png").exists()


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    config = tiny_config(tmp_path, "stop_at=4", "save_every=100")
    assert train.train(config) == 0
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # what a killed process leaves
    assert train.train(tiny_config(tmp_path, "evaluation.enabled=false")) == 0
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "diffusion_loss" in lines[4]


def test_a_run_that_lost_its_checkpoints_does_not_start_over(tmp_path):
    assert train.train(tiny_config(tmp_path, "stop_at=5")) == 0
    shutil.rmtree(checkpoint_folder(tmp_path))
    with pytest.raises(CheckpointError, match="metrics up to step 5 but no checkpoint"):
        train.train(tiny_config(tmp_path))
    # Of several processes, the first checkpoint may have been under way for as long again.
    (tmp_path / ".ranks").mkdir()
    assert train.train(tiny_config(tmp_path, "stop_at=1")) == 0
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(CheckpointError, match="another process is training"):
            train.train(tiny_config(tmp_path))


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    """The workers that load data outlive a killed training for some seconds."""
    with run_lock(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_captions_that_are_too_long_are_found_at_the_start(tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    line = {"file_name": "1.png", "text": "a very long caption " * 10}
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    config = tiny_config(
        tmp_path / "run", f"data.name={folder}", "data.image_size=8", recipe="captions"
    )
    with pytest.raises(ValueError, match=r"text\.max_length=128 leaves 126"):
        Trainer(config, tmp_path / "run")


def test_a_folder_of_images_trains_and_samples_without_its_images(tmp_path):
    folder = tmp_path / "photos"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (12, 10), (80 * index, 40, 200)).save(folder / name / f"{index}.png")
    run_dir = tmp_path / "run"
    config = tiny_config(
        run_dir, f"data.name={folder}", "data.image_size=8", "data.num_workers=0", "steps=2",
        recipe="images",
    )  # fmt: skip
    assert train.train(config) == 0
    shutil.rmtree(folder)
    loaded = load_run(run_dir, "cpu")
    assert loaded.info.num_classes == 2
    assert loaded.artist.draw(Prompts(torch.tensor([0, 1]), None), [0, 1]).shape == (2, 3, 8, 8)


def test_a_diverged_state_is_never_saved(tmp_path):
    config = tiny_config(
        tmp_path, "optimizer.lr=1e30", "optimizer.clip_norm=0", "log_every=100", "save_every=2"
    )
    with pytest.raises((TrainingDiverged, ValueError), match=r"no longer finite|non-finite"):
        train.train(config)
    assert list_checkpoints(checkpoint_folder(tmp_path)) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    mine = tmp_path / "config.yaml"
    mine.write_text("precious: 1\n")
    with pytest.raises(ValueError, match="is not empty and not the folder of a run"):
        train.train(tiny_config(tmp_path))
    assert mine.read_text() == "precious: 1\n"


def test_a_mistake_does_not_block_the_corrected_command(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="no model preset"):
        train.train(tiny_config(run_dir, "model=EC-DiT-tinny"))
    (run_dir / ".metrics.jsonl.1.2.tmp").touch()  # of a process killed while it made the file
    assert train.train(tiny_config(run_dir, "steps=1", "evaluation.enabled=false")) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    run_dir = tmp_path / "run"
    command = [
        sys.executable, "-m", "dit_models.train", *TINY, f"run_dir={run_dir}", "steps=100000",
        "save_every=100000", "optimizer.schedule=constant",
    ]  # fmt: skip
    log = run_dir / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"Stopped by signal {number}" in out
    assert "Traceback" not in err
    (saved,) = list_checkpoints(checkpoint_folder(run_dir))
    step = checkpoints.verify_checkpoint(saved)
    trainer = Trainer(
        tiny_config(run_dir, f"steps={step + 1}", "optimizer.schedule=constant"), run_dir
    )
    assert trainer.resume()
    assert trainer.step == step >= 3
