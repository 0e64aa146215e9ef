"""Train a model, then sample from it and evaluate it: ``python -m dit_models.train --help``."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import moe_kernels
from dit_models.atomic import write_text
from dit_models.checkpoints import CheckpointError
from dit_models.config import TrainConfig
from dit_models.config_io import build_config, help_text, save_config
from dit_models.count import count_model
from dit_models.drawing import example_prompts, prompt_dataset
from dit_models.evaluate import can_evaluate, evaluate
from dit_models.extras import require
from dit_models.interrupt import StopRequest
from dit_models.metrics import MetricsLog
from dit_models.panels import record_routing, save_expert_load, save_experts_per_token, save_grid
from dit_models.recipes import DEFAULT_RECIPE, RECIPES
from dit_models.run_folder import CONFIG_NAME, SUMMARY_NAME, run_dir_of
from dit_models.trainer import Trainer, TrainingDiverged

_GRID_COLUMNS = 10


def train(config: TrainConfig) -> int:
    """Run (or go on with) the training that ``config`` describes.

    Returns:
        The exit status: 0 when the run is complete or stopped at ``stop_at``, 128 + the signal's
        number after Ctrl-C or SIGTERM.
    """
    run_dir = run_dir_of(config)
    if (run_dir / SUMMARY_NAME).exists():
        print(f"{run_dir} is complete; nothing is trained again. For a new run: name=ANOTHER.")
        _print_summary(run_dir)
        return 0
    start = time.perf_counter()
    trainer = Trainer(config, run_dir)
    if trainer.resume():
        print(f"Going on with {run_dir} at step {trainer.step}.")
    else:
        _check_new_folder(run_dir)
        print(f"New run in {run_dir}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(trainer.config, run_dir / CONFIG_NAME)
    count = count_model(trainer.model.backbone)
    print(
        f"{config.model} on {config.data.name}: {count.total / 1e6:.2f} M parameters, "
        f"{count.activated / 1e6:.2f} M activated; {trainer.device}, "
        f"{torch.get_num_threads()} threads."
    )
    log = MetricsLog(run_dir)
    try:
        with StopRequest() as stop:
            _loop(trainer, log, stop)
    finally:
        log.close()
    if stop.signal_number is not None:
        print(f"Stopped by signal {stop.signal_number} at step {trainer.step}, which is saved. "
              "The same command goes on from there.")  # fmt: skip
        return 128 + stop.signal_number
    if not trainer.finished:
        print(f"Stopped at step {trainer.step} (stop_at), which is saved.")
        return 0
    _finish(trainer, run_dir, start)
    return 0


def _check_new_folder(run_dir: Path) -> None:
    """Refuse a folder with somebody's files: a run would overwrite what has its file names."""
    if run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / "metrics.jsonl").exists():
        raise ValueError(
            f"{run_dir} is not empty and not the folder of a run; choose another name or run_dir."
        )


def _loop(trainer: Trainer, log: MetricsLog, stop: StopRequest) -> None:
    """Steps until the end, ``stop_at`` or a signal; leaves a checkpoint of the last step."""
    config = trainer.config
    last = min(config.steps, config.stop_at or config.steps)
    bar = require("tqdm.auto", extra="train").tqdm(
        total=config.steps, initial=trainer.step, desc="training", unit="step", dynamic_ncols=True
    )
    with bar:
        while trainer.step < last and stop.signal_number is None:
            values = trainer.train_step()
            bar.update()
            if trainer.step % config.log_every == 0 or trainer.step == last:
                _log(trainer, log, values, bar)
            if config.sample_every and trainer.step % config.sample_every == 0:
                _save_samples(trainer, trainer.run_dir / f"samples_{trainer.step:08d}.png")
            if trainer.step % config.save_every == 0:
                trainer.save()
    trainer.save()


def _log(trainer: Trainer, log: MetricsLog, values: dict[str, Any], bar: Any) -> None:
    numbers = {name: float(value) for name, value in values.items()}
    speed = trainer.step / trainer.train_seconds
    log.write(trainer.step, {**numbers, "steps_per_second": speed})
    bar.set_postfix(loss=f"{numbers['loss']:.4f}")
    if not all(map(torch.isfinite, map(torch.tensor, numbers.values()))):
        raise TrainingDiverged(
            f"step {trainer.step}: a value is not finite ({numbers}). The last checkpoint in "
            f"{trainer.run_dir} is from before; lower optimizer.lr or set optimizer.clip_norm=1."
        )


def _save_samples(trainer: Trainer, path: Path, guidance_scale: float | None = None) -> None:
    """Draw the grid of fixed prompts from fixed noise."""
    dataset = prompt_dataset(trainer.config.data.name, trainer.info.image_size)
    prompts = example_prompts(trainer.info, dataset, trainer.config.sampling.grid_images)
    seeds = list(range(len(prompts)))
    images = trainer.artist().draw(prompts, seeds, guidance_scale=guidance_scale)
    save_grid(path, images, _GRID_COLUMNS)
    if prompts.captions is not None:
        write_text(path.with_suffix(".txt"), "\n".join(prompts.captions) + "\n")


def _finish(trainer: Trainer, run_dir: Path, start: float) -> None:
    """Sample, draw the routing panels, evaluate, and write the summary."""
    config = trainer.config
    figures: dict[str, Any] = {}
    if config.evaluation.enabled and can_evaluate(config.data.name):
        print(f"Evaluating {config.evaluation.num_samples} samples at each guidance scale:")
        figures = evaluate(trainer.artist(), config.data.name, config.evaluation)
    scale = figures.get("guidance_scale")
    _save_samples(trainer, run_dir / "samples.png", scale)
    _save_routing(trainer, run_dir)
    count = count_model(trainer.model.backbone)
    summary = {
        **figures,
        "wall_seconds": round(time.perf_counter() - start, 2),
        "train_seconds": round(trainer.train_seconds, 2),
        "steps": trainer.step,
        "steps_per_second": round(trainer.step / trainer.train_seconds, 4),
        "parameters_total": count.total,
        "parameters_activated": count.activated,
        "model": config.model,
        "data": config.data.name,
        "device": _device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "moe_kernels": moe_kernels.__version__,
        },
    }
    write_text(run_dir / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    _print_summary(run_dir)


def _save_routing(trainer: Trainer, run_dir: Path) -> None:
    dataset = prompt_dataset(trainer.config.data.name, trainer.info.image_size)
    prompts = example_prompts(trainer.info, dataset, 8)
    record = record_routing(trainer.artist(), prompts, list(range(8)))
    if record is not None:
        save_expert_load(run_dir / "expert_load.png", record)
        save_experts_per_token(run_dir / "experts_per_token.png", record)


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
    print(f"samples            {run_dir / 'samples.png'}")
    for name in ("expert_load.png", "experts_per_token.png"):
        if (run_dir / name).exists():
            print(f"routing            {run_dir / name}")
    print(f"all figures        {run_dir / SUMMARY_NAME}")


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command line's work; expected errors become one line and exit status 1 or 2."""
    try:
        sys.exit(command() or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except (CheckpointError, TrainingDiverged, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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
    run_command(lambda: train(build_config(options.recipe, options.config, options.overrides)))


if __name__ == "__main__":
    main()
