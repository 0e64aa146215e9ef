"""The lists of what autograd keeps, against what it keeps: exact for each block in fp32."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.model_config import ModelConfig
from dit_models.models import build_model, get_config
from dit_models.plan import Mesh, Run, plan_memory
from dit_models.plan.activations import Widths, block_activations, rest_activations
from moe_kernels.backends.cpu import experts, memory
from moe_kernels.backends.cpu.products import Products
from tests.dit_models.plan.steps import peak_of

CPU = torch.profiler.ProfilerActivity.CPU
IMAGES, TEXT_LEN = 3, 7
SMALL = {"depth": 2, "hidden_size": 48, "num_heads": 4}
MODELS = {
    "dense": replace(get_config("DiT-tiny"), **SMALL),
    "dense swiglu rope": replace(
        get_config("DiT-tiny"), **SMALL, mlp_activation="swiglu", positions="rope", qk_norm=False
    ),
    "expert choice": replace(get_config("EC-DiT-tiny"), **SMALL),
    "token choice": replace(get_config("DiT-MoE-tiny"), **SMALL, moe_every=2),
    "token choice rms": replace(get_config("DiT-MoE-tiny"), **SMALL, qk_norm_kind="rms_norm"),
    "no head norms": replace(get_config("EC-DiT-tiny"), **SMALL, qk_norm=False),
    "text": replace(get_config("EC-DiT-tiny-text"), **SMALL, num_kv_heads=2),
    "text, all heads": replace(get_config("EC-DiT-tiny-text"), **SMALL, num_kv_heads=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_block_keeps_what_the_lists_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE_BYTES", 1 << 60)
    monkeypatch.setattr(experts, "PRODUCTS", Products(reason="as the planner's device cpu"))
    config = MODELS[name]
    run = Run(config, images_per_gpu=IMAGES, precision="fp32", device="cpu", text_len=TEXT_LEN)
    kept = bytes_kept_by_block(config)
    assert block_activations(Widths(run), 1).saved == pytest.approx(kept, abs=IMAGES)


def bytes_kept_by_block(config: ModelConfig) -> int:
    """Of the second block: the first also makes what all share, as the text's mask."""
    model = build_model(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inside = [False]
    model.blocks[1].register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    model.blocks[1].register_forward_hook(lambda *_: inside.__setitem__(0, False))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shared: set[int] = set()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in owned and not inside[0]:
            shared.add(where)
        elif where not in owned and where not in shared:
            kept[where] = tensor
        return tensor

    inputs = {}
    if config.num_classes:
        inputs["labels"] = torch.arange(IMAGES)
    if config.text_dim:
        inputs["text"] = torch.randn(IMAGES, TEXT_LEN, config.text_dim)
        inputs["text_mask"] = torch.ones(IMAGES, TEXT_LEN, dtype=torch.bool)
    size = (IMAGES, config.in_channels, config.image_size, config.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(size), torch.rand(IMAGES), **inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_captions_are_kept_as_given_and_masked() -> None:
    model = get_config("EC-DiT-tiny-text")
    short, long = (Widths(Run(model, images_per_gpu=IMAGES, text_len=n)) for n in (5, 12))
    more = rest_activations(long) - rest_activations(short)
    assert more == 2 * IMAGES * 7 * model.text_dim * 4


def test_one_gpu_has_a_bf16_copy_of_every_matrix() -> None:
    config = MODELS["token choice"]
    blocks = build_model(config, device="meta").blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    gathered = plan_memory(Run(config), Mesh(1)).gathered
    # Beside them a few of the embeddings and the final layer.
    assert 2 * matrices < gathered < 2.2 * matrices
    assert plan_memory(Run(config, precision="fp32"), Mesh(1)).gathered == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_gpu_kernels_of_the_experts_allocate_what_is_counted() -> None:
    config = replace(
        get_config("DiT-MoE-tiny"),
        **{**SMALL, "hidden_size": 32, "num_experts": 2, "image_size": 8, "shared_ratio": 0.0},
    )
    run = Run(config, images_per_gpu=1, precision="fp32")
    layer = build_model(config).blocks[1].ffn
    x = torch.randn(1, config.seq_len, config.hidden_size, requires_grad=True)
    with mk.use_backend("triton"):
        out, _ = layer(x)
        upstream = torch.randn_like(out)
        with torch.profiler.profile(activities=[CPU], profile_memory=True) as profile:
            out.backward(upstream)
    weights = sum(p.numel() * p.element_size() for p in layer.experts.parameters())
    # The gradient of the output is there before.
    counted = block_activations(Widths(run), 1).ffn_backward - upstream.numel() * 4
    assert counted == pytest.approx(peak_of(profile) - weights, rel=0.05)
