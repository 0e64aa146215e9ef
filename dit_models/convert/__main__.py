"""Convert checkpoints of DiT-MoE, DiT and diffusers' DiT into a folder of ours, and back."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dit_models.convert import FORMATS, Choices, convert, restore
from dit_models.convert.forward import OBJECTIVES
from dit_models.export import read_labels
from dit_models.train import run_command

_FORWARD_ONLY = (
    "objective",
    "weights",
    "num_heads",
    "top_k",
    "time_frequency_shift",
    "labels",
    "vae",
)


def _convert(options: argparse.Namespace) -> None:
    if options.to:
        raise ValueError(f"--to {options.to} goes with --back.")
    done = convert(
        options.source,
        options.out,
        objective=options.objective,
        weights=options.weights,
        choices=Choices(options.num_heads, options.top_k, options.time_frequency_shift),
        id2label=read_labels(options.labels) if options.labels else None,
        vae=options.vae,
    )
    model, train = done.model, done.described.train
    print(f"found      {FORMATS[done.format].title}")
    print(f"size       {done.described.preset or 'no preset'}: {model.depth} blocks of width "
          f"{model.hidden_size}, {model.num_heads} heads")  # fmt: skip
    if model.num_experts:
        print(f"experts    {model.num_experts}, top {model.top_k}")
    print(f"latents    {model.in_channels} x {model.image_size} x {model.image_size}, "
          f"{model.out_channels} output channels, {model.num_classes} classes")  # fmt: skip
    print(f"objective  {train.objective.kind}")
    for note in done.notes:
        print(f"note       {note}")
    print(f"written    {options.out}")


def _back(options: argparse.Namespace) -> None:
    for name in _FORWARD_ONLY:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --back.")
    name = restore(options.source, options.out, to=options.to)
    print(f"written    {options.out}, {FORMATS[name].title}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dit_models.convert", description=__doc__)
    parser.add_argument("source", type=Path, help=".pt or safetensors file, or diffusers folder; "
                        "with --back a folder of ours")  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to make; with --back the file (or, for "
                        "diffusers, the folder) to make; never overwritten")  # fmt: skip
    parser.add_argument("--back", action="store_true", help="from ours to the other format")
    parser.add_argument("--to", choices=FORMATS, help="with --back: another format than it had")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what it was trained with, where "
                        "the published models of its structure are something else")  # fmt: skip
    parser.add_argument("--weights", help="entry of a .pt container: ema, else model, else module, "
                        "else the file itself")  # fmt: skip
    parser.add_argument("--num-heads", type=int, help="attention heads of an unpublished size")
    parser.add_argument("--top-k", type=int, help="experts a token takes (2)")
    parser.add_argument("--time-frequency-shift", type=int, choices=(0, 1), help="diffusers: 1 "
                        "computes as diffusers does, 0 as DiT's own code (1)")  # fmt: skip
    parser.add_argument("--labels", type=Path, help="file of class names, one a line")
    parser.add_argument("--vae", help="folder of its VAE, for every command that draws from it")
    options = parser.parse_args(arguments)
    run_command(lambda: _back(options) if options.back else _convert(options))


if __name__ == "__main__":
    main()
