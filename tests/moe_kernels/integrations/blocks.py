"""Results of a block and of its original, compared.

Lower precision moves affinities, so a token whose choice hangs on the last digits goes elsewhere
in the original itself. Tests look for tokens where nothing is that close; the rule of twice the
original's error then fails for any other choice.
"""

import re

import torch
from torch import Tensor

from moe_kernels.testing import assert_as_accurate

Results = dict[str, Tensor]

# Relative distance of the last affinity taken from the first not taken. Logits below 2 in size are
# wrong by up to 0.004 in bf16, and affinities by 0.2 % more.
CLEAR = 0.015


def assert_parity(actual: Results, plain: Results, exact: Results) -> None:
    """Each result errs at most twice as much as the original in the same dtype.

    In 16 bits the experts' gradients are compared together: of one matrix, summed over few tokens,
    the largest error is a matter of luck.
    """
    assert actual.keys() == plain.keys() == exact.keys()
    if actual["out"].dtype.itemsize == 2:
        actual, plain, exact = (_experts_together(found) for found in (actual, plain, exact))
    for name, result in actual.items():
        assert result.dtype == plain[name].dtype, name
        try:
            assert_as_accurate(result, plain[name], exact[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def _experts_together(found: Results) -> Results:
    """Results with ``experts.0.name``, ``experts.1.name``, ... stacked as ``experts.name``."""
    together: dict[str, list[Tensor]] = {}
    for name, result in found.items():
        together.setdefault(re.sub(r"^experts\.\d+\.", "experts.", name), []).append(result)
    return {name: torch.stack(parts) for name, parts in together.items()}
