"""Plan a training run on many GPUs: memory of each, bytes over each link, time, the mesh to take.

    python -m dit_models.plan --model EC-DiT-M-64E --gpus 256 --gpu-memory 80

Nothing is built or trained. Rates are your assumptions; docs/scaling.md has the formulae.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_models.model_config import ModelConfig
from dit_models.models import get_config
from dit_models.plan.report import as_json, as_text
from dit_models.plan.settings import OPTIMIZERS, PRECISIONS, Cluster, Run
from dit_models.plan.tables import plan, write_tables
from dit_models.train import run_command

LISTED = 12
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Cluster)}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_models.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a preset of python -m dit_models.models")
    parser.add_argument("--gpus", type=int, help="GPUs in all")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one, 10^9 bytes")
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the preset, e.g. image_size=64; may be repeated",
    )
    parser.add_argument("--batch-size", type=int, help="images a step, over all GPUs")
    parser.add_argument("--images-per-gpu", type=int, help="instead; default 32 a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto",
                        help="recompute blocks in backward; auto compares both")  # fmt: skip
    parser.add_argument(
        "--reshard-after-forward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="free gathered weights between forward and backward",
    )
    parser.add_argument("--imbalance", type=float, default=1.0,
                        help="rows of the fullest owner of experts over the mean")  # fmt: skip
    parser.add_argument("--text-len", type=int, default=77, help="text tokens of a caption")
    parser.add_argument("--gpus-per-node", type=int, default=DEFAULTS["gpus_per_node"])
    for name, words in _RATES.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=DEFAULTS[name], help=words)
    parser.add_argument("--across-nodes", action="store_true",
                        help="also experts that several nodes share")  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"list more than {LISTED} plans")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")
    parser.add_argument("--tables", type=Path, metavar="PAGE",
                        help="instead: bring the tables of docs/scaling.md up to date")  # fmt: skip
    return parser


_RATES = {
    "nvlink_gb_s": "GB/s of a GPU and direction inside a node",
    "network_gb_s": "GB/s of a GPU and direction between nodes",
    "tflops": "peak of a GPU in the precision of the run",
    "utilization": "share of the peak that is reached",
    "reserve": "share of the memory to leave free",
}


def run(options: argparse.Namespace) -> None:
    """Do what the options say.

    Raises:
        ValueError: an option that is missing, unknown or out of range.
    """
    if options.tables is not None:
        write_tables(options.tables)
        print(f"wrote the tables of {options.tables}")
        return
    for name in ("model", "gpus", "gpu_memory"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; see --help.")
    cluster = Cluster(
        options.gpus,
        options.gpu_memory,
        gpus_per_node=options.gpus_per_node,
        **{name: getattr(options, name) for name in _RATES},
    )
    wanted = Run(
        model_of(options.model, options.model_option),
        images_per_gpu=_images_per_gpu(options),
        accumulate=options.accumulate,
        precision=options.precision,
        optimizer=options.optimizer,
        ema=options.ema,
        reshard_after_forward=options.reshard_after_forward,
        imbalance=options.imbalance,
        text_len=options.text_len,
    )
    recompute = {"auto": (False, True), "on": (True,), "off": (False,)}[options.checkpointing]
    estimates = [
        each
        for each in plan(wanted, cluster, across_nodes=options.across_nodes)
        if each.recompute in recompute
    ]
    if options.json:
        print(as_json(wanted, cluster, estimates, options.model))
    else:
        limit = None if options.all else LISTED
        print(as_text(wanted, cluster, estimates, options.model, limit))


def model_of(name: str, words: Sequence[str]) -> ModelConfig:
    """A preset with fields changed by ``key=value`` words.

    Raises:
        ValueError: unknown preset or field, or a value that the field does not take.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--model-option {word!r}; expected key=value, e.g. image_size=64.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return ModelConfig.from_dict(get_config(name).to_dict() | options)


def _images_per_gpu(options: argparse.Namespace) -> int:
    if options.batch_size is None:
        return 32 if options.images_per_gpu is None else options.images_per_gpu
    if options.images_per_gpu is not None:
        raise ValueError("--batch-size and --images-per-gpu were given; give one of them.")
    parts = options.gpus * options.accumulate
    if options.batch_size < 1 or parts < 1 or options.batch_size % parts:
        raise ValueError(
            f"--batch-size {options.batch_size} is not a positive multiple of {options.gpus} GPUs "
            f"times {options.accumulate} micro-batches."
        )
    return int(options.batch_size // parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = build_parser().parse_args(arguments)
    run_command(lambda: run(options))


if __name__ == "__main__":
    main()
