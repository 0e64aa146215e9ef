"""Plans of choices that somebody else has made."""

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.testing import assert_as_accurate, make_logits

EXPERTS, HIDDEN, INNER = 5, 6, 7


def choices_of(plan: mk.RoutingPlan) -> tuple[Tensor, Tensor]:
    """(T, K) expert indices and weights of a token choice."""
    index = plan.expert_indices.long()
    rows = plan.row_indices.long().view(index.shape)  # by rising expert
    by_expert = plan.routing_weights[rows]
    place = index.argsort(dim=-1).argsort(dim=-1)
    return index, by_expert.gather(1, place)


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    index, weights = choices_of(mk.token_choice(make_logits(11, EXPERTS), 2, backend="reference"))
    return index, weights.detach()


@pytest.mark.parametrize("kind", ["normal", "ties", "collapsed"])
@pytest.mark.parametrize(("tokens", "top_k"), [(11, 1), (11, 2), (8, 5), (1, 3), (0, 2)])
def test_it_is_the_plan_of_the_router_that_chose_so(tokens, top_k, kind):
    routed = mk.token_choice(make_logits(tokens, EXPERTS, kind), top_k)
    index, weights = choices_of(routed)
    plan = mk.plan_from_choices(index, weights, EXPERTS)
    for name in (
        "token_indices",
        "expert_offsets",
        "tokens_per_expert",
        "row_indices",
        "row_offsets",
        "expert_indices",
        "routing_weights",
        "expert_of_row",
        "experts_per_token",
    ):
        expected, actual = getattr(routed, name), getattr(plan, name)
        assert actual.dtype == expected.dtype, name
        assert torch.equal(actual, expected), name
    assert (plan.num_tokens, plan.num_rows, plan.top_k) == (tokens, tokens * top_k, top_k)
    assert plan.rows_per_expert is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_integers_of_any_width(given, dtype):
    index, weights = given
    plan, wide = (mk.plan_from_choices(i, weights, EXPERTS) for i in (index.to(dtype), index))
    assert torch.equal(plan.token_indices, wide.token_indices)
    assert plan.expert_indices.dtype == torch.int32


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_in_fp32_at_least(given, dtype, wide):
    index, weights = given
    plan = mk.plan_from_choices(index, weights.to(dtype), EXPERTS)
    assert plan.routing_weights.dtype == plan.router_logits.dtype == wide
    assert plan.router_logits.shape == (11, 0)


def test_strides_do_not_matter(given):
    index, weights = given
    plan = mk.plan_from_choices(index, weights, EXPERTS)
    spread = mk.plan_from_choices(index.t().contiguous().t(), weights.t().contiguous().t(), EXPERTS)
    assert torch.equal(spread.token_indices, plan.token_indices)
    assert torch.equal(spread.routing_weights, plan.routing_weights)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    x, w_in, w_out = torch.randn(11, HIDDEN), torch.randn(EXPERTS, INNER, HIDDEN), None
    w_out = torch.randn(EXPERTS, HIDDEN, INNER)
    return x, w_in, w_out


def by_hand(x: Tensor, index: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Every token by each of its experts."""
    h = torch.einsum("tkfd,td->tkf", w_in[index], x)
    y = torch.einsum("tkdf,tkf->tkd", w_out[index], torch.nn.functional.gelu(h))
    return (y * weights.unsqueeze(-1)).sum(1)


def assert_computes(index: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients are those by hand; returns the gradients."""
    x, w_in, w_out = tensors()
    upstream = torch.randn(11, HIDDEN, dtype=torch.float64)

    def results(dtype: torch.dtype, by: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weights, w_in, w_out)]
        tokens, given, up, down = leaves
        if by == "hand":
            out = by_hand(tokens, index, given, up, down)
        else:
            plan = mk.plan_from_choices(index, given, EXPERTS)
            out = mk.expert_mlp(tokens, plan, up, down, activation="gelu")
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    actual = results(torch.float32, "plan")
    plain, exact = results(torch.float32, "hand"), results(torch.float64, "hand")
    for ours, theirs, right in zip(actual, plain, exact, strict=True):
        assert_as_accurate(ours, theirs, right)
    return actual


def test_experts_of_chosen_tokens(given):
    assert_computes(*given)


def test_an_expert_that_nobody_chose(given):
    index, weights = given
    index = torch.where(index == 3, 4, index)
    gradients = assert_computes(index, weights)
    assert not gradients[3][3].any()
    assert gradients[3][4].any()


def test_an_expert_twice_for_a_token(given):
    index, weights = given
    index = index.clone()
    index[::2, 1] = index[::2, 0]
    plan = mk.plan_from_choices(index, weights, EXPERTS)
    assert plan.token_indices.bincount().tolist() == [2] * 11
    first = slice(*plan.row_offsets[:2].tolist())
    rows = plan.row_indices[first].long()
    assert torch.equal(plan.routing_weights[rows], weights[0])  # equal experts: in order of choice
    assert_computes(index, weights)


def test_weights_of_any_sign_and_size(given):
    index, weights = given
    scale = torch.tensor([-1.0, 0.0, 1e6]).repeat(4)[:11, None]
    assert_computes(index, weights * scale)


def test_gradcheck(given):
    index, weights = given
    w = torch.randn(11 * 2, dtype=torch.float64)

    def call(weights: Tensor) -> Tensor:
        return mk.plan_from_choices(index, weights, EXPERTS).routing_weights * w

    assert torch.autograd.gradcheck(call, (weights.double().requires_grad_(),))


def test_dispatch_and_combine_are_inverse(given):
    index, _ = given
    plan = mk.plan_from_choices(index, torch.full((11, 2), 0.5), EXPERTS)
    x = torch.randn(11, HIDDEN)
    rows = mk.dispatch(x, plan)
    assert torch.equal(rows, x[plan.token_indices.long()])
    torch.testing.assert_close(mk.combine(rows, plan), x)


def test_no_tokens():
    plan = mk.plan_from_choices(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), EXPERTS)
    _, w_in, w_out = tensors()
    w_in.requires_grad_()
    out = mk.expert_mlp(torch.zeros(0, HIDDEN), plan, w_in, w_out)
    assert out.shape == (0, HIDDEN)
    (gradient,) = torch.autograd.grad(out, [w_in], torch.zeros_like(out))
    assert not gradient.any()


def test_one_graph(given, monkeypatch):
    monkeypatch.undo()  # the poisoned methods cannot be traced
    index, weights = given
    x, w_in, w_out = tensors()

    def call(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        plan = mk.plan_from_choices(index, weights, EXPERTS)
        return mk.expert_mlp(x, plan, w_in, w_out, activation="gelu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weights), call(x, index, weights))


def test_what_needs_logits_refuses_the_plan(given):
    plan = mk.plan_from_choices(*given, EXPERTS)
    for call in (
        mk.load_balance_loss,
        mk.router_z_loss,
        mk.router_similarity_loss,
        mk.routing_stats,
        lambda plan: plan.stats,
    ):
        with pytest.raises(ValueError, match="made from choices and has no router logits"):
            call(plan)


@pytest.mark.parametrize(
    ("index", "weights", "experts", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), 4, "expert_indices is torch.float32"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), 4, "routing_weights has dtype"),
        (torch.zeros(3).int(), torch.zeros(3), 4, "expected 2 dimensions"),
        (torch.zeros(3, 1).int(), torch.zeros(3, 2), 4, r"expert_indices has shape \(3, 1\)"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2), 0, "num_experts is 0"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2), 2.5, "num_experts is 2.5"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2, device="meta"), 4, "move them to one device"),
        (torch.zeros(3, 2) > 0, torch.zeros(3, 2), 4, "expert_indices is torch.bool"),
        ([[0, 1]], torch.zeros(1, 2), 4, "expert_indices is a list"),
    ],
    ids=["float index", "int weights", "one", "shapes", "none", "half", "device", "bool", "list"],
)
def test_what_is_refused(index, weights, experts, message):
    with pytest.raises(ValueError, match=message):
        mk.plan_from_choices(index, weights, experts)


def test_validation_of_what_there_is(given):
    mk.plan_from_choices(*given, EXPERTS).validate()
    mk.plan_from_choices(*(t[:0] for t in given), EXPERTS).validate()
