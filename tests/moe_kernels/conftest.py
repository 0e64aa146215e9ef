"""Every test of the stages runs on each backend that this machine has."""

from collections.abc import Iterator

import pytest
import torch

import moe_kernels as mk
from moe_kernels.backends import BACKENDS


def _backends() -> list[object]:
    params: list[object] = ["reference"]
    reason = BACKENDS["cpu"].why_not("expert_mlp", "cpu")
    marks = [] if reason is None else [pytest.mark.skip(reason=f"the cpu backend {reason}")]
    return [*params, pytest.param("cpu", marks=marks)]


@pytest.fixture(params=_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that serves the test; tests of one backend override this fixture."""
    torch._dynamo.reset()
    with mk.use_backend(request.param):
        yield request.param
