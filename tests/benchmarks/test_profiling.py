"""Profiles: every name has a stage, shares add up, traces can be read."""

import gzip
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import output, profiling
from benchmarks.gradients import differentiable, upstream_of
from benchmarks.profiling import names, recorder, stepwise
from benchmarks.profiling.lookup import (
    Called,
    Sizes,
    ours_of,
    stage_of_kernel,
    stage_of_operators,
)
from benchmarks.profiling.stages import (
    BACKWARD,
    BETWEEN,
    COMBINE,
    COMPILED,
    ELEMENTWISE,
    FUSED,
    LOSSES,
    MOVE,
    OTHER,
    PRODUCTS,
    ROUTER,
    SELECT,
    STAGES,
    in_order,
)
from benchmarks.registry import find_entry
from benchmarks.stages import STAGES as ENTRY_STAGES

CPU = torch.device("cpu")
SIZES = Sizes(experts=8, tokens=48)
LAYERS = ("dit_moe_layer/D384-T128", "ec_layer/D384-T128")


def chain(*called):
    """The operator first, then who called it; a name alone stands for one without shapes."""
    return [one if isinstance(one, Called) else Called(one) for one in called]


def tiny(name):
    entry = find_entry(name)
    return replace(entry, shape=entry.tiny)


def test_every_op_of_the_library_has_a_stage():
    """A new op fails here until ``names.OURS`` has it; one that is gone fails as well."""
    dispatched = {
        re.split(r"::|\.", name)[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moe_kernels::")
    }
    known = {operator.name for operator in recorder.operators()} | dispatched
    assert known == set(names.OURS)
    assert set(names.OURS.values()) <= set(STAGES)
    for name in known:
        assert ours_of(f"moe_kernels::{name}") == name
        assert ours_of(f"{name}_cpu") == name
        assert ours_of(f"{names.NODE}{name}_tritonBackward") == name
        assert ours_of(name) is None, "a function of somebody else"


def test_tables_name_known_stages():
    stages = {stage for _, stage in names.KERNELS}
    assert stages | {*names.NODES.values(), *names.OPERATORS.values()} <= set(STAGES)
    for pattern, _ in names.KERNELS:
        re.compile(pattern)


def test_every_kernel_of_the_library_has_a_stage():
    triton = re.findall(
        r"^## (_\w+_kernel)$", (output.RESULTS / "triton-compiled.md").read_text(), re.M
    )
    rows = json.loads((output.RESULTS / "cuda-compiled.json").read_text())["rows"].values()
    cuda = {row["kernel"].partition(",")[0] for row in rows}
    assert len(triton) > 20
    assert len(cuda) > 15
    for name in (*triton, *(f"void moe::cuda::kernel<moe::{name}, 1>(Args)" for name in cuda)):
        assert stage_of_kernel(name, [], SIZES).removesuffix(BACKWARD) not in (OTHER, COMPILED), (
            name
        )


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("_token_choice_fwd_kernel", SELECT),
        ("_expert_choice_select_kernel", SELECT),
        ("_route_bwd_kernel", SELECT + BACKWARD),
        ("_affinity_fwd_kernel", ROUTER),
        ("_gather_kernel", MOVE),
        ("_up_fwd_kernel", PRODUCTS),
        ("_weight_bwd_kernel", PRODUCTS + BACKWARD),
        ("_gate_gradient_kernel", COMBINE + BACKWARD),
        ("_activation_fwd_kernel", ELEMENTWISE),
        ("_sum_rows_kernel", COMBINE),
        ("_similarity_bwd_kernel", LOSSES + BACKWARD),
        ("void moe::cuda::kernel<moe::TokenChoice<8>, (moe::cuda::Team)1>(Args)", SELECT),
        ("void moe::cuda::kernel<moe::RouteBwd<4>, (moe::cuda::Team)2>(Args)", SELECT + BACKWARD),
        ("void moe::cuda::kernel<moe::CopyRows<moe::Vector>, 2>(Args)", MOVE),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
            PRODUCTS,
        ),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", PRODUCTS),
        ("nvjet_hsh_192x128_64x4_2x1_v_bz_TNT", PRODUCTS),
        ("ampere_sgemm_128x64_tn", PRODUCTS),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128>(Params)",
            PRODUCTS,
        ),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*)", ROUTER),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(Info)", SELECT),
        ("void at::native::radixSortKVInPlace<2, -1, 32, 32>(Info)", SELECT),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy900>(int*)", SELECT),
        ("void at::native::vectorized_gather_kernel<16, long>(char*)", MOVE),
        ("void at::native::index_elementwise_kernel<128, 4, gpu_index_kernel>(long)", MOVE),
        ("void at::native::indexFuncLargeIndex<float, long, unsigned int, 2>(Info)", COMBINE),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>(int)",
            ELEMENTWISE,
        ),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(Op)", ELEMENTWISE),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<uint4, 2>(T*)", ELEMENTWISE),
        ("Memset (Device)", ELEMENTWISE),
        ("Memcpy DtoD (Device -> Device)", ELEMENTWISE),
        ("triton_poi_fused_mul_silu_3", COMPILED),
        ("triton_tem_fused_mm_7", PRODUCTS),
        ("a_kernel_of_nobody", OTHER),
    ],
)
def test_stage_of_a_kernel_that_nobody_is_known_to_have_started(name, stage):
    assert stage_of_kernel(name, [], SIZES) == stage


def test_who_started_a_kernel_says_more_than_its_name():
    node = names.NODE + "IndexSelectBackward0"
    by_dispatch = chain("aten::index_add_", "IndexSelectBackward0", node)
    assert stage_of_kernel("indexFuncLargeIndex<float>", by_dispatch, SIZES) == MOVE + BACKWARD
    gemm = "nvjet_tst_64x8_64x16_1x2_h_bz_TNT"
    logits = chain(Called("aten::mm", [[48, 16], [16, 8]]), "aten::linear")
    assert stage_of_kernel(gemm, logits, SIZES) == ROUTER
    # Inside our fused op, and in compiled code, the kernel says more.
    assert stage_of_kernel("_up_fwd_kernel", chain("expert_mlp_triton"), SIZES) == PRODUCTS
    fused = chain("moe_kernels::expert_mlp_bwd", names.NODE + "expert_mlp_tritonBackward")
    assert stage_of_kernel("_gather_kernel", fused, SIZES) == MOVE + BACKWARD
    assert stage_of_kernel("something", fused, SIZES) == FUSED + BACKWARD
    region = chain("Torch-Compiled Region: 0/0")
    assert stage_of_kernel("triton_red_fused_sum_2", region, SIZES) == COMPILED


def node(name):
    return names.NODE + name


@pytest.mark.parametrize(
    ("called", "stage"),
    [
        ([], BETWEEN),
        (["aten::topk"], SELECT),
        (["aten::empty", "aten::index_select"], MOVE),
        (["aten::copy_", "aten::_index_put_impl_", "aten::index_put_"], COMBINE),
        (["aten::mul_"], ELEMENTWISE),
        (["aten::resolve_conj", Called("aten::mm", [[48, 16], [16, 64]])], PRODUCTS),
        ([Called("aten::mm", [[48, 16], [16, 8]]), "aten::matmul"], ROUTER),
        ([Called("aten::mm", [[48, 16], [16, 8], [48, 8]])], ROUTER),  # into a given tensor
        ([Called("aten::addmm", [[8], [48, 16], [16, 8]])], ROUTER),
        ([Called("aten::addmm", [[48, 8], [48, 16], [16, 64]])], PRODUCTS),
        (["autograd's own", Called("MmBackward0", [[48, 8]]), node("MmBackward0")],
         ROUTER + BACKWARD),
        # An expert with as many rows as there are experts is no router.
        ([Called("aten::mm", [[8, 16], [16, 64]]), "aten::linear"], PRODUCTS),
        ([Called("aten::mm", [[8, 48], [48, 16]]), "MmBackward0", node("MmBackward0")],
         ROUTER + BACKWARD),
        ([Called("aten::mm", [[48, 8], [8, 16]]), "MmBackward0", node("MmBackward0")],
         ROUTER + BACKWARD),
        ([Called("aten::mm", [[16, 48], [48, 64]]), "MmBackward0", node("MmBackward0")],
         PRODUCTS + BACKWARD),
        ([Called("aten::bmm", [[8, 12, 16], [8, 16, 64]])], PRODUCTS),
        (["aten::index_add_", "IndexBackward0", node("IndexBackward0")], MOVE + BACKWARD),
        (["aten::index_select", "IndexAddBackward0", node("IndexAddBackward0")],
         COMBINE + BACKWARD),
        (["aten::add_", node("torch::autograd::AccumulateGrad")], ELEMENTWISE + BACKWARD),
        (["aten::mm", "expert_mlp_cpu"], FUSED),
        (["moe_kernels::sum_rows", node("dispatch_cpuBackward")], MOVE + BACKWARD),
        (["moe_kernels::gather", node("combine_cpuBackward")], COMBINE + BACKWARD),
        (["moe_kernels::ragged_gemm"], PRODUCTS),
        (["aten::mm", "CompiledFunction", "Torch-Compiled Region: 0/0"], PRODUCTS),
        (["CompiledFunction", "Torch-Compiled Region: 0/0"], COMPILED),
        (["aten::never_heard_of"], OTHER),
        (["combine"], OTHER),
    ],
)  # fmt: skip
def test_stage_of_an_operator(called, stage):
    assert stage_of_operators(chain(*called), SIZES) == stage


@pytest.fixture(scope="module", params=LAYERS)
def profiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    entry = tiny(request.param)
    rows = profiling.profile_entry(entry, CPU, ["good_eager", "ours"], folder)
    return entry, rows, folder


def test_stages_add_up_to_the_call(profiled):
    entry, rows, _ = profiled
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (provider, mode)
        for provider in ("good_eager", "ours", stepwise.NAME)
        for mode in ("forward", "both")
    ]
    for row in rows:
        assert row["entry"] == entry.name
        assert row["device"] == "cpu"
        assert sum(row["stages"].values()) == pytest.approx(row["seconds"])
        assert list(row["stages"]) == [name for name in in_order() if name in row["stages"]]
        assert all(seconds > 0 for seconds in row["stages"].values())
        backward = any(stage.endswith(BACKWARD) for stage in row["stages"])
        assert backward == (row["mode"] == "both")
        if row["provider"] == "good_eager":
            plain = {ROUTER, SELECT, MOVE, PRODUCTS, ELEMENTWISE, COMBINE}
            assert plain <= {stage.removesuffix(BACKWARD) for stage in row["stages"]}


def test_stages_of_ours_are_seen(profiled):
    _, rows, _ = profiled
    by_row = {(row["provider"], row["mode"]): row for row in rows}
    fused = by_row["ours", "forward"]
    assert {ROUTER, SELECT, FUSED} <= set(fused["stages"])
    assert MOVE not in fused["stages"]
    shown = {item["name"] for item in fused["longest"]}
    assert "moe_kernels::expert_mlp" in shown, "ops without autograd are named as well"
    assert {SELECT + BACKWARD, FUSED + BACKWARD} <= set(by_row["ours", "both"]["stages"])
    apart = by_row[stepwise.NAME, "both"]["stages"]
    seen = {ROUTER, SELECT, MOVE, PRODUCTS, ELEMENTWISE, COMBINE}
    assert seen | {stage + BACKWARD for stage in seen} <= set(apart)
    assert FUSED not in apart


def test_traces_can_be_read(profiled):
    entry, rows, folder = profiled
    assert {row["trace"] for row in rows} == {path.name for path in folder.iterdir()}
    row = rows[-1]
    assert row["trace"] == f"trace-{entry.name.replace('/', '-')}-ours-stage-by-stage-both.json.gz"
    with gzip.open(folder / row["trace"], "rt") as stream:
        events = json.load(stream)["traceEvents"]
    found = [event for event in events if event.get("name") == recorder.RANGE]
    assert len([event for event in found if event["ph"] == "X"]) == recorder.CALLS
    assert any("grouped_gemm" in str(event.get("name")) for event in events)


def test_the_table_says_every_stage(profiled):
    _, rows, _ = profiled
    text = "\n".join(profiling.table_lines(rows))
    for row in rows:
        assert f"{row['entry']}, {row['mode']}, {row['provider']}: " in text
        assert row["trace"] in text
        assert row["longest"][0]["name"] in text
    assert f"  {PRODUCTS + BACKWARD:28} " in text


def test_without_a_folder_there_is_no_trace_and_ops_run_as_before():
    variants = [v for operator in recorder.operators() for v in operator.variants.values()]
    before = [variant._inference for variant in variants]
    entry = tiny("overhead/combine")
    rows = profiling.profile_entry(entry, CPU, modes=("forward",))
    assert [row["provider"] for row in rows] == list(entry.providers)  # no layer to take apart
    assert all(row["trace"] is None for row in rows)
    assert [variant._inference for variant in variants] == before


def test_what_cannot_be_built_is_left_out(monkeypatch):
    entry = tiny("overhead/combine")
    stage = ENTRY_STAGES[entry.stage]

    def fail(inputs):
        raise ImportError("not here")

    broken = replace(stage.providers["index_add"], build=fail)
    providers = {**stage.providers, "index_add": broken}
    monkeypatch.setitem(ENTRY_STAGES, entry.stage, replace(stage, providers=providers))
    rows = profiling.profile_entry(entry, CPU, ["index_add", "ours"], modes=("forward",))
    assert [row["provider"] for row in rows] == ["ours"]
    providers["ours"] = replace(stage.providers["ours"], build=fail)
    with pytest.raises(ImportError, match="not here"):
        profiling.profile_entry(entry, CPU, ["index_add", "ours"])


def test_what_has_no_backward_is_profiled_forward():
    rows = profiling.profile_entry(tiny("overhead/router_z_loss"), CPU, ["ours"])
    assert [row["mode"] for row in rows] == ["forward"]


@pytest.mark.parametrize("name", [*LAYERS, "scaling_dit_moe_layer_capacity/K3"])
def test_stage_by_stage_is_the_same_layer(name):
    entry = tiny(name)
    stage = ENTRY_STAGES[entry.stage]
    inputs = stage.make_inputs(entry.shape, torch.float64)
    results = []
    for run in (stage.providers["ours"].build(inputs), stepwise.build(entry.stage, inputs)):
        outputs = run.call()[: differentiable(run, inputs)]
        gradients = torch.autograd.grad(outputs, run.flat_leaves, upstream_of(run, inputs, outputs))
        results.append((*outputs, *gradients))
    for ours, by_stage in zip(*results, strict=True):
        torch.testing.assert_close(by_stage, ours, rtol=1e-12, atol=1e-12)


def device_event(name, start, microseconds, **more):
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: microseconds),
        kernels=[],
        cpu_parent=None,
        input_shapes=[],
        **more,
    )


def host_event(name, start, parent=None, kernels=(), shapes=()):
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: 1.0),
        kernels=[SimpleNamespace(name=name, duration=duration) for name, duration in kernels],
        cpu_parent=parent,
        input_shapes=shapes,
    )


def test_kernels_of_a_gpu_are_summed_up_over_the_calls():
    outer = host_event(recorder.RANGE, 100)
    gemm = "nvjet_tst_128x256_64x4_1x2_h_bz_TNN"
    logits = host_event("aten::mm", 110, outer, [(gemm, 50.0)], [[48, 16], [16, 8]])
    # The backward runs in a thread of its own, outside of the range.
    engine = host_event(node("IndexSelectBackward0"), 150)
    backward = host_event("aten::index_add_", 151, engine, [("indexFuncLargeIndex", 20.0)])
    events = [
        outer,
        logits,
        engine,
        backward,
        device_event(gemm, 20, 1000.0),  # before the first range: setting up
        device_event(gemm, 120, 50.0),
        device_event(gemm, 130, 500.0),  # nobody is known to have started it
        device_event("indexFuncLargeIndex", 160, 20.0),
        device_event(recorder.RANGE, 120, 900.0, is_user_annotation=True),
        device_event("moe_kernels::combine", 120, 900.0),
        device_event("Stream Wait Event", 170, 5.0),
    ]
    spent = recorder.spent_on_gpu(events, SIZES)
    assert spent.stages == pytest.approx({ROUTER: 10e-6, PRODUCTS: 100e-6, MOVE + BACKWARD: 4e-6})
    assert spent.seconds == pytest.approx(114e-6)
    (longest,) = recorder.longest(spent, 1)
    assert longest["name"] == gemm
    assert longest["stage"] == PRODUCTS


def test_a_gpu_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="saw no kernels"):
        recorder.spent_on_gpu([host_event(recorder.RANGE, 1)], SIZES)
