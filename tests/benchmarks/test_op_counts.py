"""Operators of hand-made calls, and of this library's layers beside the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import op_counts
from benchmarks.gradients import step
from benchmarks.op_counts import count
from benchmarks.registry import find_entry
from benchmarks.stages import STAGES
from benchmarks.stages.common import count_experts, count_tokens

X = torch.randn(6, 4)
MASK = torch.tensor([True, False, True, True, False, True])
CHOSEN = torch.tensor([0, 2, 2, 1])


def masked_rows() -> None:
    x = X.clone()
    x[MASK] = torch.ones(4, 4)


def masked_fill() -> None:
    x = X.clone()
    x[MASK] = 0.0


CALLS = {
    "views": (lambda: X.view(2, 12)[:, 1:].t().unsqueeze(0).detach(), 0, 0),
    "uninitialised": (lambda: torch.empty_strided((2, 3), (3, 1)), 0, 0),
    "a common dtype": (lambda: torch.promote_types(X.dtype, torch.float64), 0, 0),
    "two products": (lambda: F.linear(X, X) @ X, 2, 0),
    "a copy by reshape": (lambda: X.t().reshape(-1), 1, 0),
    "item": (lambda: X.sum().item(), 1, 1),
    "bool": (lambda: bool(MASK.all()), 1, 1),
    "an index": (lambda: [1, 2, 3, 4, 5][MASK.sum()], 1, 1),
    "tolist": (lambda: CHOSEN.tolist(), 0, 1),
    "numpy": (lambda: X.numpy(), 0, 1),
    "cpu": (lambda: X.cpu(), 0, 1),
    "nonzero": (lambda: MASK.nonzero(), 1, 1),
    "where": (lambda: torch.where(MASK), 1, 1),
    "rows behind a mask": (lambda: X[MASK], 1, 1),
    "into rows behind a mask": (masked_rows, 3, 1),
    "one number behind a mask": (masked_fill, 2, 0),
    "masked_select": (lambda: X.masked_select(MASK.unsqueeze(1)), 1, 1),
    "rows by number": (lambda: X[CHOSEN], 1, 0),
    "unique": (lambda: CHOSEN.unique(), 1, 1),
    "bincount": (lambda: torch.bincount(CHOSEN, minlength=3), 1, 1),
    "repeats by number": (lambda: X.repeat_interleave(2, dim=0), 1, 0),
    "repeats by tensor": (lambda: CHOSEN.repeat_interleave(CHOSEN), 2, 1),
    "repeats of known size": (lambda: CHOSEN.repeat_interleave(CHOSEN, output_size=5), 2, 0),
    "one_hot": (lambda: F.one_hot(CHOSEN, 3), 2, 0),
    "one_hot of unknown size": (lambda: F.one_hot(CHOSEN), 3, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_and_reads(name):
    call, ops, reads = CALLS[name]
    assert count(call) == {"ops": ops, "device_reads": reads}


def test_the_backward_counts():
    x = X.clone().requires_grad_()
    forward = count(lambda: (x @ x.t()).exp())
    both = count(lambda: torch.autograd.grad((x @ x.t()).exp(), x, torch.ones(6, 6)))
    assert forward["ops"] == 2
    # ones, the two operators, their gradients (three products' worth) and a sum
    assert both["ops"] == 7


def test_the_same_numbers_as_on_a_gpu():
    """Plain providers count with ``bincount`` on a CPU only; what is counted is the other way."""
    for function in (count_experts, count_tokens):
        found = []
        counted = count(lambda f=function, out=found: out.append(f(CHOSEN, 4)))
        assert counted["device_reads"] == 0
        assert torch.equal(found[0], function(CHOSEN, 4))
    assert not op_counts.counting()


def test_a_call_that_raises_ends_the_counting():
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 // 0)
    assert not op_counts.counting()


def test_layers():
    found = {}
    for name in ("overhead/dit_moe_layer", "overhead/ec_layer"):
        entry = find_entry(name)
        stage = STAGES[entry.stage]
        inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
        for provider in ("good_eager", "ours"):
            run = stage.providers[provider].build(inputs)
            found[entry.stage, provider] = count(lambda r=run, i=inputs: step(r, i))
    assert found["dit_moe_layer", "good_eager"]["device_reads"] == 1  # the split's tolist
    for stage in ("dit_moe_layer", "ec_layer"):
        assert found[stage, "ours"]["device_reads"] == 0
        assert found[stage, "ours"]["ops"] < found[stage, "good_eager"]["ops"] / 2
