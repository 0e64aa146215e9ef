"""Make a folder of a run's averaged model, to keep, share and load without the run.

``python -m dit_models.export RUN_DIR OUT`` writes config.json, safetensors and a model card;
``--pipeline`` writes a folder in the layout of diffusers' pipelines instead. The weights go from
file to file a few rows at a time, also those of a run of many processes, so that a model need not
fit into memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dit_models.assemble import build_text_encoder, model_config_for, with_defaults
from dit_models.card import model_card
from dit_models.checkpoint_weights import check_fit, stored_weights
from dit_models.conditioned import ConditionedModel
from dit_models.config import TrainConfig
from dit_models.config_io import load_config
from dit_models.data import DatasetInfo
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.parallel.checkpoint_files import joined_entry
from dit_models.pretrained import (
    CARD_NAME,
    CONFIG_NAME,
    MODEL_STEM,
    TEXT_STEM,
    Pretrained,
    is_pretrained,
    new_folder,
    preset_of_size,
)
from dit_models.run_folder import CONFIG_NAME as RUN_CONFIG_NAME
from dit_models.run_folder import load_info, verified_checkpoint
from dit_models.tensor_files import MAX_SHARD_BYTES, TensorEntry, write_sharded
from dit_models.train import run_command

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    run_dir: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    id2label: dict[int, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Pretrained:
    """Write the averaged weights of a run's newest checkpoint as a folder of its own.

    Args:
        run_dir: folder of a run.
        out: the folder to make.
        dtype: of the parameters: "fp32" (as trained), "fp16" or "bf16".
        id2label: names of the classes.
        max_shard_bytes: weights above it go into several files; 0 = one file however large.

    Returns:
        What ``config.json`` says.

    Raises:
        ValueError: ``out`` exists, ``run_dir`` is no run, or an unknown dtype.
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}; expected one of {', '.join(DTYPES)}.")
    if out.exists():
        raise ValueError(f"{out} exists; choose another name. Nothing was written.")
    if is_pretrained(run_dir):
        raise ValueError(f"{run_dir} is an exported or converted model already.")
    if max_shard_bytes < 0:
        raise ValueError(f"--max-shard-bytes {max_shard_bytes}; expected 0 or more.")
    train = with_defaults(load_config(run_dir / RUN_CONFIG_NAME))
    checkpoint, step = verified_checkpoint(run_dir)
    info = load_info(run_dir)
    config = model_config_for(train, info)
    model = _without_weights(train, info, config)
    weights = stored_weights(checkpoint, "ema")
    check_fit(checkpoint, weights, model)
    if id2label is not None and set(id2label) != set(range(config.num_classes)):
        raise ValueError(
            f"{len(id2label)} class names for {config.num_classes} classes; give one for each."
        )
    described = Pretrained(config, train, info, step, preset_of_size(config), id2label)
    state = model.state_dict(keep_vars=True)

    def entry(name: str) -> TensorEntry:
        # What routers count and average in buffers stays exact.
        cast = DTYPES[dtype] if isinstance(state[name], nn.Parameter) else weights[name].dtype
        return joined_entry(weights[name], cast)

    with new_folder(out) as folder:
        for stem, part in ((MODEL_STEM, "backbone."), (TEXT_STEM, "text_encoder.")):
            entries = {
                name.removeprefix(part): entry(name) for name in state if name.startswith(part)
            }
            if entries:
                write_sharded(folder, stem, entries, max_shard_bytes or sys.maxsize)
        (folder / CONFIG_NAME).write_text(described.to_json())
        origin = {"weights": f"averaged (EMA), {dtype}", "trained on": info.name}
        (folder / CARD_NAME).write_text(model_card(out, described, origin))
    return described


def _without_weights(
    train: TrainConfig, info: DatasetInfo, config: ModelConfig
) -> ConditionedModel:
    encoder = build_text_encoder(train, info, config.text_dim) if config.text_dim else None
    return ConditionedModel(build_model(config, device="meta"), encoder)


def read_labels(path: Path) -> dict[int, str]:
    """Class names, one a line, class 0 first.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return dict(enumerate(path.read_text().splitlines()))
    except OSError as error:
        raise ValueError(f"--labels {path} cannot be read: {error}") from error


def _command(options: argparse.Namespace) -> None:
    labels = read_labels(options.labels) if options.labels else None
    limit = MAX_SHARD_BYTES if options.max_shard_bytes is None else options.max_shard_bytes
    if not options.pipeline:
        described = export(
            options.run_dir,
            options.out,
            dtype=options.dtype,
            id2label=labels,
            max_shard_bytes=limit,
        )
        print(f"{options.out}: {described.preset or described.model.family}, step {described.step}")
        return
    if options.max_shard_bytes is not None:
        raise ValueError("--max-shard-bytes has no effect on --pipeline; leave one of them out.")
    from dit_models.pipelines.loading import pipeline_class

    if options.out.exists():
        raise ValueError(f"{options.out} exists; choose another name. Nothing was written.")
    with new_folder(options.out) as folder:
        model_folder = folder / "model"
        described = export(options.run_dir, model_folder, dtype=options.dtype, id2label=labels)
        pipeline = pipeline_class(described.model).from_pretrained(model_folder)
        pipeline.save_pretrained(folder)
        (model_folder / CARD_NAME).rename(folder / CARD_NAME)
        for path in model_folder.iterdir():
            path.unlink()
        model_folder.rmdir()
    print(f"{options.out}: {type(pipeline).__name__}, step {described.step}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dit_models.export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, e.g. runs/digits")
    parser.add_argument("out", type=Path, help="folder to make; never overwritten")
    parser.add_argument("--dtype", default="fp32", help="fp32 (as trained), fp16 or bf16")
    parser.add_argument("--labels", type=Path, help="file of class names, one a line")
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        metavar="N",
        help=f"larger weights go into several files ({MAX_SHARD_BYTES}); 0 = always one file",
    )
    parser.add_argument("--pipeline", action="store_true", help="in diffusers' pipeline layout")
    options = parser.parse_args(arguments)
    run_command(lambda: _command(options))


if __name__ == "__main__":
    main()
