"""One small case for every expert MLP of another library, and its errors against fp64.

As a program it runs the installed Triton libraries in Triton's interpreter and prints their errors
as JSON: python -m tests.benchmarks.library_cases liger moe_ops
"""

import json
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.libraries import EXPERTS, ExpertMLP
from moe_kernels.testing import relative_error

TOKENS, HIDDEN_SIZE, WIDTH, NUM_EXPERTS, TOP_K = 13, 16, 24, 4, 2
EMPTY = 1  # this expert gets no token
NAMES = ("x", "weights", "w_in", "w_out")


@dataclass(frozen=True)
class Case:
    """Leaves in the order of ``NAMES``, the chosen experts, a random gradient of the output."""

    leaves: tuple[Tensor, ...]
    chosen: Tensor
    upstream: Tensor


def case(dtype: torch.dtype = torch.float32, collapsed: bool = False) -> Case:
    """Tokens that never choose one of the experts, or all of them the same two."""
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int, fan_in: int = 1) -> Tensor:
        return torch.randn(sizes, generator=generator).mul(fan_in**-0.5).to(dtype)

    logits = torch.randn(TOKENS, NUM_EXPERTS, generator=generator)
    logits[:, EMPTY] = -20.0
    if collapsed:
        logits += torch.tensor([0.0, 0.0, 30.0, 20.0])
    weights, chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
    leaves = (
        normal(TOKENS, HIDDEN_SIZE),
        weights,
        normal(NUM_EXPERTS, 2 * WIDTH, HIDDEN_SIZE, fan_in=HIDDEN_SIZE),
        normal(NUM_EXPERTS, HIDDEN_SIZE, WIDTH, fan_in=WIDTH),
    )
    return Case(leaves, chosen.int(), normal(TOKENS, HIDDEN_SIZE))


def exact(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Every token through each of its experts by itself."""
    tokens = []
    for token, of_token, numbers in zip(x, weights, chosen.tolist(), strict=True):
        out = torch.zeros_like(token)
        for weight, expert in zip(of_token, numbers, strict=True):
            hidden = w_in[expert] @ token
            gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
            out = out + weight * (w_out[expert] @ (gate * gate.sigmoid() * up))
        tokens.append(out)
    return torch.stack(tokens)


def errors(experts: ExpertMLP, given: Case) -> dict[str, float]:
    """Relative error of the output and of each gradient."""
    found = _outputs(experts, given.leaves, given)
    wanted = _outputs(exact, tuple(leaf.double() for leaf in given.leaves), given)
    return {name: relative_error(found[name], value) for name, value in wanted.items()}


def _outputs(experts: ExpertMLP, values: tuple[Tensor, ...], given: Case) -> dict[str, Tensor]:
    x, weights, w_in, w_out = leaves = [value.detach().requires_grad_() for value in values]
    out = experts(x, weights, given.chosen, w_in, w_out)
    gradients = torch.autograd.grad(out, leaves, given.upstream.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}


def _without_tuning(package: str) -> None:
    """Leave each kernel one configuration: the interpreter cannot time several."""
    from triton.runtime.autotuner import Autotuner

    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == package]
    for module in modules:
        for kernel in list(vars(module).values()):
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[:1]


def main(names: list[str]) -> None:
    """Print the errors, or why there are none, by the name of the provider."""
    found: dict[str, dict[str, float] | str] = {}
    for name in names:
        library = EXPERTS[name].library
        reason = library.why_not_importable()
        if reason is None:
            experts = EXPERTS[name].experts.make()
            _without_tuning(library.module)
            found[name] = errors(experts, case())
        else:
            found[name] = reason
    print(json.dumps(found))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("TRITON_INTERPRET has to be 1 before Triton is imported")
    main(sys.argv[1:])
