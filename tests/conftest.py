"""Shared fixtures: uninitialised memory is poisoned, seeds are fixed, GPU tests need a GPU.

And how the tests are divided (``parts.py``): between two parts, and the cores between processes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import parts

# Processes that run tests beside each other share the cores, with all that they start: a small op
# with two threads took 8 ms when the second core was busy.
if parts.RUNNING > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(parts.share_of_cores(parts.RUNNING)))
# Where bits are compared, PyTorch's products must not depend on where matrices lie in memory. MKL's
# do on some processors (AMD EPYC), but not in this mode, which it reads at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch  # which reads the number of threads

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


@pytest.fixture(autouse=True)
def threads_for_cpu_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the C++ kernels two threads at least: one would not cut their work into pieces."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    theirs = request.path.name.startswith("test_cpu_") or parameters.get("backend") == "cpu"
    threads = torch.get_num_threads()
    if not theirs or parts.RUNNING == 1 or threads > 1:
        yield
        return
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", choices=parts.PARTS, help="the tests of one part, see tests/parts.py"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return parts.workers()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    part = config.getoption("part")
    if part is None or collection_path.suffix != ".py":
        return None
    return None if parts.may_hold(_file(collection_path), part) else True


def _file(path: Path) -> str:
    return path.relative_to(parts.ROOT).as_posix() if path.is_relative_to(parts.ROOT) else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("part")
    if part is not None:
        chosen = [parts.part_of(f"{_file(i.path)}::{i.name}") == part for i in items]
        left_out = [item for item, mine in zip(items, chosen, strict=True) if not mine]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, mine in zip(items, chosen, strict=True) if mine]
        items.sort(key=lambda item: _file(item.path) not in parts.LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
