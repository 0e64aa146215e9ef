"""Finding the dense MLPs of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from moe_kernels.upcycling.blocks import DenseMLP, Unreadable, looks_like_mlp, read_dense
from moe_kernels.upcycling.module import COMPILED, UpcycledMLP, clean_path

Patterns = str | Sequence[str] | None

# Names under which mixtures of experts keep MLPs.
EXPERT_NAMES = {"experts", "shared_expert", "shared_experts"}


@dataclass
class Found:
    """A module that looks like a dense MLP.

    Attributes:
        path: of the module in the model, without what torch.compile adds to it.
        module: the block.
        dense: its weights, ``None`` when it is left alone.
        reason: why it is left alone.
    """

    path: str
    module: nn.Module
    dense: DenseMLP | None = None
    reason: str | None = None


def find_blocks(model: nn.Module, include: Patterns, exclude: Patterns) -> list[Found]:
    """Every module that looks like a dense MLP, read or with the reason why not.

    Args:
        model: any module.
        include, exclude: shell patterns of module paths (``"*.ff"``, ``"blocks.[13579].mlp"``);
            ``None`` includes all and excludes none.

    Raises:
        ValueError: when a pattern fits no such module, or the model itself is the block.
    """
    included, excluded = as_patterns(include), as_patterns(exclude)
    first_paths: dict[int, str] = {}
    blocks: list[Found] = []
    done: list[str] = []  # modules inside an upcycled or a readable block are parts of it
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(tuple(done)):
            continue
        if isinstance(module, UpcycledMLP):
            done.append(f"{path}." if path else "")
            blocks.append(Found(clean_path(path), module, reason="upcycled already"))
            continue
        if not looks_like_mlp(module):
            continue
        block = Found(clean_path(path), module)
        if id(module) in first_paths:
            block.reason = f"the same module as {first_paths[id(module)]}"
        elif path.rpartition(".")[2] == COMPILED:
            block.reason = "compiled by itself, which keeps its code; compile it after upcycling"
        else:
            first_paths[id(module)] = block.path
            block.reason = _left_alone(block.path, included, excluded)
        if block.reason is None:
            try:
                block.dense = read_dense(module)
            except Unreadable as error:
                block.reason = str(error)
            else:
                done.append(f"{path}." if path else "")
        blocks.append(block)
    _check_patterns([block.path for block in blocks], included, excluded)
    if blocks and not blocks[0].path and blocks[0].dense is not None:
        raise ValueError(
            f"the model given is itself a dense MLP ({type(model).__name__}), which cannot be "
            "replaced in place; give the module that holds it."
        )
    return blocks


def as_patterns(patterns: Patterns) -> tuple[str, ...] | None:
    """One pattern or several as a tuple; ``None`` stays."""
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _left_alone(
    path: str, included: tuple[str, ...] | None, excluded: tuple[str, ...] | None
) -> str | None:
    if EXPERT_NAMES & set(path.split(".")):
        return "part of a mixture of experts"
    if included is not None and not any(fnmatchcase(path, pattern) for pattern in included):
        return "not included"
    if excluded is not None and any(fnmatchcase(path, pattern) for pattern in excluded):
        return "excluded"
    return None


def _check_patterns(
    paths: list[str], included: tuple[str, ...] | None, excluded: tuple[str, ...] | None
) -> None:
    for name, patterns in (("include", included), ("exclude", excluded)):
        for pattern in patterns or ():
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"{name} pattern {pattern!r} fits no dense MLP; their paths are: "
                    f"{', '.join(paths) or 'none'}."
                )
