"""Router losses against their formulae and closed-form values."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import LOGIT_KINDS, make_logits


def selection(plan: mk.RoutingPlan) -> torch.Tensor:
    mask = torch.zeros(plan.num_tokens, plan.num_experts, dtype=torch.float64)
    mask[plan.token_indices.long(), plan.expert_of_row.long()] = 1.0
    return mask


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_load_balance_follows_the_formula(kind, affinity, per_sequence):
    tokens, experts, top_k, sequences = 24, 4, 2, 3
    logits = make_logits(tokens, experts, kind, dtype=torch.float64)
    plan = mk.token_choice(logits, top_k, affinity=affinity, num_groups=sequences)
    probs = torch.softmax(logits, -1)
    if affinity == "sigmoid":
        probs = torch.sigmoid(logits) / torch.sigmoid(logits).sum(-1, keepdim=True)
    pools = torch.arange(tokens).chunk(sequences if per_sequence else 1)
    terms = []
    for pool in pools:
        frequency = experts / (top_k * len(pool)) * selection(plan)[pool].sum(0)
        terms.append((frequency * probs[pool].mean(0)).sum())
    torch.testing.assert_close(
        mk.load_balance_loss(plan, per_sequence=per_sequence), torch.stack(terms).mean()
    )


def test_load_balance_is_one_when_uniform_and_num_experts_when_collapsed():
    # Token t prefers expert t mod 4 by a hair, so counts and probabilities are uniform.
    logits = 1e-6 * torch.eye(4, dtype=torch.float64).repeat(8, 1)
    uniform = mk.token_choice(logits, 1)
    assert uniform.tokens_per_expert.tolist() == [8, 8, 8, 8]
    torch.testing.assert_close(
        mk.load_balance_loss(uniform), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-12
    )
    one_hot = torch.full((32, 4), -1e3, dtype=torch.float64)
    one_hot[:, 2] = 0.0
    collapsed = mk.load_balance_loss(mk.token_choice(one_hot, 1))
    torch.testing.assert_close(
        collapsed, torch.tensor(4.0, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_counts_of_all_micro_batches_give_the_loss_of_the_large_batch():
    logits = make_logits(32, 4, dtype=torch.float64).requires_grad_()
    whole = mk.token_choice(logits, 2)
    expected = mk.load_balance_loss(whole)
    parts = [mk.token_choice(part, 2) for part in logits.chunk(4)]
    counts = sum(part.tokens_per_expert for part in parts)
    assert torch.equal(counts, whole.tokens_per_expert)
    losses = [mk.load_balance_loss(part, tokens_per_expert=counts) for part in parts]
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(
        torch.autograd.grad(mean, logits)[0], torch.autograd.grad(expected, logits)[0]
    )
    pooled_apart = torch.stack([mk.load_balance_loss(part) for part in parts]).mean()
    assert abs(float((pooled_apart - expected).detach())) > 1e-4  # the counts do matter


def test_z_loss_follows_the_formula():
    logits = make_logits(24, 4, dtype=torch.float64)
    expected = torch.log(torch.exp(logits).sum(-1)).square().mean()
    torch.testing.assert_close(mk.router_z_loss(mk.token_choice(logits, 2)), expected)
    torch.testing.assert_close(mk.router_z_loss(mk.expert_choice(logits)), expected)


@pytest.mark.parametrize("route", ["token", "expert"])
def test_similarity_follows_the_formula(route):
    logits = make_logits(24, 4, dtype=torch.float64)
    plan = mk.token_choice(logits, 2) if route == "token" else mk.expert_choice(logits)
    probs, mask = torch.softmax(logits, -1), selection(plan)
    gram, together = probs.T @ probs, mask.T @ mask
    experts, expected = 4, torch.zeros((), dtype=torch.float64)
    diagonal = sum(together[i, i] for i in range(experts))
    rest = together.sum() - diagonal
    for i in range(experts):
        for j in range(experts):
            if i == j:
                weight = experts * together[i, i] / diagonal
            else:
                weight = (experts**2 - experts) * together[i, j] / rest
            expected = expected + weight * gram[i, j]
    torch.testing.assert_close(mk.router_similarity_loss(plan), expected / 24)


def test_similarity_with_one_expert_per_token_has_no_pair_term():
    logits = make_logits(24, 4, dtype=torch.float64)
    plan = mk.token_choice(logits, 1)
    gram = torch.softmax(logits, -1).T @ torch.softmax(logits, -1)
    expected = (4 / 24 * plan.tokens_per_expert * torch.diagonal(gram)).sum() / 24
    torch.testing.assert_close(mk.router_similarity_loss(plan), expected)


@pytest.mark.parametrize("loss", ["load_balance_loss", "router_z_loss", "router_similarity_loss"])
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_gradcheck(loss, affinity):
    logits = make_logits(12, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: getattr(mk, loss)(mk.token_choice(logits, 2, affinity=affinity)), (logits,)
    )
    assert torch.autograd.gradcheck(
        lambda logits: getattr(mk, loss)(mk.expert_choice(logits, affinity=affinity)), (logits,)
    )
