"""A folder with a model and all that is needed to draw from it.

=======================  ===========================================================================
``config.json``          shape of the model, objective, sampling, what it is conditioned on
``model.safetensors``    weights of the backbone, named as ``build_model(...).state_dict()`` names
                         them; above 5 GB in shards with ``model.safetensors.index.json``
``text_encoder.*``       weights of a text encoder that was trained with the model, if there is one
``README.md``            model card
=======================  ===========================================================================

``python -m dit_models.export`` makes one of a run, ``python -m dit_models.convert`` of weights of
others. ``load_run`` reads them, so every command that takes a run takes such a folder.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_models.assemble import build_text_encoder
from dit_models.atomic import fsync_path
from dit_models.conditioned import ConditionedModel
from dit_models.config import TrainConfig
from dit_models.data import DatasetInfo
from dit_models.extras import require
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.presets import PRESETS
from dit_models.tensor_files import StoredTensor, check_names, read_sharded

FORMAT = "dit_models"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
MODEL_STEM = "model"
TEXT_STEM = "text_encoder"


@dataclass(frozen=True)
class Pretrained:
    """What ``config.json`` says.

    Attributes:
        model: shape of the backbone.
        train: objective, sampling, text encoder, and for a trained model how it was trained.
        info: what the model draws: size, channels, classes or captions.
        step: training steps; 0 where that is not known.
        preset: name of the preset whose size it has, if any.
        id2label: names of the classes, if they are known.
    """

    model: ModelConfig
    train: TrainConfig
    info: DatasetInfo
    step: int = 0
    preset: str | None = None
    id2label: dict[int, str] | None = None

    def to_json(self) -> str:
        """The content of ``config.json``."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, indent=2) + "\n"


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of this format."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_pretrained(folder: Path) -> Pretrained:
    """Read ``config.json``.

    Raises:
        ValueError: it is missing, damaged, or of a newer format.
    """
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text())
        if values.get("format") != FORMAT:
            raise ValueError(f'it has no "format": "{FORMAT}"')
        if values["format_version"] != FORMAT_VERSION:
            version = values["format_version"]
            raise ValueError(f"format version {version}; this program reads {FORMAT_VERSION}")
        labels = values["id2label"]
        return Pretrained(
            ModelConfig.from_dict(values["model"]),
            _train_config(values["train"]),
            DatasetInfo(**values["info"]),
            values["step"],
            values["preset"],
            None if labels is None else {int(key): name for key, name in labels.items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the configuration of an exported or converted model: {error}"
        ) from error


def _train_config(values: dict[str, Any]) -> TrainConfig:
    omegaconf = require("omegaconf", extra="train")
    try:
        merged = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(TrainConfig()), values)
        config: TrainConfig = omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return config.validate()


def load_pretrained(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ConditionedModel:
    """The model of a folder, in eval mode and without gradients.

    Args:
        folder: what ``export`` or ``convert`` wrote.
        device: where its weights go, a tensor after the other.
        dtype: of its weights; ``None`` = as stored.

    Raises:
        ValueError: the folder is damaged, or its weights do not fit its configuration.
    """
    described = read_pretrained(folder)
    stored = read_sharded(folder, MODEL_STEM)
    common = Counter(tensor.dtype for tensor in stored.values()).most_common(1)[0][0]
    backbone = build_model(described.model, device="meta", dtype=dtype or common)
    backbone.to_empty(device=device)
    fill(backbone, stored, str(folder), dtype)
    encoder = None
    if described.model.text_dim:
        encoder = build_text_encoder(described.train, described.info, described.model.text_dim)
        encoder.to(device=device, dtype=dtype)
        if encoder.state_dict():
            tensors = read_sharded(folder, TEXT_STEM)
            try:  # which also compares a pretrained encoder with that of the training
                encoder.load_state_dict({name: value.read() for name, value in tensors.items()})
            except RuntimeError as error:
                raise ValueError(f"{folder}: {TEXT_STEM} does not fit: {error}") from error
    return ConditionedModel(backbone, encoder).eval().requires_grad_(False)


def fill(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    where: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Read the weights of ``module`` in place, parameters in ``dtype`` and the rest as stored.

    Raises:
        ValueError: lists names or shapes that do not fit.
    """
    state = module.state_dict(keep_vars=True)
    check_names(stored, state, where)
    for name, target in state.items():
        if stored[name].shape != tuple(target.shape):
            raise ValueError(
                f"{where}: {name} has shape {list(stored[name].shape)}; the configuration asks for "
                f"{list(target.shape)}."
            )
        asked = dtype if isinstance(target, nn.Parameter) else None
        target.data = stored[name].read().to(target.device, asked or stored[name].dtype)
    tell_buffers(module)


def tell_buffers(module: nn.Module) -> None:
    """Let modules see buffers that were filled in place: some keep a copy on the host.

    They take it in ``load_state_dict``, as when a checkpoint is loaded.
    """
    state = module.state_dict(keep_vars=True)
    buffers = {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}
    if buffers:
        module.load_state_dict({name: value.clone() for name, value in buffers.items()}, False)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends well, and is removed else.

    Raises:
        ValueError: ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name. Nothing was written.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            fsync_path(path)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def preset_of_size(config: ModelConfig) -> str | None:
    """The preset with the blocks of ``config``; channels, classes and timesteps may differ."""
    free = {"in_channels", "out_channels", "image_size", "num_classes", "time_scale",
            "time_frequency_shift", "qk_norm"}  # fmt: skip

    def size(model: ModelConfig) -> dict[str, Any]:
        return {name: value for name, value in model.to_dict().items() if name not in free}

    return next((name for name, preset in PRESETS.items() if size(preset) == size(config)), None)
