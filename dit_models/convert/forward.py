"""From a checkpoint of others to a folder of ours."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_models.card import model_card
from dit_models.config import DataConfig, ObjectiveConfig, SamplingConfig, TrainConfig
from dit_models.convert.formats import recognise
from dit_models.convert.layout import (
    Choices,
    Format,
    check_copies,
    check_source,
    is_float,
    joined,
)
from dit_models.convert.positions import check_positions
from dit_models.convert.source import Source, open_source
from dit_models.data import DatasetInfo
from dit_models.model_config import ModelConfig
from dit_models.pretrained import (
    CARD_NAME,
    CONFIG_NAME,
    MODEL_STEM,
    Pretrained,
    new_folder,
    preset_of_size,
)
from dit_models.tensor_files import MAX_SHARD_BYTES, entry_of, write_safetensors, write_sharded
from dit_models.vae import VAE

RECORD_NAME = "conversion.json"
# What is needed for going back and is no weight of ours.
KEPT_NAME = "source.safetensors"
OBJECTIVES = ("ddpm", "flow")


@dataclass(frozen=True)
class Conversion:
    """What was found and written.

    Attributes:
        format: name of the source's format.
        model: shape of the model.
        described: the whole configuration.
        notes: what the user should know, a line each.
    """

    format: str
    model: ModelConfig
    described: Pretrained
    notes: tuple[str, ...]


def convert(
    source_path: Path,
    out: Path,
    *,
    objective: str | None = None,
    weights: str | None = None,
    choices: Choices | None = None,
    id2label: dict[int, str] | None = None,
    vae: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Convert a checkpoint of DiT-MoE, DiT or diffusers' DiT into a folder of ours.

    Bytes are copied from file to file in blocks of 16 MiB, whatever the size of the checkpoint.
    Everything is checked before anything is written.

    Args:
        source_path: a ``.pt`` or safetensors file, or a diffusers folder.
        out: the folder to make.
        objective: "ddpm" or "flow"; ``None`` takes the one that the published weights of this
            structure have (see ``guess_objective``).
        weights: entry of a ``.pt`` container, instead of the first of ema, model, module.
        choices: what the weights do not say.
        id2label: names of the classes.
        vae: folder of the VAE that makes images of its latents, to be kept in the configuration.
        max_shard_bytes: weights above this size are written in several files.

    Raises:
        ValueError: an unknown format, a tensor missing, unknown or of another shape, positions
            other than DiT's, or ``out`` exists. Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another name. Nothing was written.")
    source = open_source(source_path, weights)
    where = str(source.path)
    found = recognise(source.tensors, where)
    model, variant = found.describe(source.tensors, source.config, choices or Choices())
    layout = found.layout(model, variant)
    check_source(source.tensors, layout, where)
    check_copies(source.tensors, layout, where)
    if other := sorted({str(t.dtype) for t in source.tensors.values() if not is_float(t.dtype)}):
        raise ValueError(
            f"{where}: tensors of {', '.join(other)}; expected floating point weights."
        )
    kept, difference = None, 0.0
    if layout.positions is not None:
        kept, difference = check_positions(source.tensors, layout.positions, model, where)

    objective_taken = objective or guess_objective(model)
    described = _describe(model, objective_taken, out.name, id2label, _vae_of(vae, model))
    record = _record(source, found, variant, layout.positions is not None and kept is not None)
    origin = _origin(record)
    notes = _notes(source, model, objective, difference, kept is not None)
    with new_folder(out) as folder:
        write_sharded(folder, MODEL_STEM, joined(source.tensors, layout, model), max_shard_bytes)
        if kept is not None:
            assert layout.positions is not None
            write_safetensors(folder / KEPT_NAME, {layout.positions.name: entry_of(kept)})
        (folder / CONFIG_NAME).write_text(described.to_json())
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
        (folder / CARD_NAME).write_text(model_card(out, described, origin))
    return Conversion(found.name, model, described, notes)


def guess_objective(model: ModelConfig) -> str:
    """What the published weights of this structure were trained with.

    Equal input and output channels are rectified flow: a DDPM of DiT has as many again for the
    variance. With twice the channels, DiT and DiT-MoE's S and B are DDPM; DiT-MoE's XL and G, which
    have a query and key norm, are rectified flow whose second half is not used.
    """
    if model.out_channels == model.in_channels or (model.family == "dit_moe" and model.qk_norm):
        return "flow"
    return "ddpm"


def _describe(
    model: ModelConfig,
    objective: str,
    name: str,
    id2label: dict[int, str] | None,
    vae: dict[str, Any] | None,
) -> Pretrained:
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective}; expected one of {', '.join(OBJECTIVES)}.")
    if id2label is not None and set(id2label) != set(range(model.num_classes)):
        raise ValueError(
            f"{len(id2label)} class names for {model.num_classes} classes; give one for each, "
            "numbered from 0."
        )
    preset = preset_of_size(model)
    learned = model.out_channels == 2 * model.in_channels
    # As the papers sample: DDPM with 250 steps and guidance on 3 of 4 channels, flow with 50.
    if objective == "ddpm":
        channels = 3 if model.in_channels == 4 else None
        sampling = SamplingConfig("ddpm", 250, 1.5, guidance_channels=channels)
    else:
        sampling = SamplingConfig("euler", 50, 1.5)
    info = DatasetInfo(
        name, model.image_size, model.in_channels, model.num_classes, has_captions=False, vae=vae
    )
    train = TrainConfig(
        name=name,
        model=preset or "",
        data=DataConfig(name=name),
        objective=ObjectiveConfig(objective, learned_sigma=learned),
        sampling=sampling,
    )
    return Pretrained(model, train.validate(), info, preset=preset, id2label=id2label)


def _vae_of(path: str | None, model: ModelConfig) -> dict[str, Any] | None:
    if path is None:
        return None
    folder = str(Path(path).resolve()) if Path(path).exists() else path
    info = VAE(folder).info
    if info.latent_channels != model.in_channels:
        raise ValueError(
            f"--vae {path} has latents of {info.latent_channels} channels; the model reads "
            f"{model.in_channels}."
        )
    return asdict(info)


def _record(
    source: Source, found: Format, variant: dict[str, Any], kept_positions: bool
) -> dict[str, Any]:
    names = [name for name in source.tensors if name == "pos_embed"]
    return {
        "format": found.name,
        "variant": variant,
        "container": source.container,
        "left_out": list(source.left_out),
        "positions": {
            "kept": kept_positions,
            "dtype": str(source.tensors[names[0]].dtype).removeprefix("torch."),
        }
        if names
        else None,
        "source": source.path.name,
        "sha256": source.sha256(),
    }


def _origin(record: dict[str, Any]) -> dict[str, str]:
    origin = {"converted from": record["source"], "format": record["format"]}
    if record["container"]:
        origin["entry"] = record["container"]
    return origin | {f"sha256 of {name}": digest for name, digest in record["sha256"].items()}


def _notes(
    source: Source, model: ModelConfig, objective: str | None, difference: float, kept: bool
) -> tuple[str, ...]:
    notes = []
    if source.left_out:
        notes.append(f"left out, not weights that are sampled: {', '.join(source.left_out)}")
    if kept:
        notes.append(f"its positions differ from the exact ones by up to {difference:.2g}; "
                     f"ours are exact, its own are kept in {KEPT_NAME} for going back")  # fmt: skip
    if objective is None and model.out_channels != model.in_channels:
        notes.append("the weights do not say the objective: that of the published models of this "
                     "structure is taken (--objective sets it)")  # fmt: skip
    if model.time_frequency_shift:
        notes.append("timestep frequencies as diffusers computes them; weights that were trained "
                     "with DiT's own code saw others (--time-frequency-shift 0)")  # fmt: skip
    eps = source.config.get("norm_eps", 1e-5) if source.config else 1e-6
    if eps != 1e-6:
        notes.append(f"diffusers' second norm of a block adds {eps:g}, ours 1e-06 as DiT's code")
    return tuple(notes)
