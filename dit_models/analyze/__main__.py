"""Draw from a trained model and show what its routers did: figures, arrays and a page."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dit_models.analyze.collect import collect
from dit_models.analyze.report import check_out, describe, write_report
from dit_models.analyze.subjects import choose_subjects
from dit_models.drawing import Artist
from dit_models.extras import require
from dit_models.interrupt import StopRequest
from dit_models.run_folder import LoadedRun, load_run
from dit_models.train import run_command
from dit_models.vae import VAE, why_no_vae


def analyze(options: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit status."""
    check_out(options.out, options.overwrite)
    run = load_run(options.run, options.device)
    changes = {
        "sampler": options.sampler,
        "num_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    artist = replace(run.artist, sampling=replace(run.artist.sampling, **given))
    artist = replace(artist, decode=choose_decoder(run, artist, options.vae))
    subjects = choose_subjects(
        run, options.labels, options.captions, options.captions_file, options.images_per_class
    )
    bar = require("tqdm.auto", extra="train").tqdm(
        total=len(subjects.prompts) * artist.sampling.num_steps,
        desc=f"drawing {len(subjects.prompts)} images", unit="step", dynamic_ncols=True,
    )  # fmt: skip
    with StopRequest() as stop, bar:
        analysis = collect(
            artist,
            subjects,
            seed=options.seed,
            batch_size=options.batch_size,
            shown=options.show,
            shown_steps=options.show_steps,
            stopping=lambda: stop.signal_number is not None,
            progress=bar.update,
        )
    status = 0 if stop.signal_number is None else 128 + stop.signal_number
    if analysis is None:
        print("Stopped before the first batch was done; nothing is written.")
        return status
    if not analysis.complete:
        print(f"Stopped: the {analysis.counts.num_images} images of whole batches are counted.")
    elif status:
        print("The signal came after the last batch: the analysis is complete.")
    write_report(options.out, analysis, describe(options.run, run, artist, options.seed))
    print(f"figures            {options.out}/*.png, with their numbers in *.npz")
    print(f"page               {options.out / 'index.html'}")
    print(f"summary            {options.out / 'summary.json'}")
    return status


def choose_decoder(
    run: LoadedRun, artist: Artist, vae: str | None
) -> Callable[[Tensor], Tensor] | None:
    """What makes pictures of latents; without a VAE routing is counted all the same."""
    if vae is not None:
        return VAE(vae, artist.device).decode
    reason = why_no_vae(run.info.vae, run.config.data.vae)
    if reason is None and (artist.decode is not None or artist.image_shape[0] in (1, 3)):
        return artist.decode
    print(f"Pictures show the first channel of latents: {reason or 'no --vae is given'}")
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dit_models.analyze", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run or of a saved model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--overwrite", action="store_true", help="replace an analysis in --out")
    parser.add_argument(
        "--images-per-class", type=int, default=50,
        help="images of each class or caption (50, as in the DiT-MoE paper)",
    )  # fmt: skip
    parser.add_argument("--labels", type=int, nargs="+", help="these classes only")
    parser.add_argument("--captions", nargs="+", help="captions, each a group of its own")
    parser.add_argument(
        "--captions-file", type=Path,
        help="a caption a line; GROUP, a tab and the caption to count several together",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="sampling steps (the paper's figures: 250)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    parser.add_argument("--sampler", help="euler or heun for flow, ddim or ddpm for ddpm")
    parser.add_argument("--batch-size", type=int, default=32, help="images drawn at a time (32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (0)")
    parser.add_argument("--show", type=int, default=4, help="images of the page and heat maps (4)")
    parser.add_argument(
        "--show-steps", type=int, default=25, help="at most so many of the steps (25)"
    )
    parser.add_argument("--vae", metavar="FOLDER", help="the VAE of a model of latents")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    run_command(lambda: analyze(options))


if __name__ == "__main__":
    main()
