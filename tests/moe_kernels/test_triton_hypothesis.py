"""A few examples of the property tests of routing and experts on the Triton backend.

The generic files run them on the other backends only: the interpreter is slow.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_kernels as mk
from moe_kernels.backends import BACKENDS

from . import test_expert_mlp, test_router

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    with mk.use_backend("triton"):
        yield "triton"


def few(test: Any, strategies: dict[str, Any], examples: int = 4) -> Callable[[], None]:
    """The test with a handful of examples."""
    limits = settings(max_examples=examples, deadline=None)
    return limits(given(**strategies)(test.hypothesis.inner_test))


test_expert_choice_invariants = few(
    test_router.test_expert_choice_invariants, test_router.EXPERT_CHOICE
)
test_token_choice_invariants = few(
    test_router.test_token_choice_invariants, test_router.TOKEN_CHOICE
)
test_routing_of_an_image_does_not_depend_on_its_batch = few(
    test_router.test_routing_of_an_image_does_not_depend_on_its_batch,
    {**test_router.BATCHES, "batch": st.integers(2, 3)},
    examples=2,
)
test_unchosen_tokens_get_exact_zeros = few(
    test_expert_mlp.test_unchosen_tokens_get_exact_zeros, test_expert_mlp.CAPACITIES
)
test_full_capacity_equals_the_dense_softmax_mixture = few(
    test_expert_mlp.test_full_capacity_equals_the_dense_softmax_mixture, test_expert_mlp.GROUPS
)
