"""Dense, token choice, and expert choice at four capacity factors, at equal activated compute.

Every arm is trained on captioned scenes (digit-scenes) at each width and seed, and judged by its
diffusion loss on held-out scenes and by what its drawings show. The same command goes on where it
stopped; finished runs are not trained again. With no options this is a night on two CPU cores.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dit_models.ablation.arms import activated_macs, arms, run_config
from dit_models.ablation.plot import save_plot
from dit_models.ablation.results import load_results, points, table
from dit_models.ablation.run import Judging, jobs, run_in_processes, run_job
from dit_models.atomic import write_text
from dit_models.train import run_command

_SETTINGS = "settings.json"
# What must stay the same when an ablation goes on; the number of processes and seeds may grow.
_FIXED = ("match", "steps", "heldout", "samples", "guidance", "overrides")


def ablate(options: argparse.Namespace) -> int:
    """Train what is missing, then write table and plot; the exit status."""
    chosen = arms(options.match)
    all_jobs = jobs(options.out, chosen, options.widths, options.seeds)
    judging = Judging(options.heldout, options.samples, options.guidance)
    if options.only:
        job = next((job for job in all_jobs if job.run_dir.name == options.only), None)
        if job is None:
            names = ", ".join(job.run_dir.name for job in all_jobs)
            raise ValueError(f"--only {options.only!r}; the runs are {names}.")
        return run_job(job, options.steps, options.overrides, judging)
    for width in options.widths:
        for arm in chosen:
            config = run_config(
                arm, width, 0, steps=options.steps, run_dir="unused", overrides=options.overrides
            )
            print(
                f"{arm.label:<22} width {width}: {activated_macs(config) / 1e6:.2f} MMACs an image"
            )
    _keep_settings(options)
    status = 0
    waiting = [job for job in all_jobs if not job.done]
    print(f"{len(all_jobs)} runs, {len(waiting)} to do, in {options.out}.", flush=True)
    if waiting:
        status = run_in_processes(options.out, waiting, _words(options), options.processes)
    _report(options, [arm.label for arm in chosen])
    return status


def _words(options: argparse.Namespace) -> list[str]:
    words = ["--out", str(options.out), "--match", options.match]
    for name in ("steps", "seeds", "heldout", "samples", "guidance"):
        words += [f"--{name}", str(getattr(options, name))]
    return [*options.overrides, *words, "--widths", *map(str, options.widths)]


def _keep_settings(options: argparse.Namespace) -> None:
    """Write the settings, or refuse others than those of the runs that are there."""
    path = options.out / _SETTINGS
    mine = {name: getattr(options, name) for name in _FIXED}
    if path.exists():
        there = json.loads(path.read_text())
        if there != mine:
            different = [f"{k}: {there.get(k)!r} there, {mine[k]!r} now" for k in _FIXED
                         if there.get(k) != mine[k]]  # fmt: skip
            raise ValueError(
                f"{options.out} holds an ablation with other settings ({'; '.join(different)}); "
                "choose another --out."
            )
        return
    write_text(path, json.dumps(mine, indent=2) + "\n")


def _report(options: argparse.Namespace, labels: list[str]) -> None:
    results = load_results(options.out)
    if not results:
        return
    found = points([result for result in results if result.label in labels], labels)
    text = table(found)
    write_text(options.out / "results.md", text + "\n")
    everything = json.dumps([asdict(result) for result in results], indent=2)
    write_text(options.out / "results.json", everything + "\n")
    seeds = max(point.seeds for point in found)
    title = f"digit-scenes, {options.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    save_plot(options.out / "quality.png", found, title)
    print(text)
    print(f"\nplot: {options.out / 'quality.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dit_models.ablation", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the trainer")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[96, 128, 192], help="hidden sizes"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (3)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of a run (4000)")
    parser.add_argument("--match", default="total", help="total (equal expert weights) or experts "
                        "(8 experts everywhere)")  # fmt: skip
    parser.add_argument(
        "--heldout", type=int, default=512, help="held-out images of the loss (512)"
    )
    parser.add_argument("--samples", type=int, default=300, help="generated scenes a run (300)")
    parser.add_argument("--guidance", type=float, default=2.0, help="their guidance scale (2)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--only", help="one run, by its folder's name, in this process")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "heldout", "processes", "samples"):
        least = 2 if name == "samples" else 1  # a covariance needs two
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}; expected at least {least}")
    run_command(lambda: ablate(options), "; the same command goes on where it stopped")


if __name__ == "__main__":
    main()
