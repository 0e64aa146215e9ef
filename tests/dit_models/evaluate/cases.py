"""Small models to draw from, shared by the evaluation tests."""

from pathlib import Path

import pytest
import torch

from dit_models.config_io import build_config
from dit_models.drawing import Artist
from dit_models.evaluate.__main__ import main
from dit_models.trainer import Trainer

from ..training import TINY

RECIPES = {
    "expert choice": ("digits", ()),
    "token choice": ("digits-token-choice", ()),
    "dense": ("digits-dense", ()),
    "expert choice over the batch": ("digits", ("model_options.group=batch",)),
    "captions": ("digit-scenes", ("model_options.text_dim=32",)),
}


def tiny_trainer(folder: Path, kind: str, *overrides: str) -> Trainer:
    """A saved run whose weights are large enough that everything in it matters."""
    recipe, options = RECIPES[kind]
    words = [word for word in TINY if kind != "dense" or "num_experts" not in word]
    words += [f"run_dir={folder}", "device=cpu", "sampling.num_steps=3", *options, *overrides]
    trainer = Trainer(build_config(recipe, overrides=words), folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (*trainer.model.parameters(), *trainer.ema.model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def tiny_artist(folder: Path, kind: str, *overrides: str) -> Artist:
    return tiny_trainer(folder, kind, *overrides).artist()


def save_run(folder: Path, kind: str, *overrides: str) -> Path:
    """The folder of a run that can be loaded."""
    from dit_models.config_io import save_config
    from dit_models.run_folder import CONFIG_NAME, save_info

    folder.mkdir(parents=True)
    trainer = tiny_trainer(folder, kind, *overrides)
    save_config(trainer.config, folder / CONFIG_NAME)
    save_info(folder, trainer.info)
    trainer.train_step()
    trainer.save()
    return folder


def command(*arguments: object) -> int:
    """Exit status of ``python -m dit_models.evaluate ARGUMENTS``."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)
