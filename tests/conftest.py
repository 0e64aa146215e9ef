"""Shared fixtures: uninitialised memory is poisoned, seeds are fixed, GPU tests need a GPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter, which it decides when imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # And the CUDA kernels on a simulated GPU.
    os.environ.setdefault("MOE_KERNELS_SIMULATED_GPU", "1")


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        if torch.compiler.is_compiling() or out.is_meta or type(out) is not torch.Tensor:
            return out
        with torch.no_grad():
            if out.is_floating_point():
                out.fill_(float("nan"))
            elif out.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
                out.fill_(torch.iinfo(out.dtype).max)
        return out

    return empty


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill ``torch.empty`` with NaN, so that reading what was never written shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
