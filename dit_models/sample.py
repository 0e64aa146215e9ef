"""Draw images from a trained run: ``python -m dit_models.sample runs/digits --labels 3 7``."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dit_models.drawing import Prompts, example_prompts
from dit_models.panels import record_routing, save_expert_load, save_experts_per_token, save_grid
from dit_models.run_folder import NEEDS_VAE, LoadedRun, load_run
from dit_models.train import run_command
from dit_models.vae import VAE


def choose_prompts(
    run: LoadedRun, labels: Sequence[int] | None, captions: Sequence[str] | None, count: int
) -> Prompts:
    """The prompts of the command line, repeated up to ``count``.

    Raises:
        ValueError: labels for a caption model or the reverse, or a label out of range.
    """
    num_classes = run.artist.model.backbone.config.num_classes
    if labels and not num_classes:
        raise ValueError(f"--labels {list(labels)}: this model reads captions; use --captions.")
    if captions and num_classes:
        raise ValueError(f"--captions {list(captions)}: this model reads labels; use --labels.")
    if labels:
        if wrong := [label for label in labels if not 0 <= label < num_classes]:
            raise ValueError(f"--labels {wrong}: expected 0 to {num_classes - 1}.")
        return Prompts(torch.tensor([labels[i % len(labels)] for i in range(count)]), None)
    if captions:
        return Prompts(None, [captions[i % len(captions)] for i in range(count)])
    return example_prompts(run.info, run.config.data, count)


def sample(options: argparse.Namespace) -> None:
    """Draw what the command line asks for and write the grid."""
    panels = {
        options.out.with_name(f"{options.out.stem}_{suffix}.png"): save
        for suffix, save in (
            ("expert_load", save_expert_load),
            ("experts_per_token", save_experts_per_token),
        )
        if options.routing
    }
    for path in (options.out, *panels):
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists; choose another --out, or add --overwrite.")
    for name in ("count", "columns"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}; expected at least 1.")
    run = load_run(options.run_dir, options.device)
    if options.routing and not run.artist.model.backbone.config.num_experts:
        raise ValueError("--routing: this model has no MoE layers.")
    changes = {
        "sampler": options.sampler,
        "num_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    artist = replace(run.artist, sampling=replace(run.artist.sampling, **given))
    if options.vae is not None:
        artist = replace(artist, decode=VAE(options.vae, artist.device).decode)
    elif run.info.vae is None and run.info.channels not in (1, 3):
        raise ValueError(NEEDS_VAE.format(channels=run.info.channels))
    prompts = choose_prompts(run, options.labels, options.captions, options.count)
    seeds = list(range(options.seed, options.seed + options.count))
    images = artist.draw(prompts, seeds)
    save_grid(options.out, images, min(options.columns, options.count))
    step = f" at step {run.step}" if run.step else ""
    print(f"{options.count} images{step}: {options.out}")
    if options.routing:
        record = record_routing(artist, prompts, seeds)
        assert record is not None
        for path, save in panels.items():
            save(path, record)
            print(f"routing: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dit_models.sample", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run (runs/digits), or "
                        "of an exported or converted model")  # fmt: skip
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, in turn")
    parser.add_argument("--captions", nargs="+", help="captions to draw, in turn")
    parser.add_argument("--count", type=int, default=40, help="number of images (40)")
    parser.add_argument("--columns", type=int, default=10, help="columns of the grid (10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (0)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--sampler", help="euler or heun for flow, ddim or ddpm for ddpm")
    parser.add_argument("--vae", help="folder of the VAE of a model of latents")
    parser.add_argument("--routing", action="store_true", help="also write the routing panels")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    run_command(lambda: sample(options))


if __name__ == "__main__":
    main()
