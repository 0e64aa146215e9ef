"""megablocks in the benchmarks, on a stand-in with the names of release 0.10.0."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.check import judge
from benchmarks.entry import Run
from benchmarks.libraries import EXPERTS, megablocks, table
from benchmarks.libraries.survey import record
from benchmarks.stages import STAGES

from . import library_stand_ins as stand_ins
from .library_cases import case, errors

BF16 = torch.bfloat16
NAMES = ("megablocks_grouped", "megablocks_sparse")
TOO_NEW = "Sparse MLP is not supported with triton >=3.2.0."


@dataclasses.dataclass
class Arguments:
    """The fields that the adapter sets, with megablocks' defaults."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    bias: bool = True
    activation_fn: Callable[[Tensor], Tensor] = F.gelu
    moe_num_experts: int = 1
    moe_top_k: int = 1
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    fp16: bool = True
    bf16: bool = False
    device: torch.device = torch.device("cuda")  # noqa: RUF009

    refused = ""  # the implementation that this machine cannot run

    def __post_init__(self) -> None:
        if self.mlp_impl == self.refused:
            raise ValueError(TOO_NEW)


made: list[Arguments] = []


class ParallelDroplessMLP(nn.Module):
    """Experts without a router; the products are fp32's, rounded once."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        assert args.mlp_type == "glu"
        assert not args.bias
        assert args.bf16
        assert not args.fp16
        if args.mlp_impl == "sparse":
            assert args.ffn_hidden_size % 128 == 0
        made.append(args)
        self.args, self.mlp = args, nn.Module()
        rows = args.moe_num_experts * args.ffn_hidden_size
        for name in ("w1", "v1", "w2"):
            matrix = torch.empty(rows, args.hidden_size, dtype=BF16, device=args.device)
            self.mlp.register_parameter(name, nn.Parameter(matrix))

    def forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> Any:
        args, mlp = self.args, self.mlp
        assert x.dim() == 2
        assert expert_weights.shape == top_experts.shape == (x.shape[0], args.moe_top_k)
        sizes = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
        for w in (mlp.w1, mlp.v1, mlp.w2):
            assert w.dtype == BF16
            assert w.is_contiguous()
        w1, v1, w2 = (w.float().view(sizes)[top_experts] for w in (mlp.w1, mlp.v1, mlp.w2))
        tokens = x.float()[:, None, :, None]
        hidden = args.activation_fn(w1 @ tokens) * (v1 @ tokens)  # (T, K, F, 1)
        y = (w2.transpose(-1, -2) @ hidden).squeeze(-1)
        out = (y * expert_weights.float().unsqueeze(-1)).sum(1).to(x.dtype)
        return out, top_experts.flatten().bincount(minlength=args.moe_num_experts)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Arguments]:
    contents = {"Arguments": Arguments, "ParallelDroplessMLP": ParallelDroplessMLP}
    stand_ins.install(monkeypatch, megablocks=contents)
    monkeypatch.setattr(Arguments, "refused", "")
    for name in NAMES:
        here = dataclasses.replace(EXPERTS[name].library, devices=("cpu", "cuda"))
        monkeypatch.setitem(EXPERTS, name, dataclasses.replace(EXPERTS[name], library=here))
    made.clear()
    return Arguments


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("collapsed", [False, True])
def test_matrices_of_this_project_are_converted(collapsed):
    given = case(BF16, collapsed)
    found = errors(megablocks.grouped(), given)
    assert max(found.values()) < 2e-2, found
    with torch.no_grad():
        x, weights, w_in, w_out = given.leaves
        assert megablocks.grouped()(x, weights, given.chosen, w_in, w_out).shape == x.shape


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("impl", ["grouped", "sparse"])
def test_what_is_timed_is_right_and_converts_nothing(monkeypatch, impl):
    name = f"megablocks_{impl}"
    stage = STAGES["dit_moe_layer"]
    shape = {"B": 2, "S": 12, "D": 32, "E": 4, "skew": "collapsed"}
    inputs = stage.make_inputs(shape, BF16)
    run = stage.providers[name].build(inputs)
    assert set(run.leaves) == {"x", "router", "w1", "v1", "w2", "shared_in", "shared_out"}
    assert run.leaves["w1"][0].shape == (4 * 128, 32)
    with monkeypatch.context() as patched:
        for method in ("convert", "restore"):
            patched.setattr(megablocks.OwnLayout, method, None)  # calling it would raise
        run.call()
        run.call()
    assert [args.mlp_impl for args in made] == [impl, impl]  # one to look, one for the shape
    assert {args.device.type for args in made} == {"meta"}
    runs: dict[str, Run | str] = {name: run}
    verdict = judge(stage, inputs, runs, BF16)[name]
    assert verdict.status == "ok", verdict.reason
    assert {"out", "load_balance_loss", "dx", "drouter", "dw_in", "dw_out"} < set(verdict.errors)


@pytest.mark.usefixtures("installed")
def test_another_dtype_than_bfloat16_is_refused():
    with pytest.raises(ValueError, match=r"multiplies bfloat16 here, the tokens are torch.float32"):
        errors(megablocks.grouped(), case())


def test_a_path_that_megablocks_refuses_is_left_out_with_its_words(installed, monkeypatch):
    monkeypatch.setattr(installed, "refused", "sparse")
    with pytest.raises(ImportError, match=f"megablocks refuses 'sparse': {TOO_NEW}"):
        megablocks.sparse()
    found = record(table.MEGABLOCKS, torch.device("cpu"))
    assert found["status"] == "importable"
    assert (
        f"without megablocks_sparse: ImportError: megablocks refuses 'sparse': {TOO_NEW}"
        in (found["reason"])
    )
    monkeypatch.setattr(installed, "refused", "grouped")
    found = record(table.MEGABLOCKS, torch.device("cpu"))
    assert (found["status"], found["install"]) == ("skipped", list(megablocks.INSTALL))
    assert found["reason"].startswith("ImportError: megablocks refuses 'grouped'")


def test_a_missing_megablocks_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "megablocks", None)
    for make in (megablocks.grouped, megablocks.sparse):
        with pytest.raises(ImportError):
            make()
