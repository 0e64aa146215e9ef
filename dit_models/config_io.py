"""From recipe, YAML file and ``key=value`` words to a checked ``TrainConfig``, and back."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_models.atomic import write_text
from dit_models.config import TrainConfig
from dit_models.extras import require
from dit_models.recipes import RECIPES


def build_config(
    recipe: str, file: str | Path | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Merge a recipe, a YAML file and ``key=value`` overrides, later ones winning.

    Args:
        recipe: a name of ``recipes.RECIPES``.
        file: YAML with (some of) the fields of ``TrainConfig``.
        overrides: words such as ``optimizer.lr=3e-4``.

    Raises:
        ValueError: unknown recipe or field, unreadable file, a value of the wrong type or range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(RECIPES)}.")
    omegaconf = require("omegaconf", extra="train")
    merged = omegaconf.OmegaConf.structured(RECIPES[recipe]())
    for layer in _layers(omegaconf, file, overrides):
        try:
            merged = omegaconf.OmegaConf.merge(merged, layer)
        except omegaconf.errors.OmegaConfBaseException as error:
            raise ValueError(_explain(error)) from error
    config: TrainConfig = omegaconf.OmegaConf.to_object(merged)
    return config.validate()


def _layers(omegaconf: Any, file: str | Path | None, overrides: Sequence[str]) -> Iterator[Any]:
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"--config {path}: no such file.")
        try:
            yield omegaconf.OmegaConf.load(path)
        except Exception as error:  # the YAML parser has its own exception tree
            raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is not an override; expected key=value, e.g. steps=2000.")
    yield omegaconf.OmegaConf.from_dotlist(list(overrides))


# Dictionaries, whose names are checked when the model is built.
_OPEN_GROUPS = ("model_options.", "router_loss.own.")


def _explain(error: Any) -> str:
    key = getattr(error, "full_key", None) or str(getattr(error, "key", ""))
    known = [name for name, _, _ in fields_of(TrainConfig())]
    if key and key not in known and not key.startswith(_OPEN_GROUPS):
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else ""
        return (
            f"the config has no field {key!r}{hint}. All of them: python -m dit_models.train --help"
        )
    return f"{key}: {str(error).splitlines()[0]}"


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, value, help) of every field, nested ones included."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item.metadata["help"]


# Fields that may differ when a run goes on: they do not change the steps that follow.
_FREE_FIELDS = (
    "name", "run_dir", "stop_at", "device", "log_every", "sample_every", "save_every",
    "keep_checkpoints", "data.num_workers", "data.vae", "text.cache", "parallel.data",
    "parallel.expert", "parallel.replicate", "parallel.reshard_after_forward", "parallel.timeout",
    "parallel.debug",
)  # fmt: skip
_FREE_GROUPS = ("sampling.", "evaluation.")


def differing_fields(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """What keeps a run with the fields ``saved`` from going on with ``config``, a line each.

    ``saved`` maps dotted names to values. With a constant schedule, and where no stage of training
    begins at a share of the run, ``steps`` may differ: it only says where the run ends.
    """
    different = []
    # A field that the saved run does not know was added later, and its default changes nothing.
    saved = {name: value for name, value, _ in fields_of(TrainConfig())} | saved
    for name, value, _ in fields_of(config):
        if name in _FREE_FIELDS or name.startswith(_FREE_GROUPS) or saved[name] == value:
            continue
        if name == "steps" and _steps_only_end(config):
            continue
        different.append(f"{name}: {saved[name]!r} before, {value!r} now")
    return different


def shared_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that all processes of a run must have alike; paths may differ between machines."""
    own = ("run_dir", "device", "data.num_workers", "data.vae", "text.cache")
    return {name: value for name, value, _ in fields_of(config) if name not in own}


def _steps_only_end(config: TrainConfig) -> bool:
    """Whether ``steps`` says where a run ends and changes nothing before."""
    routing = config.model_options.get("routing_options") or {}
    staged = config.masking.unmask_from < 1 or routing.get("capacity_by_stage")
    return config.optimizer.schedule == "constant" and not staged


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML."""
    omegaconf = require("omegaconf", extra="train")
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.structured(config))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration, atomically."""
    write_text(path, to_yaml(config))


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that ``save_config`` wrote.

    Raises:
        ValueError: missing file, or content that is not a ``TrainConfig``.
    """
    omegaconf = require("omegaconf", extra="train")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is {path.parent} the folder of a run?")
    try:
        merged = omegaconf.OmegaConf.merge(
            omegaconf.OmegaConf.structured(TrainConfig()), omegaconf.OmegaConf.load(path)
        )
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_explain(error)}") from error
    config: TrainConfig = omegaconf.OmegaConf.to_object(merged)
    return config.validate()


def help_text() -> str:
    """Every field with its default and what it means."""
    rows = [(f"{name}={_plain(value)}", text) for name, value, text in fields_of(TrainConfig())]
    lines = ["fields (key=default; a recipe may set another default):"]
    for left, text in rows:
        lines.append(f"  {left}\n        {text}")
    lines.append("\nrecipes:")
    lines += [
        f"  {name:<22}{(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()
    ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)
