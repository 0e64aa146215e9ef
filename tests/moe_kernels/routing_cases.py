"""Every way to route and every result of a plan, for the tests of the compiled routers."""

from typing import Any

import moe_kernels as mk

ROUTES: dict[str, Any] = {
    "token_choice": lambda logits, **options: mk.token_choice(
        logits, 3, num_groups=2, affinity="softmax", **options
    ),
    "sigmoid": lambda logits, **options: mk.token_choice(
        logits, 2, num_groups=2, affinity="sigmoid", **options
    ),
    "expert_choice": lambda logits, **options: mk.expert_choice(logits, num_groups=2, **options),
    "sigmoid_choice": lambda logits, **options: mk.expert_choice(
        logits, affinity="sigmoid", num_groups=2, **options
    ),
    "identity": lambda logits, **options: mk.expert_choice(
        logits, affinity="identity", num_groups=2, **options
    ),
}
RESULTS: dict[str, Any] = {
    "balance": mk.load_balance_loss,
    "per_sequence": lambda plan, **o: mk.load_balance_loss(plan, per_sequence=True, **o),
    "counts": lambda plan, **o: mk.load_balance_loss(
        plan, tokens_per_expert=plan.tokens_per_expert.flip(0) + 3, **o
    ),
    "z": mk.router_z_loss,
    "similarity": mk.router_similarity_loss,
    "mean_prob": lambda plan, **_: plan.stats.mean_prob,
    "entropy": lambda plan, **_: plan.stats.entropy,
    "unrouted": lambda plan, **_: (plan.stats.unrouted_fraction * plan.num_tokens).round().int(),
    "histogram": lambda plan, **_: plan.stats.experts_per_token_histogram,
    "weights": lambda plan, **_: plan.routing_weights,
    "probs": lambda plan, **_: plan.router_probs,
}
PER_TOKEN = {"normalize": "per_token", "scale": 2.5}
