"""Every test of the stages runs on each backend that this machine has.

Without a GPU the Triton backend runs in Triton's interpreter, and the CUDA backend on a simulated
GPU: their kernels, on CPU tensors.
"""

import os
from collections.abc import Iterator

import pytest
import torch

import moe_kernels as mk
from moe_kernels.backends import BACKENDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHY_NOT_TRITON = BACKENDS["triton"].why_not("expert_mlp", "cpu")

if INTERPRETED and WHY_NOT_TRITON is None:
    from .interpreter import install

    install()


# The CUDA backend routes and moves rows; the rest of a layer is another's.
ASKED_FOR = {"cuda": "cuda,reference"}


def _backends() -> list[object]:
    params: list[object] = ["reference"]
    for name in ("cpu", "triton", "cuda"):
        reason = BACKENDS[name].why_not("expert_choice", "cpu")
        marks = [] if reason is None else [pytest.mark.skip(reason=f"the {name} backend {reason}")]
        params.append(pytest.param(name, marks=marks))
    return params


@pytest.fixture(params=_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that serves the test; tests of one backend override this fixture."""
    torch._dynamo.reset()
    with mk.use_backend(ASKED_FOR.get(request.param, request.param)):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") != "triton":
            continue
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            reason = "slow in the interpreter; test_triton_hypothesis.py runs a few examples"
            item.add_marker(pytest.mark.skip(reason=reason))
