"""Bytes over each link and seconds, against figures worked out by hand."""

from dataclasses import replace

import pytest

from dit_models.models import get_config
from dit_models.plan import Cluster, Mesh, Run, estimate, plan_traffic, recommend, sensible_meshes
from dit_models.plan.times import Estimate, break_even_images
from dit_models.plan.traffic import Flow

CONFIG = get_config("DiT-MoE-XL/2-8E2A")
RUN = Run(CONFIG, images_per_gpu=4)


def flow_of(run: Run, mesh: Mesh, name: str, recompute: bool = False, node: int = 8) -> Flow:
    flows = plan_traffic(run, mesh, node, recompute).flows
    return next(flow for flow in flows if flow.name == name)


@pytest.mark.parametrize(("recompute", "passes"), [(False, 4), (True, 6)])
def test_rows_travel_four_times_and_six_with_recompute(recompute: bool, passes: int) -> None:
    flow = flow_of(RUN, Mesh(16, 4), "expert all-to-all", recompute)
    rows = 28 * 4 * 256 * 2  # layers, images, tokens, experts a token
    assert flow.nvlink == passes * rows * 1152 * 2 * 3 / 4
    assert flow.network == 0


def test_rows_that_leave_the_node() -> None:
    flow = flow_of(RUN, Mesh(16, 8), "expert all-to-all", node=4)
    assert flow.network / flow.nvlink == pytest.approx(4 / 3)


def test_a_ring_over_two_nodes_crosses_once_for_all_their_gpus() -> None:
    inside = flow_of(RUN, Mesh(16), "dense reduce-scatter", node=16)
    across = flow_of(RUN, Mesh(16), "dense reduce-scatter", node=8)
    assert inside.network == 0
    assert across.nvlink == inside.nvlink
    assert across.network == pytest.approx(inside.nvlink / 8)


def test_expert_shards_with_one_member_a_node_use_the_network_alone() -> None:
    flow = flow_of(RUN, Mesh(16, 8), "expert reduce-scatter")
    held = 28 * 3 * 1152 * 4608  # one expert of every layer
    assert flow.nvlink == 0
    # Two ranks share one expert, half of its rows each.
    assert flow.network == pytest.approx(held * 4 / 2)


def test_copies_of_the_model_reduce_what_they_keep() -> None:
    flow = flow_of(RUN, Mesh(32, 8, 4), "expert all-reduce of copies")
    assert flow.network == pytest.approx(2 * 28 * 3 * 1152 * 4608 * 4 * 3 / 4)


def test_only_ragged_plans_exchange_counts() -> None:
    assert flow_of(RUN, Mesh(8, 4), "row counts").nvlink == 28 * 8 * 4 * 3 / 4
    names = [flow.name for flow in plan_traffic(_expert_choice(), Mesh(8, 4), 8).flows]
    assert "row counts" not in names
    batch = replace(_expert_choice(), model=replace(_expert_choice().model, group="batch"))
    assert flow_of(batch, Mesh(8, 4), "row counts").nvlink > 0


def test_one_gpu_sends_nothing_and_micro_batches_send_again() -> None:
    assert plan_traffic(RUN, Mesh(1), 8).flows == ()
    once, twice = (plan_traffic(replace(RUN, accumulate=n), Mesh(8, 2), 8) for n in (1, 2))
    assert twice.nvlink == pytest.approx(2 * once.nvlink)


def test_weights_that_stay_gathered_are_gathered_once() -> None:
    stays = plan_traffic(replace(RUN, reshard_after_forward=False), Mesh(8, 2), 8)
    assert not [flow for flow in stays.flows if "backward" in flow.name]


def test_break_even_of_the_published_models() -> None:
    assert break_even_images(replace(RUN, precision="fp32")) == 162
    assert break_even_images(Run(get_config("EC-DiT-3XL-32E"), precision="fp32")) == 864


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("reshard", [True, False])
def test_at_the_break_even_both_ways_send_as_much(precision: str, reshard: bool) -> None:
    run = replace(RUN, precision=precision, reshard_after_forward=reshard)
    run = replace(run, images_per_gpu=int(break_even_images(run)))
    gathered, sent = (plan_traffic(run, Mesh(8, expert), 8).nvlink for expert in (1, 8))
    assert gathered == pytest.approx(sent, rel=1e-4)  # beside them: row counts


def test_compute_counts_products_three_times_and_four_with_recompute() -> None:
    cluster = Cluster(8, 80, tflops=100, utilization=0.5)
    plain, again = (estimate(RUN, cluster, Mesh(8), flag) for flag in (False, True))
    # 323.74 GMACs and 2 S^2 D of attention in each of 28 blocks
    macs = 323.74e9 + 28 * 2 * 256**2 * 1152
    assert plain.compute == pytest.approx(6 * macs * 4 / 50e12, rel=1e-4)
    assert again.compute == pytest.approx(plain.compute * 4 / 3)
    assert plain.with_overlap == max(plain.compute, plain.hidden) + plain.exposed
    assert plain.without_overlap == plain.compute + plain.hidden + plain.exposed


def test_meshes_keep_experts_in_a_node_and_copies_in_whole_nodes() -> None:
    meshes = list(sensible_meshes(Cluster(32, 80), 64))
    assert {mesh.expert for mesh in meshes} == {1, 2, 4, 8}
    assert {mesh.replicate for mesh in meshes} == {1, 2, 4}
    wide = {mesh.expert for mesh in sensible_meshes(Cluster(32, 80), 64, across_nodes=True)}
    assert wide == {1, 2, 4, 8, 16, 32}
    assert [mesh.expert for mesh in sensible_meshes(Cluster(8, 80), 0)] == [1]


def test_the_recommended_plan_fits_and_none_is_much_faster() -> None:
    cluster = Cluster(32, 80)
    meshes = sensible_meshes(cluster, CONFIG.num_experts)
    estimates = [estimate(RUN, cluster, mesh, flag) for mesh in meshes for flag in (False, True)]
    best = recommend(estimates)
    assert best is not None
    assert best.memory.total <= 80e9 * 0.9
    as_fast = [e for e in estimates if e.fits]
    for value in (_step, _serial, _sent):
        least = min(map(value, as_fast))
        as_fast = [e for e in as_fast if value(e) <= 1.05 * least]
    assert 1 < len(as_fast) < sum(e.fits for e in estimates)
    assert best.memory.total == min(e.memory.total for e in as_fast)
    assert recommend([replace(each, fits=False) for each in estimates]) is None


def _step(each: Estimate) -> float:
    return each.with_overlap


def _serial(each: Estimate) -> float:
    return each.without_overlap


def _sent(each: Estimate) -> float:
    return each.traffic.nvlink + each.traffic.network


def _expert_choice() -> Run:
    return Run(get_config("EC-DiT-L/2-8E"), images_per_gpu=4)
