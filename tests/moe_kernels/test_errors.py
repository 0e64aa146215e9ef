"""Bad input: a ``ValueError`` that names the argument and shows the values."""

import re

import pytest
import torch

import moe_kernels as mk

LOGITS = torch.zeros(8, 4)
PLAN = mk.token_choice(LOGITS, 2)
X = torch.zeros(8, 6)
W_IN, W_OUT = torch.zeros(4, 10, 6), torch.zeros(4, 6, 10)
NAN = torch.tensor([[0.0, float("nan")], [0.0, float("inf")]])

CASES = {
    "rank": (lambda: mk.expert_choice(torch.zeros(2, 3, 4)), "router_logits has shape (2, 3, 4)"),
    "not a tensor": (lambda: mk.token_choice([[1.0]]), "router_logits is a list"),
    "integer logits": (
        lambda: mk.token_choice(torch.zeros(8, 4, dtype=torch.int32)),
        "torch.int32",
    ),
    "no experts": (lambda: mk.expert_choice(torch.zeros(8, 0)), "num_experts"),
    "K > E": (lambda: mk.token_choice(LOGITS, 5), "top_k is 5; expected at most num_experts = 4"),
    "K = 0": (lambda: mk.token_choice(LOGITS, 0), "top_k is 0"),
    "K is no integer": (lambda: mk.token_choice(LOGITS, 1.5), "top_k is 1.5"),
    "groups": (
        lambda: mk.expert_choice(LOGITS, num_groups=3),
        "num_groups 3 does not divide the 8",
    ),
    "sequences": (lambda: mk.token_choice(LOGITS, num_groups=3), "num_groups 3 does not divide"),
    "capacity": (
        lambda: mk.expert_choice(LOGITS, capacity=9),
        "capacity is 9; expected at most the 8",
    ),
    "capacity 0": (lambda: mk.expert_choice(LOGITS, capacity=0), "capacity is 0"),
    "both": (lambda: mk.expert_choice(LOGITS, 2.0, capacity=2), "give only one"),
    "rounding of C": (
        lambda: mk.expert_choice(LOGITS, capacity=2, multiple_of=2),
        "nothing to round",
    ),
    "factor": (lambda: mk.expert_choice(LOGITS, 5.0), "asks for 10 tokens an expert"),
    "factor 0": (lambda: mk.expert_choice(LOGITS, 0.0), "capacity_factor is 0.0"),
    "factor nan": (lambda: mk.expert_choice(LOGITS, float("nan")), "capacity_factor is nan"),
    "multiple": (lambda: mk.expert_choice(LOGITS, 2.0, multiple_of=16), "asks for 16 tokens"),
    "affinity": (lambda: mk.expert_choice(LOGITS, affinity="tanh"), "affinity is 'tanh'"),
    "token identity": (
        lambda: mk.token_choice(LOGITS, affinity="identity"),
        "affinity is 'identity'",
    ),
    "normalize": (lambda: mk.expert_choice(LOGITS, normalize="yes"), "normalize is 'yes'"),
    "identity sum": (
        lambda: mk.expert_choice(LOGITS, affinity="identity", normalize="per_token"),
        "raw logits can sum to 0",
    ),
    "bias": (
        lambda: mk.token_choice(LOGITS, selection_bias=torch.zeros(3)),
        "selection_bias has shape (3,); expected (4,)",
    ),
    "expert groups": (
        lambda: mk.token_choice(LOGITS, num_expert_groups=3),
        "does not divide num_exp",
    ),
    "top groups": (
        lambda: mk.token_choice(LOGITS, num_expert_groups=2, top_k_groups=3),
        "top_k_groups is 3",
    ),
    "unreachable K": (
        lambda: mk.token_choice(LOGITS, 3, num_expert_groups=2, top_k_groups=1),
        "leave 2 experts",
    ),
    "non-finite": (lambda: mk.expert_choice(NAN), "2 non-finite of 4 values, the first at"),
    "non-finite token choice": (lambda: mk.token_choice(NAN, 1), "(token, expert) = (0, 1)"),
    "other tokens": (lambda: mk.dispatch(torch.zeros(9, 6), PLAN), "the plan was made for 8"),
    "other rows": (lambda: mk.combine(torch.zeros(9, 6), PLAN), "expected the plan's 16 rows"),
    "w_in": (lambda: mk.expert_mlp(X, PLAN, W_OUT, W_OUT), "w_in has shape (4, 6, 10)"),
    "swiglu w_in": (
        lambda: mk.expert_mlp(X, PLAN, W_IN, W_OUT, activation="swiglu"),
        "expected (4, 20, 6)",
    ),
    "w_out": (
        lambda: mk.expert_mlp(X, PLAN, W_IN, W_OUT.transpose(1, 2)),
        "w_in has shape (4, 10, 6); expected (4, 6, 6)",
    ),
    "bias_in": (
        lambda: mk.expert_mlp(X, PLAN, W_IN, W_OUT, bias_in=torch.zeros(4, 6)),
        "bias_in has shape (4, 6); expected (4, 10)",
    ),
    "dtype": (lambda: mk.expert_mlp(X.half(), PLAN, W_IN, W_OUT), "w_in is torch.float32"),
    "activation": (
        lambda: mk.expert_mlp(X, PLAN, W_IN, W_OUT, activation="relu"),
        "activation is 'relu'",
    ),
    "gemm columns": (
        lambda: mk.grouped_gemm(torch.zeros(16, 5), W_IN, PLAN.expert_offsets),
        "rows has 5 columns",
    ),
    "gemm offsets": (
        lambda: mk.grouped_gemm(torch.zeros(16, 6), W_IN, PLAN.expert_offsets.long()),
        "torch.int64",
    ),
    "gemm equal rows": (
        lambda: mk.grouped_gemm(torch.zeros(16, 6), W_IN, PLAN.expert_offsets, rows_per_expert=5),
        "rows_per_expert 5 times 4",
    ),
    "gemm short offsets": (
        lambda: mk.grouped_gemm(torch.zeros(20, 6), W_IN, PLAN.expert_offsets),
        "end at the 20 rows given",
    ),
    "gemm falling offsets": (
        lambda: mk.grouped_gemm(
            torch.zeros(4, 6), W_IN, torch.tensor([0, 3, 2, 4, 4], dtype=torch.int32)
        ),
        "never fall",
    ),
    "gemm dtype": (
        lambda: mk.grouped_gemm(torch.zeros(16, 6).half(), W_IN, PLAN.expert_offsets),
        "expected one dtype",
    ),
    "loss counts": (
        lambda: mk.load_balance_loss(PLAN, tokens_per_expert=torch.zeros(3)),
        "tokens_per_expert has shape (3,); expected (4,)",
    ),
    "loss pools": (
        lambda: mk.load_balance_loss(
            PLAN, per_sequence=True, tokens_per_expert=PLAN.tokens_per_expert
        ),
        "Give only one",
    ),
    "layer rank": (lambda: mk.MoE(6, 8, 4)(X), "x has shape (8, 6); expected 3 dimensions"),
    "layer width": (
        lambda: mk.MoE(6, 8, 4)(torch.zeros(1, 8, 5)),
        "expected (batch_size, seq_len, 6)",
    ),
    "layer router": (
        lambda: mk.MoE(6, 8, 4, router=mk.TokenChoiceRouter(6, 5)),
        "router was built for hidden_size 6 and num_experts 5",
    ),
    "layer size": (lambda: mk.MoE(6, 0, 4), "intermediate_size is 0"),
    "router group": (
        lambda: mk.ExpertChoiceRouter(6, 4, group=5)(torch.zeros(1, 8, 6)),
        "group is 5 tokens",
    ),
    "router group name": (lambda: mk.ExpertChoiceRouter(6, 4, group="row"), "group is 'row'"),
}


# Found by reading the values, for which a GPU would have to be waited for.
READ_ON_THE_HOST = ("gemm short offsets", "gemm falling offsets")


@pytest.mark.parametrize("name", CASES)
def test_value_error_names_the_argument(name, backend):
    if name in READ_ON_THE_HOST and backend == "triton":
        pytest.skip("the Triton backend never reads a tensor on the host")
    call, words = CASES[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_check_finite_is_an_option():
    plan = mk.token_choice(NAN, 1, check_finite=False)
    assert plan.expert_indices.tolist() == [[0], [0]]
    mk.expert_choice(torch.zeros(4, 2), check_finite=True)
