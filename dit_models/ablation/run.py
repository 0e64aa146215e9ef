"""Train and judge the runs of an ablation, one after the other or in several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dit_models.ablation.arms import Arm, activated_macs, run_config
from dit_models.ablation.heldout import heldout_loss
from dit_models.ablation.results import RESULT_NAME, RunResult, save_result
from dit_models.config import EvaluationConfig, TrainConfig
from dit_models.count import count_model
from dit_models.data import build_dataset
from dit_models.evaluate import evaluate
from dit_models.run_folder import SUMMARY_NAME, load_run
from dit_models.train import train


@dataclass(frozen=True)
class Job:
    """One run of the ablation: an arm, a width, a seed, and its folder."""

    arm: Arm
    width: int
    seed: int
    run_dir: Path

    @property
    def done(self) -> bool:
        """Whether it has been trained and judged."""
        return (self.run_dir / RESULT_NAME).exists()


@dataclass(frozen=True)
class Judging:
    """How finished runs are judged.

    Attributes:
        heldout: held-out images of the diffusion loss.
        samples: generated scenes.
        guidance_scale: of these.
    """

    heldout: int = 512
    samples: int = 300
    guidance_scale: float = 2.0


def jobs(out: Path, arms: Sequence[Arm], widths: Sequence[int], seeds: int) -> list[Job]:
    """Every run, seed by seed, so that an interrupted ablation has whole sets of arms first."""
    return [
        Job(arm, width, seed, out / f"{arm.name}-{width}-{seed}")
        for seed in range(seeds)
        for width in widths
        for arm in arms
    ]


def run_job(job: Job, steps: int, overrides: list[str], judging: Judging) -> int:
    """Train one run, or go on with it, and judge it; the trainer's exit status."""
    config = run_config(
        job.arm, job.width, job.seed, steps=steps, run_dir=str(job.run_dir), overrides=overrides
    )
    status = train(config)
    if status == 0 and not job.done:
        save_result(job.run_dir, judge(job, config, judging))
    return status


def judge(job: Job, config: TrainConfig, judging: Judging) -> RunResult:
    """The figures of a finished run."""
    run = load_run(job.run_dir, config.device)
    dataset = build_dataset(config.data.name, split="heldout")
    loss = heldout_loss(run.artist, dataset, judging.heldout)
    scales = EvaluationConfig(
        num_samples=judging.samples, guidance_scales=[judging.guidance_scale], batch_size=100
    )
    figures = evaluate(run.artist, config.data.name, scales)
    count = count_model(run.artist.model.backbone)
    return RunResult(
        arm=job.arm.name,
        label=job.arm.label,
        width=job.width,
        seed=job.seed,
        steps=run.step,
        batch_size=config.batch_size,
        macs=activated_macs(config),
        parameters=count.total,
        activated=count.activated,
        heldout_loss=loss,
        overall=figures["overall"],
        digit=figures["digit_accuracy"],
        color=figures["color_accuracy"],
        position=figures["position_accuracy"],
        frechet=figures["frechet_distance"],
        guidance_scale=judging.guidance_scale,
        num_samples=judging.samples,
        train_seconds=_train_seconds(job.run_dir),
    )


def _train_seconds(run_dir: Path) -> float:
    return float(json.loads((run_dir / SUMMARY_NAME).read_text())["train_seconds"])


def run_in_processes(
    out: Path, waiting: Sequence[Job], words: Sequence[str], processes: int
) -> int:
    """Run jobs, ``processes`` at a time, each in a process with its share of the cores.

    OMP_NUM_THREADS, where it is set, is that share.

    Args:
        out: folder of the ablation; what a process prints goes to ``NAME.log`` in it.
        waiting: the jobs.
        words: arguments of this program, repeated to each process.
        processes: how many run at once.

    Returns:
        0, or the first exit status that is not. Ctrl-C reaches every process, and each saves its
        run before it ends.
    """
    share = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, **os.environ}
    failed: list[int] = []

    def run(job: Job) -> None:
        if failed:
            return
        name = job.run_dir.name
        command = [sys.executable, "-m", "dit_models.ablation", *words, "--only", name]
        print(f"{name}: started", flush=True)
        with open(out / f"{name}.log", "ab") as log:
            status = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        ended = f"exit status {status}, see {out / name}.log" if status else "done"
        print(f"{name}: {ended}", flush=True)
        if status:
            failed.append(status)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, waiting))
    return failed[0] if failed else 0
