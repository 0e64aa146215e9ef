"""``upcycle``: dense MLPs of somebody's model become mixtures of experts."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moe_kernels.integrations.report import NothingMatched, VerificationFailed
from moe_kernels.testing import relative_error
from moe_kernels.upcycling.activations import activation_words
from moe_kernels.upcycling.blocks import DenseMLP, Unreadable
from moe_kernels.upcycling.build import build
from moe_kernels.upcycling.find import Found, Patterns, find_blocks
from moe_kernels.upcycling.module import UpcycledMLP
from moe_kernels.upcycling.recipe import Recipe
from moe_kernels.upcycling.report import BlockReport, UpcycleReport

Importance = Mapping[str, Tensor] | Callable[[str, nn.Module], Tensor] | None

# What keep_function promises in each dtype: the largest difference of the output over its largest
# value. Rounding of one product and one sum more; shards also round the output of each shard. The
# fp64 entry allows for libraries that write the constants of a GELU with ten digits.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
VERIFY_SHAPE = (2, 64)  # images and tokens of each that are compared

WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def upcycle(
    model: nn.Module,
    num_experts: int,
    routing: str = "expert_choice",
    mode: str = "copy",
    keep_function: bool = True,
    *,
    capacity_factor: float | None = None,
    top_k: int | None = None,
    shards: int | None = None,
    normalize: str | None = None,
    group: str | int = "image",
    include: Patterns = None,
    exclude: Patterns = None,
    importance: Importance = None,
    drop_ratio: float = 0.5,
    router_std: float = 0.02,
    seed: int = 0,
    verify: bool = True,
) -> UpcycleReport:
    """Replace the dense MLPs of a trained model, in place, by mixtures of experts made from them.

    ``mlp(x)`` becomes ``experts(x, router(x)) + shared_expert(x)`` (``UpcycledMLP``). With
    ``keep_function`` the model computes at step 0 what it computed before, up to rounding
    (``TOLERANCE``): token choice by copies or shards whose weights sum to 1; expert choice, whose
    tokens can be left without an expert, and ``"drop"``, by keeping the dense MLP as shared expert
    and starting the down projections of the routed experts at zero.

    Either all blocks are replaced or, when anything raises, none. Dtype, device, train or eval mode
    and ``requires_grad`` stay those of the dense weights (the router is trained when any of them
    is), the global random state is not used, and each block's numbers depend on ``seed`` and its
    path alone. Build the optimiser and wrap in DDP or FSDP afterwards. On the meta device the
    structure is made without values, to load a checkpoint into.

    Args:
        model: holds MLPs of timm or DiT (``Mlp``), diffusers (``FeedForward``) or transformers
            (``LlamaMLP``, ``CLIPMLP``, ...), recognised by class name and attributes.
        num_experts: E; in mode ``"split"`` a multiple of ``shards``.
        routing: ``"expert_choice"`` or ``"token_choice"``.
        mode: ``"copy"`` (every expert is the dense MLP), ``"split"`` (each holds F / shards of its
            channels) or ``"drop"`` (copies with a share of their channels drawn anew).
        keep_function: see above; ``False`` gives the plain recipe of the papers, raw softmax
            weights and no shared expert, which starts far from the dense function.
        capacity_factor: f_c of expert choice; 2.0 by default.
        top_k: K of token choice; by default 2, and ``shards`` in mode ``"split"``.
        shards: experts that together hold one dense MLP, in mode ``"split"``; 2 by default.
        normalize: of the routing weights, ``"none"`` or ``"per_token"``; by default what
            ``keep_function`` needs, else ``"none"``.
        group: pool of expert choice, see ``ExpertChoiceRouter``.
        include, exclude: shell patterns of module paths, one or several (``"*.ff"``).
        importance: of the channels, for mode ``"split"``: (F,) tensors by module path
            (``measure_importance``), or a function of path and module; by default the product of
            the norms of each channel's weights.
        drop_ratio: share of the channels of an expert that ``"drop"`` draws anew.
        router_std: standard deviation of the router's initial weights.
        seed: of all random numbers.
        verify: compare each dense block with what was read from it (a block that computes
            something else is skipped) and with its replacement, on random tokens.

    Returns:
        An ``UpcycleReport``; print it. It does not hold the model.

    Raises:
        NothingMatched: no block could be upcycled; says why for each that looks like an MLP.
        ValueError: options that contradict each other, a pattern that fits nothing, a missing or
            misshapen importance, or a model that is wrapped already.
        VerificationFailed: ``keep_function`` was promised and ``verify`` found another function.

    Source: sparse upcycling (arXiv 2212.05055); shards with equal router rows (arXiv 2410.07524);
    Drop-Upcycling (arXiv 2502.19261).
    """
    recipe = Recipe(
        num_experts=num_experts,
        routing=routing,
        mode=mode,
        keep_function=keep_function,
        capacity_factor=capacity_factor,
        top_k=top_k,
        shards=shards,
        normalize=normalize,
        group=group,
        drop_ratio=drop_ratio,
        router_std=router_std,
    )
    if importance is not None and mode != "split":
        raise ValueError(f'importance is given with mode {mode!r}; only "split" orders channels.')
    _refuse_wrapped(model)
    replacements: dict[int, UpcycledMLP] = {}
    reports = []
    for found in find_blocks(model, include, exclude):
        try:
            report, replacements[id(found.module)] = _convert(
                found, recipe, importance, seed, verify
            )
        except Unreadable as reason:
            name = type(found.module).__name__
            report = BlockReport(found.path, name, skipped=str(reason))
        reports.append(report)
    if not replacements:
        raise NothingMatched(_nothing(model, reports))
    _install(model, replacements)
    return UpcycleReport(recipe.words, tuple(reports))


def _convert(
    found: Found, recipe: Recipe, importance: Importance, seed: int, verify: bool
) -> tuple[BlockReport, UpcycledMLP]:
    block, dense = found.module, found.dense
    if dense is None:
        raise Unreadable(found.reason)
    device = dense.w_in.device
    expected = difference = None
    with torch.no_grad():
        if verify and device.type != "meta":
            shape = (1, recipe.group) if isinstance(recipe.group, int) else VERIFY_SHAPE
            noise = torch.randn(*shape, dense.hidden_size, generator=_generator("verify", found))
            x = noise.to(dense.w_in)
            expected = _check_reading(block, dense, x)
        channels = _channel_importance(found, importance)
        upcycled = build(block, dense, recipe, _generator(seed, found), channels)
        if expected is not None:
            difference = relative_error(_run(upcycled, x), expected)
    if recipe.keep_function and difference is not None:
        allowed = TOLERANCE[dense.w_in.dtype]
        if not difference <= allowed:
            raise VerificationFailed(
                f"upcycling {found.path} with keep_function=True changes its output by "
                f"{difference:.1e} of the largest value; expected at most {allowed:.0e} for "
                f"{dense.w_in.dtype}. No block was replaced."
            )
    before = sum(parameter.numel() for parameter in block.parameters())
    after, activated = _parameters(upcycled, recipe)
    report = BlockReport(
        *(found.path, type(block).__name__, activation_words(dense.elementwise, dense.gated)),
        parameters_before=before,
        parameters_after=after,
        activated_before=before,
        activated_after=activated,
        difference=difference,
    )
    return report, upcycled


def _generator(seed: int | str, found: Found) -> torch.Generator:
    """Of seed and path, so that a block does not depend on which others are included."""
    digest = hashlib.sha256(f"{seed}:{found.path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _check_reading(block: nn.Module, dense: DenseMLP, x: Tensor) -> Tensor:
    """Output of the block; refuses one whose forward is not what its attributes say."""
    try:
        expected = _run(block, x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise Unreadable(f"its forward fails on random tokens: {error}") from error
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        raise Unreadable("its forward does not return one tensor of the shape of its input")
    if not bool(torch.isfinite(expected).all()):
        raise Unreadable("its output on random tokens is not finite")
    difference = relative_error(_run(dense, x), expected)
    if not difference <= TOLERANCE[x.dtype]:
        raise Unreadable(
            f"its forward is not the MLP that its attributes show (difference {difference:.1e})"
        )
    return expected


def _run(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return compute(x)


def _channel_importance(found: Found, importance: Importance) -> Tensor | None:
    assert found.dense is not None
    if importance is None:
        return None
    if callable(importance):
        channels = importance(found.path, found.module)
    elif found.path in importance:
        channels = importance[found.path]
    else:
        raise ValueError(
            f"importance has no entry for {found.path}; it has {', '.join(importance) or 'none'}."
        )
    expected = (found.dense.intermediate_size,)
    if tuple(channels.shape) != expected:
        raise ValueError(
            f"importance of {found.path} has shape {tuple(channels.shape)}; expected {expected}, "
            "a number for each channel."
        )
    return channels


def _parameters(upcycled: UpcycledMLP, recipe: Recipe) -> tuple[int, int]:
    """Parameters of the block, and how many an average token passes."""
    total = sum(parameter.numel() for parameter in upcycled.parameters())
    routed = sum(parameter.numel() for parameter in upcycled.experts.parameters())
    return total, round(total - routed * (1 - recipe.experts_per_token / recipe.num_experts))


def _refuse_wrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            raise ValueError(
                f"{path or 'the model'} is a {type(module).__name__}, which keeps lists of the "
                "parameters that upcycling replaces; upcycle first, wrap afterwards."
            )


def _nothing(model: nn.Module, reports: list[BlockReport]) -> str:
    name = type(model).__name__
    if not reports:
        return (
            f"{name} holds no module whose class is called *Mlp, *MLP or *FeedForward; nothing "
            "was upcycled."
        )
    lines = [f"  {report.path} ({report.class_name}): {report.skipped}" for report in reports]
    return "\n".join([f"no dense MLP of {name} could be upcycled:", *lines])


def _install(model: nn.Module, replacements: dict[int, UpcycledMLP]) -> None:
    """Replace each block wherever the model holds it."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements:
            parent_path, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent_path), name, replacements[id(module)])
