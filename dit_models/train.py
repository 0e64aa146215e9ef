"""Train a model, then sample from it and evaluate it: ``python -m dit_models.train --help``."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_kernels
from dit_models.assemble import with_defaults
from dit_models.atomic import write_text
from dit_models.checkpoints import CheckpointError
from dit_models.config import TrainConfig
from dit_models.config_io import (
    build_config,
    differing_fields,
    fields_of,
    help_text,
    load_config,
    save_config,
    shared_fields,
)
from dit_models.count import count_model
from dit_models.drawing import example_prompts
from dit_models.evaluate import evaluate, why_not_evaluated
from dit_models.extras import require
from dit_models.interrupt import StopRequest
from dit_models.metrics import MetricsLog, read_metrics
from dit_models.panels import record_routing, save_expert_load, save_experts_per_token, save_grid
from dit_models.parallel.heartbeats import FOLDER_NAME as HEARTBEATS_NAME
from dit_models.parallel.watchdog import RankLost
from dit_models.parallel.world import World, join_world
from dit_models.recipes import DEFAULT_RECIPE, RECIPES
from dit_models.run_folder import (
    CONFIG_NAME,
    SUMMARY_NAME,
    holds_other_files,
    run_dir_of,
    run_lock,
    save_info,
)
from dit_models.stopwatch import Stopwatch
from dit_models.text import PretrainedText
from dit_models.trainer import Trainer, TrainingDiverged

_GRID_COLUMNS = 10


def train(config: TrainConfig) -> int:
    """Run (or go on with) the training that ``config`` describes.

    Under torchrun every process runs this, and the first one prints and writes.

    Returns:
        The exit status: 0 when the run is complete or stopped at ``stop_at``, 128 + the signal's
        number after Ctrl-C or SIGTERM.
    """
    run_dir = run_dir_of(config)
    settings = shared_fields(config)
    with join_world(config.parallel, config.device, settings) as world, ExitStack() as stack:
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if world.lead(partial(_begin, config, run_dir, stack)):
            return 0
        return _train_locked(config, run_dir, world)


def _begin(config: TrainConfig, run_dir: Path, stack: ExitStack) -> bool:
    """Take the run's folder for this training; or whether the run is complete."""
    if _is_complete(config, run_dir):
        print(f"{run_dir} is complete; nothing is trained again. For a new run: name=ANOTHER.")
        _print_summary(run_dir)
        return True
    if not run_dir.exists():
        run_dir.mkdir(parents=True)
    elif holds_other_files(run_dir):
        raise ValueError(
            f"{run_dir} is not empty and not the folder of a run; choose another name or run_dir."
        )
    stack.enter_context(run_lock(run_dir))
    return False


def _train_locked(config: TrainConfig, run_dir: Path, world: World) -> int:
    trainer = Trainer(config, run_dir, world)
    with trainer.watched():
        went_on = trainer.resume()
        logs: list[MetricsLog] = []  # of the first process alone
        world.lead(lambda: logs.append(_open_log(trainer, went_on)))
        if trainer.why_no_samples:
            print(f"Training without sample grids: {trainer.why_no_samples}")
        try:
            with StopRequest(repeated=world.size > 1) as stop:
                signal_number = _loop(trainer, logs, stop)
        finally:
            for log in logs:
                log.close()
        if signal_number:
            print(f"Stopped by signal {signal_number} at step {trainer.step}, which is saved. "
                  "The same command goes on from there.")  # fmt: skip
            return 128 + signal_number
        if not trainer.finished:
            print(f"Stopped at step {trainer.step} (stop_at), which is saved.")
            return 0
        _finish(trainer)
    return 0


def _open_log(trainer: Trainer, went_on: bool) -> MetricsLog:
    """Say what is trained, and write down what the run is made of."""
    config, run_dir = trainer.config, trainer.run_dir
    if went_on:
        print(f"Going on with {run_dir} at step {trainer.step}.")
    else:
        _check_nothing_is_lost(trainer)
        print(f"New run in {run_dir}.")
    log = MetricsLog(run_dir, trainer.step)
    save_config(trainer.config, run_dir / CONFIG_NAME)
    save_info(run_dir, trainer.info)
    count = count_model(trainer.model.backbone)
    print(
        f"{config.model} on {config.data.name}: {count.total / 1e6:.2f} M parameters, "
        f"{count.activated / 1e6:.2f} M activated; {trainer.device}, "
        f"{torch.get_num_threads()} threads."
    )
    if trainer.world.size > 1:
        print(trainer.world.describe())
    return log


def _is_complete(config: TrainConfig, run_dir: Path) -> bool:
    """Whether this very run has been finished.

    Raises:
        CheckpointError: when the folder holds a finished run with other settings.
    """
    if not (run_dir / SUMMARY_NAME).exists():
        return False
    saved = {name: value for name, value, _ in fields_of(load_config(run_dir / CONFIG_NAME))}
    config = with_defaults(config)
    if different := differing_fields(saved, config):
        raise CheckpointError(
            f"{run_dir} holds a finished run with other settings ({'; '.join(different)}). Start a "
            "new run with name=ANOTHER."
        )
    if config.steps > saved["steps"]:
        return False
    asked = {name: value for name, value, _ in fields_of(config)}
    later = [name for name in asked if name.startswith(("sampling.", "evaluation."))]
    if any(asked[name] != saved[name] for name in later):
        print("Its sampling and evaluation settings are not applied again; use "
              "python -m dit_models.sample or dit_models.evaluate.")  # fmt: skip
    return True


def _check_nothing_is_lost(trainer: Trainer) -> None:
    """Refuse to start over where a run had got past its first checkpoint."""
    run_dir = trainer.run_dir
    lines = read_metrics(run_dir)
    # Several processes write it in the background, until the next save waits for it at the latest.
    in_background = trainer.world.size > 1 or (run_dir / HEARTBEATS_NAME).exists()
    if lines and lines[-1]["step"] > trainer.config.save_every * (1 + in_background):
        raise CheckpointError(
            f"{run_dir} has metrics up to step {lines[-1]['step']} but no checkpoint. Put its "
            "checkpoints back, or start a new run with name=ANOTHER."
        )


def _loop(trainer: Trainer, logs: list[MetricsLog], stop: StopRequest) -> int:
    """Steps until the end, ``stop_at`` or a signal; leaves a checkpoint of the last step.

    Returns:
        The signal's number, of any process; 0 without one.
    """
    config, world = trainer.config, trainer.world
    last = min(config.steps, config.stop_at or config.steps)
    values: dict[str, float | Tensor] = {}
    bar = require("tqdm.auto", extra="train").tqdm(
        total=config.steps, initial=trainer.step, desc="training", unit="step",
        dynamic_ncols=True, disable=not world.is_main,
    )  # fmt: skip
    watch = Stopwatch(trainer)
    with bar:
        while not _signal_of_all(trainer, stop) and trainer.step < last:
            logged = (trainer.step + 1) % config.log_every == 0 or trainer.step + 1 == last
            values = trainer.train_step(with_routing=logged)
            bar.update()
            if logged:
                watch.lap()
                _log(trainer, logs, values, bar)
            sampled = config.sample_every and trainer.step % config.sample_every == 0
            saved = trainer.step % config.save_every == 0
            if sampled or saved:
                watch.lap()
            if sampled:
                with _survivable(f"the samples of step {trainer.step} could not be written"):
                    _save_samples(trainer, trainer.run_dir / f"samples_{trainer.step:08d}.png")
            if saved:
                _save(trainer, values)
            if sampled or saved:
                watch.skip()
        watch.lap()
    _save_last(trainer, values)
    return _signal_of_all(trainer, stop)


def _signal_of_all(trainer: Trainer, stop: StopRequest) -> int:
    """The signal that any process got, so that all stop at the same step; 0 without one."""
    trainer.report("agreeing to go on")
    return trainer.world.largest(stop.signal_number or 0)


def _log(trainer: Trainer, logs: list[MetricsLog], values: dict[str, Any], bar: Any) -> None:
    _require_finite(trainer, values)
    plain = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    speed = trainer.step / trainer.train_seconds
    for log in logs:
        with _survivable(f"the metrics of step {trainer.step} could not be written"):
            log.write(trainer.step, {**plain, "steps_per_second": speed})
    bar.set_postfix(loss=f"{plain['loss']:.4f}")
    _warn_of_failed_saves(trainer)


def _save(trainer: Trainer, values: dict[str, Any]) -> None:
    """Write a checkpoint, unless the run has diverged: the good one before must stay the newest.

    A full disk is no reason to lose what was trained: training goes on.
    """
    _require_finite(trainer, values)
    _warn_of_failed_saves(trainer)
    with _survivable(f"step {trainer.step} could not be saved"):
        trainer.save()


def _save_last(trainer: Trainer, values: dict[str, Any]) -> None:
    """Write the checkpoint of the last step, and wait until it is there.

    Raises:
        OSError: it could not be written.
    """
    _require_finite(trainer, values)
    trainer.finish_saving()  # of an earlier one, whose failure is only a warning
    _warn_of_failed_saves(trainer)
    trainer.save()
    trainer.finish_saving()
    if failures := trainer.failed_saves():
        raise OSError(f"the last step could not be saved: {failures[-1]}")


def _warn_of_failed_saves(trainer: Trainer) -> None:
    for reason in trainer.failed_saves():
        if trainer.world.is_main:
            _warn(reason)


@contextmanager
def _survivable(what_failed: str) -> Iterator[None]:
    """Go on, with a warning, where the disk is full or otherwise fails."""
    try:
        yield
    except OSError as error:
        _warn(f"{what_failed} ({error})")


def _warn(reason: str) -> None:
    print(
        f"\nwarning: {reason}. Training goes on; the checkpoints before are kept.", file=sys.stderr
    )


def _require_finite(trainer: Trainer, values: dict[str, Any]) -> None:
    wrong = {
        name: value
        for name, value in values.items()
        if not torch.isfinite(torch.as_tensor(value)).all()
    }
    if wrong:
        raise TrainingDiverged(
            f"step {trainer.step}: {', '.join(wrong)} is no longer finite. Nothing of this state "
            f"was saved in {trainer.run_dir}; lower optimizer.lr or set optimizer.clip_norm=1."
        )


def _save_samples(trainer: Trainer, path: Path, guidance_scale: float | None = None) -> None:
    """Draw the grid of fixed prompts from fixed noise, where this machine can."""
    if trainer.why_no_samples:
        return
    config = trainer.config
    prompts = example_prompts(trainer.info, config.data, config.sampling.grid_images)
    seeds = list(range(len(prompts)))
    with trainer.drawing() as artist:
        images = artist.draw(prompts, seeds, guidance_scale=guidance_scale)
    if not trainer.world.is_main:
        return
    save_grid(path, images, _GRID_COLUMNS)
    if prompts.captions is not None:
        write_text(path.with_suffix(".txt"), "\n".join(prompts.captions) + "\n")


def _finish(trainer: Trainer) -> None:
    """Evaluate, sample, draw the routing panels, and write the summary."""
    config, run_dir = trainer.config, trainer.run_dir
    figures: dict[str, Any] = {}
    if config.evaluation.enabled:
        reason = trainer.why_no_samples
        reason = reason or why_not_evaluated(config.data.name, trainer.info.image_size)
        if reason is None:
            print(f"Evaluating {config.evaluation.num_samples} samples at each guidance scale:")
            with trainer.drawing() as artist:
                figures = evaluate(artist, config.data.name, config.evaluation)
        else:
            print(f"No quality figure: {reason}.")
    _save_samples(trainer, run_dir / "samples.png", figures.get("guidance_scale"))
    _save_routing(trainer)
    if not trainer.world.is_main:
        return
    count = count_model(trainer.model.backbone)
    # The text encoder, where there is one, is trained with the model and always active.
    encoder = trainer.model.text_encoder
    text_parameters = 0 if encoder is None else sum(p.numel() for p in encoder.parameters())
    summary = {
        **figures,
        "wall_seconds": round(trainer.wall_seconds, 2),
        "train_seconds": round(trainer.train_seconds, 2),
        "steps": trainer.step,
        "steps_per_second": round(trainer.step / trainer.train_seconds, 4),
        "parameters_total": count.total + text_parameters,
        "parameters_activated": count.activated + text_parameters,
        "parameters_text_encoder": text_parameters,
        "model": config.model,
        "data": config.data.name,
        "device": _device_name(trainer.device),
        "processes": trainer.world.size,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "moe_kernels": moe_kernels.__version__,
        },
    }
    if isinstance(encoder, PretrainedText) and encoder.frozen.cache is not None:
        cache = encoder.frozen.cache
        summary["text_cache"] = {
            "hits": cache.hits, "misses": cache.misses, "damaged": cache.damaged
        }  # fmt: skip
    write_text(run_dir / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    _print_summary(run_dir)


def _save_routing(trainer: Trainer) -> None:
    if trainer.why_no_samples:
        return
    prompts = example_prompts(trainer.info, trainer.config.data, 8)
    with trainer.drawing() as artist:
        record = record_routing(artist, prompts, list(range(8)))
    if record is not None and trainer.world.is_main:
        save_expert_load(trainer.run_dir / "expert_load.png", record)
        save_experts_per_token(trainer.run_dir / "experts_per_token.png", record)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}"


def _print_summary(run_dir: Path) -> None:
    summary = json.loads((run_dir / SUMMARY_NAME).read_text())
    print()
    if "class_accuracy" in summary:
        print(f"class accuracy     {summary['class_accuracy']:.4f}   "
              f"(guidance {summary['guidance_scale']:g}, {summary['num_samples']} samples; "
              f"the classifier's own {summary['classifier_accuracy']:.4f})")  # fmt: skip
        print(f"Fréchet distance   {summary['frechet_distance']:.3f}   "
              f"(real against real {summary['frechet_floor']:.3f}; not FID)")  # fmt: skip
    print(f"speed              {summary['steps_per_second']:.2f} steps/s, "
          f"{summary['steps']} steps, {summary['wall_seconds']:.0f} s in all")  # fmt: skip
    for what, name in (
        ("samples", "samples.png"),
        ("routing", "expert_load.png"),
        ("routing", "experts_per_token.png"),
    ):
        if (run_dir / name).exists():
            print(f"{what:<19}{run_dir / name}")
    if "text_cache" in summary:
        print("text cache         {hits} captions found, {misses} encoded, {damaged} damaged files"
              .format(**summary["text_cache"]))  # fmt: skip
    print(f"all figures        {run_dir / SUMMARY_NAME}")


def run_command(command: Callable[[], int | None], after_interrupt: str = "") -> None:
    """Run a command line's work; expected errors become one line and exit status 1 or 2.

    Args:
        command: the work; returns an exit status.
        after_interrupt: what a user should know after Ctrl-C.
    """
    rank = os.environ.get("RANK")
    who = f"rank {rank}: " if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""
    try:
        sys.exit(command() or 0)
    except ValueError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted{after_interrupt}.", file=sys.stderr)
        sys.exit(130)
    except (CheckpointError, TrainingDiverged, RankLost, ImportError, OSError) as error:
        print(f"{who}error: {error}", file=sys.stderr)
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=help_text(),
    )
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--config", help="YAML file with fields to change")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    options = parser.parse_args(arguments)
    run_command(
        lambda: train(build_config(options.recipe, options.config, options.overrides)),
        "; the same command goes on from the last checkpoint",
    )


if __name__ == "__main__":
    main()
