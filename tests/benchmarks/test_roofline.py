"""The counted FLOPs and bytes against PyTorch's own count and the sizes of real tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels as mk
from benchmarks.roofline import __main__ as command
from benchmarks.roofline.counts import STAGES, floor_of, kept_by_eager, kept_by_ours
from benchmarks.roofline.report import KEPT_GOAL
from benchmarks.roofline.shapes import H100, LAYERS, Layer, expert_choice, token_choice
from moe_kernels.backends import BACKENDS

SMALL = (
    expert_choice(2, 16, 24, 4),
    token_choice("gated", 32, 24, 40, 4, 2, gated=True),
)
DTYPE = torch.float32


def make(layer: Layer):
    """Leaves of a call of the layer: logits, x, w_in, w_out."""
    experts, hidden, inner = layer.num_experts, layer.hidden_size, layer.intermediate_size
    leaves = (
        torch.randn(layer.num_tokens, experts),
        torch.randn(layer.num_tokens, hidden, dtype=DTYPE),
        torch.randn(experts, layer.width, hidden, dtype=DTYPE),
        torch.randn(experts, hidden, inner, dtype=DTYPE),
    )
    return [leaf.requires_grad_() for leaf in leaves]


def route(layer: Layer, logits: torch.Tensor, backend=None):
    if layer.top_k:
        return mk.token_choice(logits, layer.top_k, backend=backend)
    return mk.expert_choice(logits, 2.0, num_groups=layer.num_groups, backend=backend)


def run(layer: Layer, leaves, backend=None):
    """Plan and output."""
    logits, x, w_in, w_out = leaves
    plan = route(layer, logits, backend)
    activation = "swiglu" if layer.gated else "gelu_tanh"
    return plan, mk.expert_mlp(x, plan, w_in, w_out, activation=activation, backend=backend)


def run_plain(layer: Layer, leaves):
    """The same by PyTorch's own products, an expert after the other."""
    logits, x, w_in, w_out = leaves
    plan = route(layer, logits)
    tokens = plan.token_indices.long().split(plan.tokens_per_expert.tolist())
    weights = plan.routing_weights.split(plan.tokens_per_expert.tolist())
    out = torch.zeros_like(x)
    for expert, mine in enumerate(tokens):
        h = x[mine] @ w_in[expert].T
        a = F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if layer.gated else F.gelu(h)
        y = a @ w_out[expert].T
        out = out.index_add(0, mine, weights[expert].unsqueeze(1) * y)
    return out


def stage(name: str):
    return next(stage for stage in STAGES if stage.name.startswith(name))


needs_cpu_backend = pytest.mark.skipif(
    BACKENDS["cpu"].why_not("expert_mlp", "cpu") is not None,
    reason="the C++ module is not built",
)


@pytest.mark.parametrize("who", ["plain", pytest.param("cpu", marks=needs_cpu_backend)])
@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_flops_are_those_that_pytorch_counts(layer, who):
    leaves = make(layer)
    with FlopCounterMode(display=False) as forward:
        out = run_plain(layer, leaves) if who == "plain" else run(layer, leaves, who)[1]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    counted = {
        is_backward: sum(s.flops(layer) for s in STAGES if s.is_backward is is_backward)
        for is_backward in (False, True)
    }
    assert forward.get_total_flops() == counted[False]
    assert backward.get_total_flops() == counted[True]


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_bytes_are_those_of_the_tensors(layer):
    logits, x, w_in, w_out = leaves = make(layer)
    plan, out = run(layer, leaves)
    rows = x[plan.token_indices.long()]
    h = rows.new_empty(layer.num_rows, layer.width)
    a = rows.new_empty(layer.num_rows, layer.intermediate_size)
    # A plan that came from the reference has no packed buffer, and indices of another dtype.
    packed = 4 * layer.num_indices
    indices, weights = 4 * plan.token_indices.numel(), plan.routing_weights.nbytes
    assert plan.num_rows == layer.num_rows
    item = DTYPE.itemsize
    expected = {
        "route": logits.nbytes + weights + packed,
        "gather": indices + rows.nbytes,
        "up-projection": w_in.nbytes + h.nbytes + a.nbytes,
        "down-projection": a.nbytes + w_out.nbytes + rows.nbytes,
        "combine": rows.nbytes + weights + indices + out.nbytes,
        "d(activation)": (
            indices + 2 * weights + rows.nbytes + w_out.nbytes + 2 * h.nbytes + a.nbytes
        ),
        "dw_out": indices + rows.nbytes + a.nbytes + w_out.nbytes,
        "dw_in": indices + h.nbytes + rows.nbytes + w_in.nbytes,
        "d(rows)": h.nbytes + w_in.nbytes + rows.nbytes,
        "dx": rows.nbytes + indices + x.nbytes,
        "route backward": 2 * logits.nbytes + weights + 2 * indices,
    }
    found = {name: stage(name).bytes(layer, item) for name in expected}
    assert found == expected
    assert len(expected) == len(STAGES)


@needs_cpu_backend
@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_kept_is_what_autograd_saves(layer):
    leaves = make(layer)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(layer, leaves, "cpu")
    for weight in leaves[2:]:
        saved.pop(weight.untyped_storage().data_ptr())
    assert sum(saved.values()) == kept_by_ours(layer, DTYPE.itemsize)


def test_kept_memory_meets_its_goal():
    for layer in LAYERS:
        assert kept_by_ours(layer) <= KEPT_GOAL * kept_by_eager(layer), layer.name


def test_a_stage_inside_a_kernel_adds_traffic_not_time():
    layer = LAYERS[0]
    gather, up = stage("gather"), stage("up-projection")
    both = floor_of([gather, up], layer, H100)
    assert both.seconds == floor_of([up], layer, H100).seconds  # arithmetic sets it
    assert both.arithmetic == both.seconds
    assert floor_of([gather], layer, H100).arithmetic == 0
    assert both.peak_seconds < both.seconds


def test_forward_of_the_published_shape():
    # DiT-XL width, 16384 rows: 2 * 2 * R * D * F.
    flops = sum(stage.flops(LAYERS[0]) for stage in STAGES if not stage.is_backward)
    assert flops == 4 * 16384 * 1152 * 4608


def test_the_page_says_that_it_is_counted(tmp_path, capsys):
    path = tmp_path / "roofline.md"
    assert command.main(["--out", str(path)]) == 0
    page = path.read_text()
    assert "not measured" in page
    for layer in LAYERS:
        assert layer.name in page
    assert "Counted, not measured" in capsys.readouterr().out


def test_the_kept_page_is_up_to_date(tmp_path):
    command.main(["--out", str(tmp_path / "roofline.md")])
    kept = command.RESULTS / "roofline.md"
    assert kept.read_text() == (tmp_path / "roofline.md").read_text()


def test_eager_swiglu_keeps_silu_too():
    half = torch.randn(6, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        torch.nn.functional.silu(half) * half
    assert saved == [half.shape] * 3  # the gate; silu(gate) and up
