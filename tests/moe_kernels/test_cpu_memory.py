"""Memory that is kept between calls: reused, bounded, never read before it is written."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import make_logits

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)
memory = importlib.import_module("moe_kernels.backends.cpu.memory")

BYTES = 5 << 20


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    with mk.use_backend("cpu"):
        yield "cpu"


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    memory.native.keep_at_most(0)
    memory.native.keep_at_most(1 << 30)
    yield
    memory.native.keep_at_most(memory._limit())


def large() -> torch.Tensor:
    return memory.empty((BYTES // 4,), torch.float32)


def test_a_freed_block_is_used_again_and_a_living_one_is_not():
    first, second = large(), large()
    address = first.data_ptr()
    assert second.data_ptr() != address
    view = first[:10]
    del first
    third = large()
    assert third.data_ptr() != address, "a view still lives in the block"
    del view
    assert large().data_ptr() == address


def test_no_more_is_kept_than_allowed():
    memory.native.keep_at_most(2 * (6 << 20))  # blocks of whole 2 MB pages
    blocks = [large() for _ in range(4)]
    del blocks
    assert memory.native.kept_bytes() == 2 * (6 << 20)
    memory.native.keep_at_most(0)
    assert memory.native.kept_bytes() == 0
    block = large()
    del block
    assert memory.native.kept_bytes() == 0


def test_kernels_write_everything_that_they_return(monkeypatch):
    """Every result lies in poisoned memory, an expert without rows included."""
    plain = memory.empty

    def poisoned(shape, dtype):
        return plain(shape, dtype).fill_(float("nan"))

    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    for stage in ("experts", "rows", "activation"):
        module = importlib.import_module(f"moe_kernels.backends.cpu.{stage}")
        monkeypatch.setattr(module, "empty", poisoned)
    logits = make_logits(40, 4, "collapsed").requires_grad_()
    shapes = ((40, 6), (4, 14, 6), (4, 6, 7), (4, 14), (4, 6))
    x, *weights = (torch.randn(*shape, requires_grad=True) for shape in shapes)
    plan = mk.token_choice(logits, 1)
    assert plan.tokens_per_expert.tolist() == [40, 0, 0, 0]
    names = dict(zip(("w_in", "w_out", "bias_in", "bias_out"), weights, strict=True))
    out = mk.expert_mlp(x, plan, **names, activation="swiglu")
    out = mk.combine(mk.dispatch(out, plan), plan)
    gradients = torch.autograd.grad(out, [x, logits, *weights], torch.randn_like(out))
    for tensor in (out, *gradients):
        assert bool(torch.isfinite(tensor).all())


def test_a_wrong_limit_is_refused():
    result = subprocess.run(
        [sys.executable, "-c", "import moe_kernels.backends.cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "MOE_KERNELS_KEEP_MB": "lots"},
    )
    assert result.returncode != 0
    assert "MOE_KERNELS_KEEP_MB is 'lots'; expected a number of megabytes" in result.stderr
