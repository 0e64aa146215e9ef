"""Models by name: ``build_model("EC-DiT-L/2-8E")``; ``python -m dit_models.models`` lists them."""

import argparse
import difflib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dit_models.backbone import DiT
from dit_models.count import ModelCount, count_model
from dit_models.dit import build_dit
from dit_models.dit_moe import build_dit_moe
from dit_models.ec_dit import build_ec_dit
from dit_models.model_config import ModelConfig
from dit_models.presets import PRESETS

_BUILDERS: dict[str, Callable[..., DiT]] = {
    "dit": build_dit,
    "dit_moe": build_dit_moe,
    "ec_dit": build_ec_dit,
}


def get_config(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises:
        ValueError: no preset has this name; the message lists close names.
    """
    if name not in PRESETS:
        lowered = {preset.lower(): preset for preset in PRESETS}
        close = difflib.get_close_matches(name.lower(), lowered, n=5, cutoff=0.4)
        names = [lowered[match] for match in close] or list(PRESETS)
        raise ValueError(
            f"no model preset {name!r}; close names: {', '.join(names)}. "
            "All of them: python -m dit_models.models"
        )
    return PRESETS[name]


def build_model(
    name_or_config: str | ModelConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    on_block: Callable[[nn.Module], None] | None = None,
) -> DiT:
    """Make a model with fresh weights.

    Args:
        name_or_config: name of a preset, or a configuration.
        device: where its parameters are made; "meta" takes no memory.
        dtype: of its parameters; ``None`` = torch's default.
        on_block: called with each block as soon as it is made.

    Returns:
        The model, in training mode. A new model predicts exactly 0 (adaLN-zero).

    Raises:
        ValueError: unknown preset.
    """
    config = get_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    return _BUILDERS[config.family](config, on_block, device=device, dtype=dtype)


def count_preset(name_or_config: str | ModelConfig) -> ModelCount:
    """Parameters, multiply-accumulates and memory of a model, without making it."""
    model = build_model(name_or_config, device="meta")
    return count_model(model)


def table(names: Sequence[str]) -> str:
    """A text table of the named presets, one a line."""
    columns = ("total M", "activated M", "GMACs", "+attention", "bf16", "training")
    width = max(20, *map(len, names))
    lines = [f"{'model':<{width}}" + "".join(f"{column:>13}" for column in columns)]
    for name in names:
        count = count_preset(name)
        macs = (f"{value / 1e9:.2f}" for value in (count.macs, count.macs_with_attention))
        sizes = (_bytes(value) for value in (count.bf16_bytes, count.training_bytes))
        cells = (f"{count.total / 1e6:.2f}", f"{count.activated / 1e6:.2f}", *macs, *sizes)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _bytes(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of presets."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_models.models",
        description="List the model presets. Totals include the frozen positions; MACs are for "
        "one image of the preset's size (and 77 text tokens); training is 16 bytes a parameter, "
        "without activations.",
    )
    parser.add_argument("--filter", default="", help="only names that contain this")
    wanted = parser.parse_args(arguments).filter
    names = [name for name in PRESETS if wanted.lower() in name.lower()]
    if not names:
        parser.error(f"--filter {wanted!r} matches no preset; without it all are listed")
    print(table(names))


if __name__ == "__main__":
    main()
