"""How stages of several backends go together, and what they leave to the reference."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.backends.stages import Stages
from moe_kernels.testing import make_logits

LOGITS = make_logits(8, 4)


@pytest.fixture(autouse=True)
def backend() -> None:
    """The tests choose by themselves."""


ROUTING = [
    name
    for name in ("cuda", "cpu", "triton")
    if backends.BACKENDS[name].why_not("expert_choice", "cpu") is None
]


@pytest.mark.parametrize("later", [*ROUTING, "reference"])
@pytest.mark.parametrize("routing", ROUTING)
def test_every_later_stage_takes_the_plan_of_another_backend(monkeypatch, routing, later):
    """``routing`` has the ops of routing only; the rest of the list serves what comes after."""
    known = dict(backends.BACKENDS)
    device_types = {"device_types": ("cpu",), "module": "a.routing"}
    known["routing"] = backends.Backend("routing", "routes", **device_types)
    ops = backends.BACKENDS[routing].implementations()
    routes = {name: ops[name] for name in ("expert_choice", "token_choice", "router_probs")}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setitem(backends._loaded, "routing", routes)
    x = torch.randn(8, 6)
    for route in (mk.expert_choice, mk.token_choice):
        results = []
        for names in (f"routing,{later},reference", "reference"):
            logits = LOGITS.clone().requires_grad_()
            with mk.use_backend(names):
                plan = route(logits)
                assert plan.backend == (routing if names != "reference" else "reference")
                losses = mk.load_balance_loss(plan), mk.router_z_loss(plan)
                similarity = mk.router_similarity_loss(plan)
                out = mk.combine(mk.dispatch(x, plan), plan)
            total = out.square().sum() + similarity + sum(losses)
            (gradient,) = torch.autograd.grad(total, logits)
            results.append((out.detach(), similarity.detach(), gradient))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_kernels_that_take_fewer_experts_leave_the_others_to_the_reference():
    stages = Stages("nowhere", has_fp64=False, largest_experts=3)
    options = {"affinity": "softmax", "normalize": "none", "scale": 1.0, "check_finite": False}
    by_expert = {"capacity": 2, "num_groups": 1, **options}
    by_token = {"selection_bias": None, "num_expert_groups": 1, "top_k_groups": 1, "num_groups": 1}
    assert stages.expert_choice(LOGITS, **by_expert).backend == "reference"
    assert stages.token_choice(LOGITS, top_k=2, **by_token, **options).backend == "reference"
    assert torch.equal(stages.router_probs(LOGITS, "softmax"), LOGITS.softmax(-1))
    with pytest.raises(KeyError, match="nowhere"):  # its own kernel is asked for
        stages.expert_choice(LOGITS[:, :3], **by_expert)
    assert stages.expert_choice(LOGITS[:, :3].double(), **by_expert).backend == "reference"
