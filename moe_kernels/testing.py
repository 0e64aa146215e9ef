"""Input makers and error metrics that tests and benchmarks share."""

import torch
from torch import Tensor

# Smallest error that a comparison is asked to meet, relative to the largest expected value: the
# twice-PyTorch's-error rule would otherwise ask for exact equality when plain PyTorch happens to
# be exact.
ERROR_FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def make_logits(
    num_tokens: int,
    num_experts: int,
    kind: str = "normal",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Router logits of a named kind.

    Kinds: ``"normal"``; ``"ties"`` (few distinct values); ``"equal"`` (all the same);
    ``"collapsed"`` (every token prefers expert 0); ``"extreme"`` (softmax saturates).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    if kind == "ties":
        logits = logits.mul(2).round().div(2).clamp(-1, 1)
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "collapsed":
        logits[:, 0] += 20.0
    elif kind == "extreme":
        logits = logits * 60.0
    else:
        assert kind == "normal", kind
    return logits.to(dtype)


LOGIT_KINDS = ("normal", "ties", "equal", "collapsed", "extreme")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Assert that ``actual`` errs at most ``factor`` times as much as plain PyTorch.

    Args:
        actual: result under test.
        plain: plain PyTorch's result in the same dtype.
        exact: the same computed in fp64.
        factor: allowed multiple of PyTorch's own error.
    """
    allowed = max(factor * relative_error(plain, exact), ERROR_FLOOR[actual.dtype])
    error = relative_error(actual, exact)
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"
