"""Upcycled blocks run on the backend that is chosen by itself, or on those that a test names."""

from collections.abc import Iterator

import pytest
import torch

import moe_kernels as mk
from moe_kernels.backends import BACKENDS


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Replaces the one that runs every test on every backend; ``indirect`` names one."""
    name = getattr(request, "param", "auto")
    reason = None if name == "auto" else BACKENDS[name].why_not("expert_mlp", "cpu")
    if reason is not None:
        pytest.skip(f"the {name} backend {reason}")
    torch._dynamo.reset()
    with mk.use_backend(name):
        yield name
