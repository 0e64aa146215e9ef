"""Encode images and captions once, for training that only reads them.

    python -m dit_models.precompute SOURCE OUT --image-size 256 --vae FOLDER --text FOLDER
    python -m dit_models.precompute digit-scenes OUT            # embedded data, as pixels
    python -m dit_models.precompute --verify OUT
    python -m dit_models.train --recipe captions data.name=OUT

SOURCE is a folder of images (one sub-folder a class, or metadata.jsonl with captions), WebDataset
tar files (a folder, a file, or train-{0000..0146}.tar), a Hugging Face data set (saved to disk,
parquet files, or a name), digits or digit-scenes. The same command goes on where one was cut off.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dit_models.precompute.folder import verify
from dit_models.precompute.run import precompute
from dit_models.precompute.settings import CONDITIONS, KINDS, LATENT_KINDS, Settings
from dit_models.text import DTYPES
from dit_models.train import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_models.precompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="?", help="where the images come from")
    add("out", nargs="?", type=Path, help="folder that is filled; new, or of the same command")
    add("--verify", type=Path, metavar="OUT", help="check every file of a finished folder")
    add("--kind", choices=KINDS, default="auto", help="what SOURCE is, where that is not clear")
    add("--split", default="train", help="split of the source: train, heldout, ... (train)")
    add("--image-size", type=int, help="side in pixels: the centre square, resized")
    add("--flip", action="store_true", help="also store mirrored images, for data.flip=true")
    add("--conditions", choices=CONDITIONS, default="auto",
        help="tars and Hugging Face data with both: labels or captions (labels)")  # fmt: skip
    add("--image-column", default="", help="Hugging Face data: column of the images")
    add("--label-column", default="", help="Hugging Face data: column of the classes")
    add("--caption-column", default="", help="Hugging Face data: column of the captions")
    add("--subset", default="", help="Hugging Face data by name: its configuration")
    add("--vae", default="none", help="folder of an AutoencoderKL; none stores pixels")
    add("--vae-dtype", choices=list(DTYPES), default="fp32", help="of the VAE's computation")
    add("--latents", choices=LATENT_KINDS, default="moments",
        help="moments: mean and standard deviation, training draws a fresh latent each time; "
        "mean; or sample: one drawn latent (moments)")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="fp16", help="of stored images (fp16)")
    add("--text", default="none", help="folder or name of a text encoder; none stores captions")
    add("--text-revision", default="main", help="branch, tag or commit of an encoder's name")
    add("--text-length", type=int, help="longest text in tokens (77)")
    add("--text-layer", type=int, help="hidden state that is stored: -1 the last (-1)")
    add(
        "--text-dtype", choices=list(DTYPES), default="fp32", help="of the encoder and its features"
    )
    add("--shard-size", type=int, default=2048, help="samples a file (2048)")
    add("--batch-size", type=int, default=16, help="images that are encoded at once (16)")
    add("--seed", type=int, default=0, help="of drawn latents and of digit-scenes' positions (0)")
    add("--skip-broken", action="store_true", help="leave out samples that cannot be read, and "
        "list them in the manifest")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1; auto deals GPUs to processes")
    add("--processes", type=int, default=1, help="each makes a share of the files (1)")
    options = parser.parse_args(arguments)
    run_command(lambda: _run(options), "; the same command goes on where it stopped")


def _run(options: argparse.Namespace) -> int:
    values = vars(options)
    checked = values.pop("verify")
    if checked is not None:
        if options.source is not None:
            raise ValueError("--verify takes one folder and nothing else.")
        return _verify(checked)
    if options.source is None or options.out is None:
        raise ValueError("expected SOURCE and OUT; see --help.")
    manifest = precompute(Settings(**values))
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{manifest['samples']} samples in {len(manifest['shards'])} files, {size / 1e6:.1f} MB: "
          f"{options.out}")  # fmt: skip
    if skipped := [line for shard in manifest["shards"] for line in shard["skipped"]]:
        print(f"{len(skipped)} samples were left out (see latents.json); the first: {skipped[0]}")
    print(f"Train on them: python -m dit_models.train --recipe ... data.name={options.out}")
    return 0


def _verify(out: Path) -> int:
    wrong = verify(out)
    for line in wrong:
        print(line)
    if wrong:
        print("Delete these files and run the command that made the folder: it makes them again.")
        return 1
    print(f"{out}: every file is as it was written.")
    return 0


if __name__ == "__main__":
    main()
