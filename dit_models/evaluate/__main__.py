"""Evaluate a model: figures of embedded data, files of samples, FID and its kin, GenEval's folders.

RUN                                     guidance sweep judged by the data set's classifier
RUN --samples N --out FOLDER            draw FOLDER/samples.npz (ADM's format), go on if stopped
    --inception PATH --reference PATH   and FID, sFID, inception score, precision and recall
    --clip PATH                         and CLIP score
RUN --geneval METADATA --out FOLDER     draw GenEval's folders
SAMPLES.npz --inception PATH ...        the figures of a file, without a model
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from dit_models.train import run_command

    options = _parser().parse_args(arguments)
    goes_on = "; the same command goes on where it stopped" if options.out is not None else ""
    run_command(lambda: _run(options), goes_on)


def _run(options: argparse.Namespace) -> int:
    from dit_models.evaluate import jobs
    from dit_models.evaluate.processes import joined_group, run_in_processes

    _check(options)
    if options.folder.suffix == ".npz":
        return jobs.file_job(options)
    if options.out is None:
        return jobs.sweep_job(options)
    job = jobs.samples_job if options.geneval is None else jobs.geneval_job
    if options.processes > 1:
        return run_in_processes(job, options, options.processes)
    with joined_group() as group:
        return job(options, group)


def _check(options: argparse.Namespace) -> None:
    """Refuse words that would have no effect.

    Raises:
        ValueError: names them.
    """
    for name, least in (("chunk", 1), ("processes", 1), ("figure_batch_size", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}; expected >= 1.")
    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples {options.samples}; expected at least 1.")
    unused, where = _without_effect(options)
    parser = _parser()
    given = [name for name in unused if getattr(options, name) != parser.get_default(name)]
    if given:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{words} has no effect {where}; see --help.")
    if options.reference is not None and options.inception is None:
        raise ValueError("--reference needs --inception PATH, the weights of the network.")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}; expected at least 1.")
    # Hours of drawing may come before these are read.
    for name in ("inception", "reference", "clip"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ValueError(f"--{name} {path} does not exist.")
    if options.inception is not None:
        from dit_models.evaluate.inception import fidelity_module

        fidelity_module("torch_fidelity")
    if options.out is None:
        return
    if options.guidance and len(options.guidance) > 1:
        raise ValueError(f"--guidance {options.guidance}: one scale with --out, which is one set.")
    if options.geneval is None and options.samples is None and options.prompts is None:
        raise ValueError("--out needs --samples N, --prompts FILE or --geneval FILE.")


def _without_effect(options: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    """Options that the job at hand does not read, and which job that is."""
    drawing = ("labels", "sampler", "steps", "first_seed", "vae", "processes", "chunk",
               "images_per_prompt")  # fmt: skip
    figures = ("inception", "reference", "clip", "figure_batch_size")
    if options.folder.suffix == ".npz":
        words = (*drawing, "samples", "guidance", "batch_size", "geneval", "out")
        return words, "with a file of samples"
    if options.out is None:
        return (*drawing, *figures, "prompts", "geneval"), "without --out"
    if options.geneval is not None:
        return (*figures, "labels", "prompts", "samples", "json", "chunk"), "with --geneval"
    return ("json", "images_per_prompt"), "with --out FOLDER and without --geneval"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dit_models.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run or of converted weights, or .npz")
    add("--samples", type=int, metavar="N", help="images to draw (in the sweep: at each scale)")
    add("--guidance", type=float, nargs="+", help="guidance scale; several for the sweep")
    add("--batch-size", type=int, help="images a model call; does not change the images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--json", type=Path, metavar="FILE", help="also write the figures here (without --out)")
    drawing = parser.add_argument_group("drawing into a folder")
    add = drawing.add_argument
    add("--out", type=Path, metavar="FOLDER", help="where images and figures.json go")
    add("--labels", type=int, nargs="+", help="classes, in turn (all of them)")
    add("--prompts", type=Path, metavar="FILE", help="captions, one a line, in turn")
    add("--first-seed", type=int, default=0, help="image i has seed FIRST_SEED + i (0)")
    add("--steps", type=int, help="sampling steps")
    add("--sampler", help="euler or heun for flow, ddim or ddpm for ddpm")
    add("--vae", metavar="FOLDER", help="the VAE of a model of latents")
    add("--processes", type=int, default=1, help="processes to start here (1); or use torchrun")
    add("--chunk", type=int, default=64, help="images a chunk, written when they are done (64)")
    add("--geneval", type=Path, metavar="METADATA", help="GenEval's evaluation_metadata.jsonl")
    add("--images-per-prompt", type=int, default=4, help="images of each GenEval prompt (4)")
    figures = parser.add_argument_group("figures of samples.npz")
    add = figures.add_argument
    add("--inception", type=Path, metavar="PATH", help="torch-fidelity's Inception weights")
    add("--reference", type=Path, metavar="PATH", help="ADM reference .npz, or folder of images")
    add("--clip", type=Path, metavar="PATH", help="folder of a transformers CLIP model")
    add("--figure-batch-size", type=int, default=50, help="images a call of these networks (50)")
    return parser


if __name__ == "__main__":
    main()
