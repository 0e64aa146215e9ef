"""Recipes, files and overrides become one checked configuration, and survive the disk."""

import re

import pytest

from dit_models.assemble import model_config_for, pick_device, with_defaults
from dit_models.config import TrainConfig
from dit_models.config_io import build_config, fields_of, help_text, load_config, save_config
from dit_models.data import build_dataset
from dit_models.recipes import RECIPES
from dit_models.run_folder import run_dir_of

FOLDERS = ("images", "captions")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_survives_the_disk(recipe, tmp_path):
    config = build_config(recipe, overrides=["data.name=photos"] if recipe in FOLDERS else [])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert run_dir_of(config).parts == ("runs", recipe)


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\noptimizer:\n  lr: 0.5\n  momentum: 0.1\n")
    config = build_config("digits", file, ["optimizer.lr=0.25", "model_options.top_k=3"])
    assert (config.steps, config.optimizer.lr, config.optimizer.momentum) == (7, 0.25, 0.1)
    assert config.model_options == {"top_k": 3}
    assert config.batch_size == build_config("digits").batch_size


def test_help_explains_every_field():
    text = help_text()
    fields = list(fields_of(TrainConfig()))
    assert len(fields) > 50
    for name, _, words in fields:
        assert f"{name}=" in text
        assert len(words) > 10, name
        assert words in text


WRONG = {
    "unknown field": (["step=3"], "no field 'step'; close names: steps"),
    "a loss that is no number": (["router_loss.own.layer_head=x"], "own.layer_head: Value 'x'"),
    "unknown nested field": (["optimizer.learning_rate=3"], "no field 'optimizer.learning_rate'"),
    "type": (["steps=many"], "steps: "),
    "no value": (["steps"], "'steps' is not an override; expected key=value"),
    "choice": (["optimizer.kind=sgd"], "optimizer.kind='sgd'; expected one of adamw, rmsprop"),
    "sampler of the other objective": (["sampling.sampler=ddim"], "expected one of auto, euler"),
    "range": (["condition_dropout=1.5"], "condition_dropout=1.5; expected a number from 0 to 1"),
    "zero": (["steps=0"], "steps=0; expected at least 1"),
    "no images in a grid": (["sampling.grid_images=0"], "sampling.grid_images=0"),
    "guidance interval": (
        ["sampling.guidance_start=0.8", "sampling.guidance_end=0.2"],
        "sampling.guidance_end=0.2; expected a number from 0.8 to 1",
    ),
    "clip range": (["sampling.clip_range=0"], "sampling.clip_range=0"),
    "one image to judge": (["evaluation.num_samples=1"], "expected at least 2"),
    "no guidance scales": (["evaluation.guidance_scales=[]"], "guidance_scales is empty"),
    "logit_std": (["objective.logit_std=0"], "objective.logit_std=0"),
    "no data": (["data.name=''"], "data.name is empty"),
    "micro-batches": (["accumulate=7"], "accumulate=7 does not divide batch_size=32"),
    "pooled similarity": (
        ["accumulate=2", "router_loss.similarity=0.1"],
        "its weights are counted over the whole batch",
    ),
    "pooled routing": (["accumulate=2", "model_options.group=batch"], "would not share a pool"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused(name):
    overrides, words = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        build_config("digits", overrides=overrides)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        build_config("digits", tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        build_config("digits", bad)
    with pytest.raises(ValueError, match="recipe is 'digit'"):
        build_config("digit")
    with pytest.raises(ValueError, match=r"is .* the folder of a run"):
        load_config(tmp_path / "config.yaml")


def test_the_model_is_fitted_to_the_data():
    digits, scenes = build_dataset("digits").info, build_dataset("digit-scenes").info
    config = model_config_for(build_config("digits"), digits)
    assert (config.in_channels, config.out_channels, config.num_classes) == (1, 1, 10)
    ddpm = model_config_for(build_config("digits-ddpm"), digits)
    assert (ddpm.out_channels, ddpm.time_scale) == (2, 1.0)
    text = model_config_for(build_config("digit-scenes"), scenes)
    assert (text.in_channels, text.num_classes, text.text_dim > 0) == (3, 0, True)
    with pytest.raises(ValueError, match="EC-DiT-tiny is class-conditional"):
        model_config_for(build_config("digits"), scenes)
    with pytest.raises(ValueError, match="reads captions, and digits has none"):
        model_config_for(build_config("digit-scenes"), digits)
    with pytest.raises(ValueError, match="num_classes follows from the data"):
        model_config_for(build_config("digits", overrides=["model_options.num_classes=3"]), digits)
    with pytest.raises(ValueError, match="unknown model fields"):
        model_config_for(build_config("digits", overrides=["model_options.layers=3"]), digits)


def test_auto_sampler_follows_the_objective():
    flow = build_config("digits", overrides=["sampling.sampler=auto"])
    assert with_defaults(flow).sampling.sampler == "heun"
    assert with_defaults(build_config("digits-ddpm")).sampling.sampler == "ddim"


def test_wrong_devices_and_run_names_are_refused():
    with pytest.raises(ValueError, match="device='tpu9'"):
        pick_device("tpu9")
    with pytest.raises(ValueError, match="expected a plain folder name"):
        run_dir_of(build_config("digits", overrides=["name=../x"]))
