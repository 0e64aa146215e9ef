"""The DeepEP transport against one process, with a stand-in for the library."""

import sys

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.distributed import deepep, shard_experts
from tests.ranks import run_ranks

from . import deepep_standin
from .parallel_layers import (
    HIDDEN,
    SEQ,
    expert_mesh,
    gradients,
    make_layer,
    numbers,
    relative,
    worst,
)


def compare() -> tuple[float, list[str], int]:
    sys.modules["deep_ep"] = deepep_standin
    # The stand-in has no kernels: exact numbers on the CPU.
    deepep.DEVICE_TYPE, deepep.DTYPE = "cpu", torch.float64
    mk.use_backend("cpu,reference")
    rank = torch.distributed.get_rank()
    single, layer = make_layer("token_choice"), make_layer("token_choice")
    shard_experts(layer, expert_mesh(), transport="deepep")
    batches = [1, 3, 0, 2]
    x = numbers(sum(batches), SEQ, HIDDEN, seed=1).requires_grad_()
    dout = numbers(sum(batches), SEQ, HIDDEN, seed=2)
    expected = single(x)[0]
    expected.backward(dout)
    own = x.detach().split(batches)[rank].clone().requires_grad_()
    out = layer(own)[0]
    out.backward(dout.split(batches)[rank])
    assert x.grad is not None
    assert own.grad is not None
    references = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    error = max(
        relative(out, expected.split(batches)[rank]),
        relative(own.grad, x.grad.split(batches)[rank]),
        worst(gradients(layer), references),
    )
    events = list(deepep_standin.Buffer.events)
    layer(own)
    return error, events, len(deepep_standin.Buffer.made)


def test_as_one_process() -> None:
    for error, events, made in run_ranks(compare, 4):
        # DeepEP takes routing weights in fp32.
        assert error < 1e-6
        assert events == ["dispatch", "wait", "combine", "dispatch", "combine"]
        assert made == 1


def refused() -> dict[str, str]:
    said = {}
    layer = make_layer("token_choice")
    with pytest.raises(ValueError, match="deep_ep") as error:
        shard_experts(layer, expert_mesh(), transport="deepep")
    assert layer.experts.parallel is None
    said["missing"] = str(error.value)
    sys.modules["deep_ep"] = torch  # a module without a Buffer
    with pytest.raises(ValueError, match="deep_ep") as error:
        shard_experts(layer, expert_mesh(), transport="deepep")
    said["other version"] = str(error.value)
    sys.modules["deep_ep"] = deepep_standin
    chooser = make_layer("expert_choice")
    for each in (layer, chooser):
        shard_experts(each, expert_mesh(), transport="deepep")
    x: Tensor = numbers(1, SEQ, HIDDEN, seed=1)
    with pytest.raises(ValueError, match="deepep") as error:
        chooser(x)
    said["router"] = str(error.value)
    with pytest.raises(ValueError, match="deepep") as error:
        layer(x)
    said["dtype"] = str(error.value)
    return said


def test_refusals() -> None:
    expected = {
        "missing": "needs the package deep_ep, which cannot be imported",
        "other version": "needs deep_ep.Buffer, which this version",
        "router": "this plan is of router 'expert_choice'",
        "dtype": "sends torch.bfloat16 on cuda; x is torch.float64 on cpu",
    }
    for said in run_ranks(refused, 2):
        for case, words in expected.items():
            assert words in said[case]
