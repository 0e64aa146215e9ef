"""``apply`` and ``revert``: the kernels in a model that exists already."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from moe_kernels.backends import BackendUnavailable, check_backend, serving
from moe_kernels.integrations import ADAPTERS
from moe_kernels.integrations.adapter import Adapter, backend_of
from moe_kernels.integrations.packing import unpack
from moe_kernels.integrations.report import NothingMatched, SwapReport, SwapRow
from moe_kernels.integrations.swapped import Swapped, repack_after_load, swapped_class
from moe_kernels.integrations.verify import verify_block

_BACKEND, _HOOK = "_moe_kernels_backend", "_moe_kernels_load_hook"


def apply(
    model_or_pipeline: Any,
    backend: str = "auto",
    verify: bool = False,
    strict: bool = True,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> SwapReport:
    """Run the mixture-of-experts blocks of a model on the kernels, in place.

    Each block that an adapter knows gets a subclass of its own class; parameters, their names,
    hooks, optimisers and state dicts stay what they are. Weights of experts that are separate
    parameters are moved next to each other in memory. A second call changes nothing, except that
    it takes the new ``backend`` and packs weights that have been moved since.

    Args:
        model_or_pipeline: an ``nn.Module`` (also compiled, or inside DDP), or a diffusers pipeline,
            whose components are walked.
        backend: for these blocks; ``"auto"`` follows ``use_backend``.
        verify: run original and swapped version of every block on random input, in fp64 and in the
            block's own dtype, and compare output and gradients. Takes memory for copies of the
            largest block.
        strict: raise when not one block could be swapped.
        include: only blocks whose path matches one of these patterns (``*`` and ``?``), e.g.
            ``"transformer.blocks.1*"``.
        exclude: no block whose path matches one of these.

    Returns:
        A ``SwapReport``: a row for every block that an adapter knows, with the reason of each skip.

    Raises:
        NothingMatched: with ``strict``, when no block was swapped; names what was seen.
        VerificationFailed: when a block computes something else; all swaps of this call are taken
            back.
        TypeError: when given neither a module nor a pipeline.
        ValueError: for an unknown backend, or a pattern of ``exclude`` that fits no module.
    """
    check_backend(backend)
    _check_exclude(model_or_pipeline, exclude)
    report = SwapReport(backend)
    done: list[nn.Module] = []
    before: list[tuple[nn.Module, str | None]] = []  # swapped earlier, and for which backend
    seen: dict[str, int] = {}
    for path, module in _modules(model_or_pipeline):
        _count_lookalike(module, seen)
        if not _is_wanted(path, include, exclude):
            continue
        if isinstance(module, Swapped):
            before.append((module, backend_of(module)))
        row = _swap(path, module, backend)
        if row is None:
            continue
        if row.status == "swapped":
            done.append(module)
        if verify and row.status != "skipped":
            try:
                row = verify_block(module, row)
            except BaseException:  # also Ctrl-C leaves nothing half done
                for swapped in done:
                    _revert(swapped)
                for swapped, former in before:
                    swapped.__dict__[_BACKEND] = former
                raise
        report.rows.append(row)
    if strict and not report.swapped:
        raise NothingMatched(_nothing_matched(model_or_pipeline, report, seen, include, exclude))
    return report


def revert(model_or_pipeline: Any) -> SwapReport:
    """Give every swapped block its original class back.

    The blocks compute what they computed before, to the bit, with the weights as they are now.

    Args:
        model_or_pipeline: what ``apply`` was given, or any part of it.

    Returns:
        A ``SwapReport`` of the reverted blocks; empty when nothing was swapped.

    Raises:
        TypeError: when given neither a module nor a pipeline.
        ValueError: when a swapped block has been wrapped since, e.g. by ``fully_shard``.
    """
    report = SwapReport("none")
    swapped = [(path, m) for path, m in _modules(model_or_pipeline) if isinstance(m, Swapped)]
    for _, module in swapped:  # all or none
        _check_revertible(module)
    for path, module in swapped:
        if not isinstance(module, Swapped):  # it is in two components
            continue
        family = module.adapter.family
        _revert(module)
        report.rows.append(SwapRow(path, type(module).__name__, family, "reverted"))
    return report


def _modules(model_or_pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model_or_pipeline, nn.Module):
        for path, module in list(model_or_pipeline.named_modules()):
            yield _plain_path(path), module
        return
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"expected an nn.Module or a diffusers pipeline, not a "
            f"{type(model_or_pipeline).__name__}."
        )
    for name, component in components.items():
        if isinstance(component, nn.Module):
            for path, module in list(component.named_modules(prefix=name)):
                yield _plain_path(path), module


def _plain_path(path: str) -> str:
    """The path as it is without torch.compile."""
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def _check_exclude(model_or_pipeline: Any, exclude: str | Sequence[str] | None) -> None:
    """A pattern with a slip of the pen would swap what was to be left alone."""
    for pattern in (exclude,) if isinstance(exclude, str) else exclude or ():
        if not any(fnmatchcase(path, pattern) for path, _ in _modules(model_or_pipeline)):
            raise ValueError(f"exclude is {pattern!r}, which fits no module of the model.")


def _is_wanted(
    path: str, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> bool:
    return (include is None or _matches(path, include)) and not (
        exclude is not None and _matches(path, exclude)
    )


def _matches(path: str, patterns: str | Sequence[str]) -> bool:
    listed = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(path, pattern) for pattern in listed)


def _find_adapter(module: nn.Module) -> Adapter | None:
    """By the exact class in most families: a subclass may compute something else."""
    name = type(module).__name__
    if _is_sharded(module):  # fully_shard puts a class of its own on top of the block's
        name = type(module).__mro__[2].__name__
    return next((adapter for adapter in ADAPTERS if adapter.matches(module, name)), None)


def _is_sharded(module: nn.Module) -> bool:
    bases = type(module).__mro__
    return len(bases) > 2 and bases[1].__name__ == "FSDPModule"


def _swap(path: str, module: nn.Module, backend: str) -> SwapRow | None:
    if isinstance(module, Swapped):
        adapter, status = module.adapter, "already swapped"
    else:
        found = _find_adapter(module)
        if found is None:
            return None
        adapter, status = found, "swapped"
    name = type(module).__name__
    reason = adapter.why_not(module)
    if reason is None and "forward" in module.__dict__:
        reason = "its forward was replaced on the instance, e.g. by offloading hooks; swap first"
    if reason is not None:
        return SwapRow(path, name, adapter.family, "skipped", reason)
    if status == "swapped":
        original = type(module)
        module.__class__ = swapped_class(adapter, original)
        hook = module.register_load_state_dict_post_hook(repack_after_load)
        module.__dict__[_HOOK] = hook.id
    module.__dict__[_BACKEND] = None if backend == "auto" else backend
    apart = adapter.pack(module)
    detail = adapter.describe(module)
    if apart is not None:
        detail += f"; weights are stacked at every call, because {apart}"
    detail += _why_unserved(module, backend)
    return SwapRow(path, name, adapter.family, status, detail)


def _why_unserved(module: nn.Module, backend: str) -> str:
    """What to add when the backend asked for cannot serve the block where its weights are now."""
    device = next(module.parameters()).device
    try:
        serving("expert_mlp", device, None if backend == "auto" else backend)
    except BackendUnavailable as error:
        return f"; as long as it is on {device.type} its forward raises: {error}"
    return ""


def _check_revertible(module: Any) -> None:
    cls = type(module)
    if not issubclass(cls, Swapped) or cls is not swapped_class(cls.adapter, cls.original_class):
        raise ValueError(
            f"a swapped {cls.__name__} has been wrapped in another class since (fully_shard does "
            "that), so it cannot be reverted; revert before wrapping."
        )


def _revert(module: Any) -> None:
    _check_revertible(module)
    module.__class__ = type(module).original_class
    unpack(module.parameters())
    module._load_state_dict_post_hooks.pop(module.__dict__.pop(_HOOK), None)
    del module.__dict__[_BACKEND]


def _count_lookalike(module: nn.Module, seen: dict[str, int]) -> None:
    name = type(module).__name__
    if any(word in name.lower() for word in ("moe", "expert", "mixture")):
        seen[name] = seen.get(name, 0) + 1


def _nothing_matched(
    model: Any,
    report: SwapReport,
    seen: dict[str, int],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> str:
    known = sorted({name for adapter in ADAPTERS for name in adapter.class_names})
    message = f"no block of this {type(model).__name__} was swapped. "
    if report.rows:
        skipped = "; ".join(f"{row.path} ({row.class_name}): {row.detail}" for row in report.rows)
        message += f"Known, but skipped: {skipped}. "
    if seen:
        listed = ", ".join(f"{name} x {count}" for name, count in sorted(seen.items()))
        message += f"Classes that look like mixtures of experts: {listed}. "
    else:
        message += "None of its classes looks like a mixture of experts. "
    if include is not None or exclude is not None:
        message += f"include is {include!r} and exclude is {exclude!r}. "
    return message + f"Known classes: {', '.join(known)}. strict=False returns an empty report."
