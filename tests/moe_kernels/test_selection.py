"""Plans of any selection: row order, weights, gradients, losses; the two choices built on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_kernels as mk
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits


def random_selection(num_tokens: int, num_experts: int, share: float = 0.4) -> Tensor:
    return torch.rand(num_tokens, num_experts) < share


def pairs_of(plan: mk.RoutingPlan) -> list[tuple[int, int]]:
    """(expert, token) of each row."""
    return list(zip(plan.expert_of_row.tolist(), plan.token_indices.tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_rows_are_the_chosen_pairs_by_expert_and_then_token(
    num_tokens: int, num_experts: int, share: float, counted: bool
) -> None:
    chosen = random_selection(num_tokens, num_experts, share)
    logits = make_logits(num_tokens, num_experts)
    num_rows = int(chosen.sum()) if counted else None
    plan = mk.plan_from_selection(chosen, logits, num_rows=num_rows).validate()
    expected = [(e, t) for e in range(num_experts) for t in range(num_tokens) if chosen[t, e]]
    assert pairs_of(plan) == expected
    assert plan.router == "selection"
    assert plan.tokens_per_expert.tolist() == chosen.sum(0).tolist()
    assert plan.experts_per_token.tolist() == chosen.sum(1).tolist()
    assert (plan.capacity, plan.top_k, plan.rows_per_expert) == (None, None, None)


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "identity"])
def test_weights_are_the_affinities_of_the_pairs(affinity: str) -> None:
    chosen, logits = random_selection(11, 4), make_logits(11, 4, dtype=torch.float64)
    plan = mk.plan_from_selection(chosen, logits, affinity=affinity, scale=2.5)
    table = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "identity": logits}
    expected = torch.stack([2.5 * table[affinity][t, e] for e, t in pairs_of(plan)])
    torch.testing.assert_close(plan.routing_weights, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_per_token_weights_sum_to_the_scale(affinity: str) -> None:
    chosen, logits = random_selection(40, 5), make_logits(40, 5)
    plan = mk.plan_from_selection(
        chosen, logits, affinity=affinity, normalize="per_token", scale=2.5
    )
    ones = mk.combine(torch.ones(plan.num_rows, 1), plan)[:, 0]
    expected = torch.where(chosen.any(1), 2.5, 0.0)
    torch.testing.assert_close(ones, expected, rtol=1e-6, atol=0)


def test_given_gates_take_the_place_of_the_affinity_in_the_weights_alone() -> None:
    chosen, logits, gates = random_selection(9, 3), make_logits(9, 3), torch.rand(9, 3)
    plan = mk.plan_from_selection(chosen, logits, gates=gates)
    expected = [float(gates[t, e]) for e, t in pairs_of(plan)]
    assert plan.routing_weights.tolist() == expected
    own = mk.plan_from_selection(chosen, logits)
    assert torch.equal(mk.router_z_loss(plan), mk.router_z_loss(own))


@pytest.mark.parametrize("normalize", ["none", "per_token"])
def test_gradients_of_the_weights(normalize: str) -> None:
    chosen = random_selection(6, 4)
    logits = make_logits(6, 4, dtype=torch.float64).requires_grad_()

    def weights(given: Tensor) -> Tensor:
        return mk.plan_from_selection(chosen, given, normalize=normalize).routing_weights

    assert torch.autograd.gradcheck(weights, (logits,))


def _layer(x: Tensor, plan: mk.RoutingPlan, w_in: Tensor, w_out: Tensor) -> Tensor:
    return mk.expert_mlp(x, plan, w_in, w_out, activation="gelu")


def _written_out(x: Tensor, chosen: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    hidden = torch.nn.functional.gelu(torch.einsum("td,efd->etf", x, w_in))
    every = torch.einsum("etf,edf->etd", hidden, w_out)
    return torch.einsum("etd,te->td", every, torch.where(chosen, gates, 0.0))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_experts_compute_what_the_written_out_sum_does(share: float) -> None:
    tokens, experts, size, inner = 13, 4, 8, 16
    chosen = random_selection(tokens, experts, share)
    inputs = [torch.randn(tokens, size), torch.randn(tokens, experts)]
    inputs += [torch.randn(experts, inner, size), torch.randn(experts, size, inner)]
    upstream = torch.randn(tokens, size)

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        x, logits, w_in, w_out = (i.to(dtype).requires_grad_() for i in inputs)
        if ours:
            out = _layer(x, mk.plan_from_selection(chosen, logits), w_in, w_out)
        else:
            out = _written_out(x, chosen, logits.softmax(1), w_in, w_out)
        grads = torch.autograd.grad(out, (x, logits, w_in, w_out), upstream.to(dtype))
        return [out, *grads]

    plain, exact = run(torch.float32, False), run(torch.float64, False)
    for actual, same, wanted in zip(run(torch.float32, True), plain, exact, strict=True):
        assert_as_accurate(actual, same, wanted)


def test_losses_and_telemetry_of_a_ragged_plan() -> None:
    chosen = random_selection(12, 4)
    chosen[3] = False
    logits = make_logits(12, 4, dtype=torch.float64)
    plan = mk.plan_from_selection(chosen, logits, num_groups=3)
    probs, held = logits.softmax(1), chosen.double()
    load = held.sum(0) * (4 / held.sum())
    torch.testing.assert_close(mk.load_balance_loss(plan), (load * probs.mean(0)).sum())
    torch.testing.assert_close(mk.router_z_loss(plan), logits.logsumexp(1).square().mean())
    parts = []
    for image in range(3):
        rows = slice(4 * image, 4 * image + 4)
        share = held[rows].sum(0) * (4 / held[rows].sum())
        parts.append((share * probs[rows].mean(0)).sum())
    per_sequence = mk.load_balance_loss(plan, per_sequence=True)
    torch.testing.assert_close(per_sequence, torch.stack(parts).mean())
    together = held.T @ held
    off = together - torch.diag(together.diag())
    weights = torch.diag(together.diag()) * 4 / together.trace() + off * 12 / off.sum()
    expected = (weights * (probs.T @ probs)).sum() / 12
    torch.testing.assert_close(mk.router_similarity_loss(plan), expected)
    stats = plan.stats
    assert (
        stats.experts_per_token_histogram.tolist()
        == torch.bincount(chosen.sum(1), minlength=5).tolist()
    )
    assert float(stats.unrouted_fraction) == pytest.approx(float((~chosen.any(1)).double().mean()))


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        logits = torch.randn(200, 8, requires_grad=True)
        plan = mk.pair_choice(logits, 411, affinity="sigmoid", normalize="per_token")
        (grad,) = torch.autograd.grad(
            plan.routing_weights, logits, torch.randn(plan.routing_weights.shape)
        )
        return [plan.routing_weights, plan.token_indices, plan.row_indices, grad]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 60])
def test_pair_choice_takes_the_best_pairs_and_the_lower_index_on_ties(
    kind: str, num_rows: int
) -> None:
    logits = make_logits(12, 5, kind)
    plan = mk.pair_choice(logits, num_rows).validate()
    order = sorted((-float(logits[t, e]), t, e) for t in range(12) for e in range(5))
    expected = sorted((e, t) for _, t, e in order[:num_rows])
    assert pairs_of(plan) == expected
    assert plan.routing_weights.tolist() == [float(logits[t, e]) for e, t in expected]


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("normalize", ["none", "per_token"])
def test_equal_capacities_are_plain_expert_choice(kind: str, normalize: str) -> None:
    logits = make_logits(24, 4, kind)
    options = {"affinity": "softmax", "normalize": normalize, "scale": 1.5}
    ours = mk.expert_choice_per_group(logits, [3, 3, 3], **options).validate()
    plain = mk.expert_choice(logits, capacity=3, num_groups=3, **options, backend="reference")
    assert torch.equal(ours.token_indices, plain.token_indices)
    assert torch.equal(ours.row_indices, plain.row_indices)
    assert torch.equal(ours.expert_offsets, plain.expert_offsets)
    assert torch.equal(ours.routing_weights, plain.routing_weights)


def test_each_group_is_expert_choice_with_its_own_capacity() -> None:
    logits, capacities = make_logits(32, 3), [1, 8, 0, 5]
    plan = mk.expert_choice_per_group(logits, capacities).validate()
    assert plan.num_rows == 3 * sum(capacities)
    got = {group: set() for group in range(4)}
    for expert, token in pairs_of(plan):
        got[token // 8].add((expert, token % 8))
    for group, capacity in enumerate(capacities):
        wanted = set()
        if capacity:
            alone = mk.expert_choice(logits[8 * group : 8 * group + 8], capacity=capacity)
            wanted = set(pairs_of(alone))
        assert got[group] == wanted


def test_both_choices_compile_without_a_graph_break() -> None:
    logits = make_logits(24, 4).requires_grad_()

    def both(given: Tensor) -> tuple[Tensor, ...]:
        pairs = mk.pair_choice(given, 50)
        groups = mk.expert_choice_per_group(given, [2, 5, 1], normalize="per_token")
        return pairs.routing_weights, pairs.token_indices, groups.routing_weights

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(logits), both(logits), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chosen": torch.ones(6, 3)}, "chosen is torch.float32"),
        ({"chosen": torch.ones(6, 2, dtype=torch.bool)}, r"chosen has shape \(6, 2\)"),
        ({"num_rows": 4}, "num_rows is 4, but chosen has 18 True"),
        ({"affinity": "cosine"}, "affinity is 'cosine'"),
        ({"normalize": "sum"}, "normalize is 'sum'"),
        ({"affinity": "identity", "normalize": "per_token"}, "raw logits can sum to 0"),
        ({"num_groups": 4}, "num_groups 4 does not divide"),
        ({"gates": torch.ones(3, 3)}, r"gates has shape \(3, 3\)"),
        ({"router_logits": torch.full((6, 3), float("nan"))}, "18 non-finite"),
    ],
)
def test_wrong_selections_are_refused(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "chosen": torch.ones(6, 3, dtype=torch.bool), "router_logits": torch.zeros(6, 3)
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mk.plan_from_selection(**(given | arguments))  # type: ignore[arg-type]


def test_wrong_counts_are_refused() -> None:
    logits = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="num_rows is 19; expected 0 to the 18"):
        mk.pair_choice(logits, 19)
    with pytest.raises(ValueError, match=r"capacities are \[4, 1\]; expected 0 to 3"):
        mk.expert_choice_per_group(logits, [4, 1])
    with pytest.raises(ValueError, match="4 capacities for 6 tokens"):
        mk.expert_choice_per_group(logits, [1, 1, 1, 1])
