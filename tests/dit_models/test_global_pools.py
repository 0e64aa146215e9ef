"""Ranks with their own images against one process with all of them, for every routing."""

import copy
import pickle

import pytest
import torch
from torch import distributed
from torch.distributed import group

from dit_models.config import RouterLossConfig
from dit_models.router_losses import (
    layer_head_losses,
    own_coefficients,
    router_losses,
    routing_telemetry,
)
from dit_models.routing.layers import (
    average_observed,
    routers_of,
    set_progress,
    update_routers,
)
from moe_kernels.distributed import share_pools
from tests.dit_models.routing.models import inputs_for, moved, tiny
from tests.moe_kernels.distributed.global_pools import share_of
from tests.ranks import run_ranks

IMAGES = 12
SEQ_LEN = tiny("EC-DiT-tiny").seq_len
LOSSES = {"balance": 0.3, "z": 0.2, "similarity": 0.7}
BATCH = {"group": "batch"}
STAGES = {"capacity_by_stage": [[0.0, 2.0], [0.5, 1.0]]}
# name of tests.dit_models.routing.models.ROUTED or a preset, and changes of its configuration
ROUTINGS = {
    "expert_choice": ("EC-DiT-tiny", BATCH),
    "per_image": ("EC-DiT-tiny", {}),
    "pools_of_tokens": ("EC-DiT-tiny", {"group": 8}),
    "stages": ("EC-DiT-tiny", {**BATCH, "routing_options": STAGES}),
    "decoupled": ("decoupled", BATCH),
    "diffmoe": ("diffmoe", {}),
    "expert_race": ("expert_race", {}),
    "race_of_softmax": ("expert_race", {"affinity": "softmax"}),
    "token_choice": ("DiT-MoE-tiny", {}),
    "loss_free": ("loss_free", {}),
}
POOLED = {"expert_choice", "stages", "decoupled", "diffmoe", "expert_race", "race_of_softmax"}


def train_once(routing, sizes=None, equal_tokens=False, uneven=False, recompute=False):
    """One step's loss, gradients, statistics and what the routers learnt.

    ``sizes`` are images of each rank; without them this process has all of them.
    """
    name, changes = ROUTINGS[routing]
    config = tiny(name, **changes)
    with torch.random.fork_rng():
        model = moved(config).double().train()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs_for(config, IMAGES).items()
    }
    model.gradient_checkpointing = recompute
    where, ranks, process_group, shared = slice(None), 1, None, 0
    if sizes is not None:
        ranks, process_group = len(sizes), group.WORLD
        where = share_of(sizes)
        shared = share_pools(model, process_group, equal_tokens=equal_tokens)
    set_progress(model, 0.25)
    output = model(**{name: value[where] for name, value in inputs.items()})
    weights = RouterLossConfig(**LOSSES)
    own = own_coefficients(weights, config)
    if uneven:  # a head's loss is a mean over images
        own.pop("layer_head", None)
    heads = layer_head_losses(output, inputs["latents"][where], config.patch_size)
    losses, terms = router_losses(output, weights, None, own, heads, process_group=process_group)
    # The task's loss is a sum over images: what ranks add up is as in one process.
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(IMAGES, *output.sample.shape[1:], generator=generator).double()
    ((output.sample * upstream[where]).sum() + sum(terms) / ranks).backward()
    with torch.no_grad():
        observed = [output.observed]
        if process_group is not None:
            observed = [average_observed(observed, process_group)]
        update_routers(model, observed)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        losses = {name: value.detach() / ranks for name, value in losses.items()}
        if process_group is not None:
            for value in (*grads.values(), *losses.values()):
                distributed.all_reduce(value)
    return {
        "shared": shared,
        "sample": output.sample.detach(),
        "losses": losses,
        "grads": grads,
        "telemetry": routing_telemetry(output.plans, process_group),
        "learnt": {name: value for name, value in model.named_buffers() if "router" in name},
    }


def compare(routings, sizes, equal_tokens, recompute=False):
    """Worst relative errors of this rank's step, for each routing."""
    errors = {}
    for routing in routings:
        uneven = min(sizes) != max(sizes)
        expected = train_once(routing, uneven=uneven)
        found = train_once(routing, sizes, equal_tokens, uneven, recompute)
        errors[routing] = worst_errors(expected, found, share_of(sizes))
        assert (found["shared"] > 0) == (routing in POOLED), routing
    return errors


def worst_errors(expected, found, where):
    sample = expected["sample"][where]
    errors = {"sample": relative(found["sample"], sample, scale_of("sample", {"sample": sample}))}
    for part in ("losses", "grads", "telemetry", "learnt"):
        values = expected[part]
        assert found[part].keys() == values.keys()
        errors[part] = max(
            [relative(found[part][n], v, scale_of(n, values)) for n, v in values.items()],
            default=0.0,
        )
    return errors


def scale_of(name, values):
    """What a result is measured by: its own size, but a sum that is zero by the size of its terms.

    Attention does not see what is added to all keys alike, so that bias has rounding as gradient.
    """
    name = name.replace("k_norm.bias", "k_norm.weight")
    return values[name].double().abs().max().clamp_min(1e-3)


def relative(found, expected, scale):
    return float((found.double() - expected.double()).abs().max() / scale)


# fp32: the shares of rows and tokens, the thresholds
LIMITS = {"sample": 1e-12, "losses": 1e-12, "grads": 1e-12, "telemetry": 2e-7, "learnt": 2e-7}


def check(results):
    for errors in results:
        for routing, parts in errors.items():
            for part, error in parts.items():
                assert error <= LIMITS[part], (routing, part, error)


@pytest.mark.parametrize(("sizes", "equal_tokens"), [([6, 6], True), ([5, 1, 6], False)])
def test_a_step_of_several_ranks_is_that_of_one_process(sizes, equal_tokens):
    check(run_ranks(compare, len(sizes), list(ROUTINGS), sizes, equal_tokens))


def test_a_step_with_recomputed_blocks_is_that_of_one_process():
    pooled = ["expert_choice", "diffmoe", "expert_race"]
    check(run_ranks(compare, 2, pooled, [4, 8], False, True))


def differ():
    """Local pools: this rank's part of the sample, without ``share_pools``."""
    config = tiny("EC-DiT-tiny", **BATCH)
    model = moved(config)
    inputs = inputs_for(config, IMAGES)
    where = share_of([6, 6])
    part = {name: value[where] for name, value in inputs.items()}
    with torch.no_grad():
        whole = model.train()(**inputs).sample[where]
        local = model(**part).sample
        share_pools(model, group.WORLD)
        pooled = model(**part).sample
        copied = copy.deepcopy(model)(**part).sample
        stored = pickle.loads(pickle.dumps(model))(**part).sample
        share_pools(model, None)
        undone = model(**part).sample
    # One rank alone draws; the other would never answer.
    if distributed.get_rank() == 0:
        share_pools(model, group.WORLD)
        with torch.no_grad():
            drawn = model.eval()(**part).sample
        assert torch.equal(drawn, local)
    torch.testing.assert_close(pooled, whole)
    assert torch.equal(copied, pooled)
    assert torch.equal(stored, pooled)
    assert torch.equal(undone, local)
    assert not any("pool" in name for name in model.state_dict())
    return float((local - whole).abs().max())


def test_pools_are_shared_when_asked_for_and_only_in_training():
    assert min(run_ranks(differ, 2)) > 1e-3


def promise_equal_tokens():
    config = tiny("EC-DiT-tiny", **BATCH)
    model = moved(config).train()
    share_pools(model, group.WORLD, equal_tokens=True)
    # The last rank's number is the mean: its promise alone is true, and it must raise all the same.
    images = [1, 3, 2][distributed.get_rank()]
    with pytest.raises(ValueError, match=r"num_tokens_global is \d+ or \d+, but the ranks have"):
        model(**inputs_for(config, images))


def test_a_wrong_promise_of_equal_tokens_raises_on_every_rank():
    run_ranks(promise_equal_tokens, 3)


def straddle():
    model = moved(tiny("EC-DiT-tiny", group=2 * SEQ_LEN)).train()
    assert share_pools(model, group.WORLD) == 0
    model(**inputs_for(model.config, 4))
    with pytest.raises(ValueError, match="does not divide the 3 x"):
        model(**inputs_for(model.config, 3))


def test_a_pool_of_tokens_never_spans_ranks():
    run_ranks(straddle, 1)


def learn(load):
    """The bias of a loss-free router after each rank saw its rows of ``load``."""
    model = moved(tiny("loss_free"))
    mine = torch.tensor(load[distributed.get_rank()], dtype=torch.float32)
    observed = [[{"load": mine}] * len(routers_of(model))]
    update_routers(model, [average_observed(observed, group.WORLD)])
    return routers_of(model)[0].selection_bias


def test_rounding_of_a_mean_over_ranks_moves_no_bias():
    # In all 1, 13, 4 and 6 rows, of 6 on average; a third of 6 and the mean of the thirds differ.
    loads = [[1, 5, 0, 2], [0, 4, 4, 2], [0, 4, 0, 2]]
    for bias in run_ranks(learn, 3, loads):
        assert bias.sign().tolist() == [1.0, -1.0, 1.0, 0.0]
