"""Every shipped tuning config on this GPU, and tensors too large for 32-bit addresses."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import relative_error

from .gpu_cases import (
    DEVICES,
    assert_mlp_accurate,
    draw,
    mlp_tensors,
    ragged_plan,
    require_memory,
    sixteen_bit,
)

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cuda")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton import configs
from moe_kernels.backends.triton.config_table import BUCKETS, Config
from moe_kernels.backends.triton.launch import target_of

OVER_32_BITS = 2**31 + 2**20


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOE_KERNELS_TUNE", "off")  # what is shipped, not what was tuned here
    configs.forget()
    with mk.use_backend("triton"):
        yield
    configs.forget()


def shipped(device: str, dtype: torch.dtype) -> list[Config]:
    """The different configs of this device's table."""
    table = configs.shipped(target_of(torch.empty(1, device=device)).arch, dtype)
    return list(dict.fromkeys(config for row in table.values() for config in row.values()))


def product(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Expert after expert in fp64."""
    ends = offsets.tolist()
    pairs = zip(ends[:-1], ends[1:], w.double(), strict=True)
    return torch.cat([rows.double()[start:end] @ matrix.T for start, end, matrix in pairs])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", ["sixteen bit", "fp32"])
def test_every_shipped_config_multiplies_right(device, width):
    dtype = sixteen_bit(device) if width == "sixteen bit" else torch.float32
    tokens, into, out = (700, 256, 320) if device == "cuda" else (20, 16, 32)
    plan = ragged_plan(device, tokens, 5 if device == "cuda" else 3)
    rows = draw(device, plan.num_rows, into, dtype=dtype).requires_grad_()
    w = draw(device, plan.num_experts, out, into, dtype=dtype, scale=into**-0.5).requires_grad_()
    upstream = draw(device, plan.num_rows, out, dtype=dtype)
    exact_rows, exact_w = (tensor.detach().double().requires_grad_() for tensor in (rows, w))
    exact = product(exact_rows, exact_w, plan.expert_offsets)
    wanted = [exact, *torch.autograd.grad(exact, [exact_rows, exact_w], upstream.double())]
    found_configs = shipped(device, dtype)
    assert found_configs
    for config in found_configs:
        with configs.forced(config):
            y = mk.grouped_gemm(rows, w, plan.expert_offsets)
            found = [y, *torch.autograd.grad(y, [rows, w], upstream)]
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        for number, (actual, right) in enumerate(zip(found, wanted, strict=True)):
            assert relative_error(actual, right) < limit, (config, number)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_bucket_gives_an_accurate_layer(activation, bucket):
    rows_per_expert = {"few": 16, "some": 128, "many": 512}[bucket]
    assert configs.bucket_of(rows_per_expert) == bucket
    experts = 8
    plan = ragged_plan("cuda", rows_per_expert * experts // 2, experts)
    # Wide enough that no tile of the table is made smaller.
    tensors = mlp_tensors(plan, 256, 512, activation, torch.bfloat16)
    assert_mlp_accurate(plan, tensors, activation)


@pytest.fixture
def unpoisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as large as this is filled with NaN in several passes: not worth it here."""
    monkeypatch.undo()


@pytest.mark.gpu
def test_rows_beyond_32_bit_addresses_are_moved_and_summed(unpoisoned):
    require_memory(24)
    hidden = 4096
    tokens = OVER_32_BITS // (2 * hidden) + 3
    with mk.use_backend("triton"):
        plan = mk.token_choice(draw("cuda", tokens, 4), 2)
        assert plan.num_rows * hidden > 2**31
        x = draw("cuda", tokens, hidden, dtype=torch.bfloat16)
        rows = mk.dispatch(x, plan)
        for part in (slice(0, 64), slice(-64, None)):
            assert torch.equal(rows[part], x[plan.token_indices[part].long()])
        out = mk.combine(rows, plan)
    for token in (0, tokens - 1):
        mine = plan.row_indices[2 * token : 2 * token + 2].long()
        exact = (rows[mine].double() * plan.routing_weights[mine].double().unsqueeze(1)).sum(0)
        assert relative_error(out[token], exact) < 1e-2


@pytest.mark.gpu
def test_an_expert_mlp_beyond_32_bit_addresses(unpoisoned):
    require_memory(32)
    hidden, inner, experts = 64, 4096, 4
    tokens = OVER_32_BITS // (2 * inner) + 3
    logits = draw("cuda", tokens, experts)
    x = draw("cuda", tokens, hidden, dtype=torch.bfloat16)
    upstream = torch.randn_like(x)
    w_in = draw("cuda", experts, inner, hidden, dtype=torch.bfloat16, scale=0.1)
    w_out = draw("cuda", experts, hidden, inner, dtype=torch.bfloat16, scale=0.02)

    def run(part: slice) -> tuple[Tensor, Tensor]:
        """Output and gradient of some tokens; without the others they are the same."""
        with mk.use_backend("triton"):
            plan = mk.token_choice(logits[part], 2)
            leaf = x[part].clone().requires_grad_()
            out = mk.expert_mlp(leaf, plan, w_in, w_out)
            return out.detach(), torch.autograd.grad(out, leaf, upstream[part])[0]

    whole = run(slice(None))
    for part in (slice(0, 512), slice(-512, None)):
        for of_all, alone in zip(whole, run(part), strict=True):
            assert relative_error(of_all[part], alone) < 1e-2
