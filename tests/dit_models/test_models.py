"""The three families: start, gradients, sizes, batch independence, compile, checkpointing."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moe_kernels as mk
from dit_models.attention import CrossAttention, SelfAttention
from dit_models.backbone import DiT
from dit_models.embeddings import (
    PatchEmbedder,
    TimestepEmbedder,
    patchify,
    sincos_positions,
    unpatchify,
)
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.presets import PRESETS

TINY_MODELS = ("DiT-tiny", "DiT-MoE-tiny", "EC-DiT-tiny", "EC-DiT-tiny-text")


def _model(name: str, seed: int = 0, depth: int = 2, **changes: Any) -> DiT:
    """A tiny model of two blocks with every parameter moved off its start (zeros pass nothing)."""
    torch.manual_seed(seed)
    model = build_model(dataclasses.replace(PRESETS[name], depth=depth, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _inputs(
    config: ModelConfig, batch_size: int = 3, size: tuple[int, int] | None = None, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    height, width = size or (config.image_size, config.image_size)
    shape = (batch_size, config.in_channels, height, width)
    inputs = {
        "latents": torch.randn(shape, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
    }
    if config.num_classes:
        # the null class included
        inputs["labels"] = torch.arange(batch_size) * 5 % (config.num_classes + 1)
    if config.text_dim:
        inputs["text"] = torch.randn(batch_size, 7, config.text_dim, generator=generator)
        inputs["text_mask"] = torch.arange(7) < torch.tensor([[2], [7], [4]])[:batch_size]
    return inputs


def _backward(model: DiT, inputs: dict[str, Tensor], seed: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Output and the gradients of all parameters for a random upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    output = model(**inputs)
    upstream = torch.randn(output.sample.shape, generator=generator)
    loss = (output.sample * upstream).sum()
    for plan in output.plans:
        loss = loss + 0.1 * mk.load_balance_loss(plan) + 0.1 * mk.router_z_loss(plan)
    loss.backward()
    return output.sample.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_new_model_predicts_exactly_zero(name: str) -> None:
    model = build_model(name)
    output = model(**_inputs(model.config))
    config = model.config
    assert output.sample.shape == (3, config.out_channels, config.image_size, config.image_size)
    assert torch.equal(output.sample, torch.zeros_like(output.sample))
    assert len(output.plans) == len(config.moe_blocks)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_new_blocks_are_the_identity(name: str) -> None:
    model = build_model(dataclasses.replace(PRESETS[name], depth=2))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**_inputs(model.config))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_random_upstream_gradient_reaches_every_parameter(name: str) -> None:
    model = _model(name)
    _backward(model, _inputs(model.config))
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(
    ("name", "moe_blocks"),
    [("DiT-tiny", ()), ("DiT-MoE-tiny", (0, 1, 2, 3, 4, 5)), ("EC-DiT-tiny", (1, 3, 5))],
)
def test_experts_sit_in_the_blocks_of_the_paper(name: str, moe_blocks: tuple[int, ...]) -> None:
    model = build_model(name, device="meta")
    found = [i for i, block in enumerate(model.blocks) if isinstance(block.ffn, mk.MoE)]
    assert tuple(found) == moe_blocks == model.config.moe_blocks


def test_expert_choice_takes_f_c_experts_a_token_from_each_image() -> None:
    model = _model("EC-DiT-tiny")
    (plan,) = model(**_inputs(model.config)).plans
    assert (plan.num_groups, plan.capacity) == (3, 64 * 2 // 8)
    assert plan.num_rows == 2 * plan.num_tokens


def test_token_choice_keeps_raw_softmax_weights_of_two_experts() -> None:
    model = _model("DiT-MoE-tiny")
    plan = model(**_inputs(model.config)).plans[0]
    assert plan.top_k == 2
    expected = plan.router_logits.softmax(dim=1).topk(2).values.sum(dim=1)
    held = torch.zeros(plan.num_tokens).index_add(
        0, plan.token_indices.long(), plan.routing_weights
    )
    torch.testing.assert_close(held, expected)
    assert expected.max() < 1


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (32, 16)])
def test_other_image_sizes(name: str, size: tuple[int, int]) -> None:
    model = _model(name)
    inputs = _inputs(model.config, batch_size=2, size=size)
    sample = model(**inputs).sample
    assert sample.shape == (2, model.config.out_channels, *size)
    assert sample.isfinite().all()


@pytest.mark.parametrize("size", [(15, 16), (16, 17), (0, 16)])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused(size: tuple[int, int]) -> None:
    model = _model("DiT-tiny")
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} .* patches of 2"):
        model(**_inputs(model.config, size=size))


@pytest.mark.parametrize("name", ["EC-DiT-tiny", "EC-DiT-tiny-text"])
def test_an_image_of_expert_choice_does_not_depend_on_its_batch(name: str) -> None:
    model = _model(name, depth=4).eval()
    inputs = _inputs(model.config)
    with torch.no_grad():
        full = model(**inputs).sample
        order = torch.tensor([2, 0, 1])
        permuted = model(**{key: value[order] for key, value in inputs.items()}).sample
        alone = [
            model(**{key: value[i : i + 1] for key, value in inputs.items()}).sample
            for i in range(3)
        ]
    assert full.abs().mean() > 0.01
    torch.testing.assert_close(permuted, full[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(alone), full, rtol=1e-5, atol=1e-5)


def test_expert_choice_over_the_batch_does_depend_on_it() -> None:
    model = _model("EC-DiT-tiny", group="batch")
    inputs = _inputs(model.config)
    full = model(**inputs).sample
    alone = model(**{key: value[:1] for key, value in inputs.items()}).sample
    assert (alone - full[:1]).abs().max() > 1e-3


def test_text_padding_never_changes_a_prediction() -> None:
    model = _model("EC-DiT-tiny-text").eval()
    inputs = _inputs(model.config)
    sample = model(**inputs).sample
    padding = ~inputs["text_mask"][:, :, None]
    for junk in (1e4, float("nan"), float("inf")):
        changed = {**inputs, "text": inputs["text"].masked_fill(padding, junk)}
        assert torch.equal(model(**changed).sample, sample)
    wider = nn.functional.pad(inputs["text"], (0, 0, 0, 5), value=3.0)
    mask = nn.functional.pad(inputs["text_mask"], (0, 5), value=False)
    longer = model(**{**inputs, "text": wider, "text_mask": mask}).sample
    torch.testing.assert_close(longer, sample, rtol=1e-5, atol=1e-5)


def test_text_changes_the_prediction_and_a_missing_mask_keeps_every_token() -> None:
    model = _model("EC-DiT-tiny-text").eval()
    inputs = _inputs(model.config)
    everything = {**inputs, "text_mask": torch.ones_like(inputs["text_mask"])}
    sample = model(**everything).sample
    torch.testing.assert_close(model(**{**inputs, "text_mask": None}).sample, sample)
    assert (model(**inputs).sample - sample).abs()[0].max() > 1e-3


def test_a_row_of_padding_alone_is_finite_and_has_finite_gradients() -> None:
    model = _model("EC-DiT-tiny-text")
    inputs = _inputs(model.config)
    inputs["text_mask"][1] = False
    inputs["text"].requires_grad_()
    sample, gradients = _backward(model, inputs)
    assert sample.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    text_gradient = inputs["text"].grad
    assert text_gradient is not None
    assert torch.equal(text_gradient[1], torch.zeros_like(text_gradient[1]))
    assert text_gradient[0, :2].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in TINY_MODELS), ("EC-DiT-tiny", True)]
)
def test_fullgraph_compile_matches_eager(name: str, checkpointing: bool) -> None:
    model = _model(name)
    model.gradient_checkpointing = checkpointing
    inputs = _inputs(model.config)
    sample, gradients = _backward(model, inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(fullgraph=True, backend="aot_eager")
    compiled_sample, compiled_gradients = _backward(model, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled_sample, sample, rtol=1e-5, atol=1e-5)
    for (parameter_name, _), got, expected in zip(
        model.named_parameters(), compiled_gradients, gradients, strict=True
    ):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = _model(name)
    inputs = _inputs(model.config)
    sample, gradients = _backward(model, inputs)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.blocks[0].attn.register_forward_hook(count)
    model.gradient_checkpointing = True
    checkpointed_sample, checkpointed = _backward(model, inputs)
    assert runs == 2, "the block was not recomputed"
    assert torch.equal(checkpointed_sample, sample)
    for got, expected in zip(checkpointed, gradients, strict=True):
        assert torch.equal(got, expected)
    model.eval()
    model(**inputs)
    assert runs == 3


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (1, 1)])
def test_positions_match_the_formula(rows: int, columns: int) -> None:
    size = 24
    expected = np.zeros((rows * columns, size))
    for row in range(rows):
        for column in range(columns):
            for half, position in enumerate((column, row)):
                for i in range(size // 4):
                    angle = position * 10000.0 ** (-i / (size // 4))
                    token, start = row * columns + column, half * size // 2
                    expected[token, start + i] = np.sin(angle)
                    expected[token, start + size // 4 + i] = np.cos(angle)
    got = sincos_positions(size, rows, columns, dtype=torch.float64)
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_timestep_sinusoids_match_the_formula(time_scale: float) -> None:
    timesteps = np.array([0.0, 0.3, 0.7311, 1.0])
    angles = time_scale * timesteps[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    embedder = TimestepEmbedder(8, time_scale)
    got = embedder.sinusoids(torch.tensor(timesteps, dtype=torch.float32))
    assert got.dtype == torch.float32
    # fp32 angles up to 1000 are right to about 6e-5
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-4 if time_scale > 1 else 1e-6)


def test_patch_embedding_is_the_strided_convolution_of_its_reshaped_weight() -> None:
    embedder = PatchEmbedder(3, 8, 4)
    images = torch.randn(2, 3, 8, 12)
    weight = embedder.proj.weight.reshape(8, 3, 4, 4)
    convolved = nn.functional.conv2d(images, weight, embedder.proj.bias, stride=4)
    torch.testing.assert_close(embedder(images), convolved.flatten(2).transpose(1, 2))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_unpatchify_inverts_patchify_after_reordering_a_patch(
    rows: int, columns: int, patch_size: int, channels: int
) -> None:
    images = torch.randn(2, channels, rows * patch_size, columns * patch_size)
    patches = patchify(images, patch_size).unflatten(2, (channels, patch_size, patch_size))
    channels_last = patches.permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(channels_last, rows, columns, patch_size), images)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_grouped_query_attention_matches_the_written_out_formula(qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(24, 6, 2, qk_norm=qk_norm).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    query, key, value = attention.qkv(x).split([24, 8, 8], dim=2)
    out = torch.zeros(2, 5, 24, dtype=torch.float64)
    for head in range(6):
        kv = slice(head // 3 * 4, head // 3 * 4 + 4)
        mine = slice(head * 4, head * 4 + 4)
        q, k = attention.q_norm(query[..., mine]), attention.k_norm(key[..., kv])
        out[..., mine] = (q @ k.transpose(1, 2) / 2.0).softmax(dim=2) @ value[..., kv]
    torch.testing.assert_close(attention(x), attention.proj(out))


def test_cross_attention_without_any_token_returns_the_bias() -> None:
    attention = CrossAttention(16, 6, 4, 2)
    nn.init.normal_(attention.proj.bias)
    mask = torch.tensor([[True, False], [False, False]])
    out = attention(torch.randn(2, 3, 16), torch.randn(2, 2, 6), mask)
    assert torch.equal(out[1], attention.proj.bias.expand(3, 16))
    assert (out[0] - attention.proj.bias).abs().max() > 0.01


def test_bf16_parameters_take_and_return_fp32_latents() -> None:
    config = dataclasses.replace(PRESETS["EC-DiT-tiny"], depth=2)
    model = build_model(config, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**_inputs(config)).sample.dtype == torch.float32


def test_autocast_to_bf16_stays_near_fp32() -> None:
    model = _model("DiT-MoE-tiny", qk_norm=True)
    inputs = _inputs(model.config)
    sample = model(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs).sample
    assert low.dtype == torch.float32
    assert (low - sample).norm() < 0.05 * sample.norm()


def test_weights_travel_through_a_state_dict_and_positions_survive_to_empty() -> None:
    model = _model("EC-DiT-tiny")
    assert "pos_embed" not in model.state_dict()
    copy = build_model(model.config, device="meta").to_empty(device="cpu")
    copy.load_state_dict(model.state_dict())
    inputs = _inputs(model.config)
    assert torch.equal(copy(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_reset_parameters_after_to_empty_is_a_fresh_model(name: str) -> None:
    config = dataclasses.replace(PRESETS[name], depth=2)
    model = build_model(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    fresh = build_model(config)
    for (parameter_name, got), expected in zip(
        model.named_parameters(), fresh.parameters(), strict=True
    ):
        assert got.isfinite().all(), parameter_name
        torch.testing.assert_close(
            got.std(correction=0), expected.std(correction=0), rtol=0.2, atol=1e-6
        )
    assert torch.equal(model.pos_embed, fresh.pos_embed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("DiT-tiny", {"labels": None}, "labels=None"),
        ("DiT-tiny", {"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \(2,\)"),
        ("DiT-tiny", {"latents": torch.zeros(3, 4, 16, 16)}, r"expected \(B, 1, H, W\)"),
        ("DiT-tiny", {"timesteps": torch.zeros(())}, "timesteps has shape"),
        ("DiT-tiny", {"text": torch.zeros(3, 2, 8)}, "text given to a model without it"),
        ("EC-DiT-tiny-text", {"text": None}, "text=None"),
        ("EC-DiT-tiny-text", {"text": torch.zeros(3, 7, 5)}, r"expected \(3, 7, 128\)"),
        ("EC-DiT-tiny-text", {"text_mask": torch.ones(3, 6, dtype=torch.bool)}, "text_mask has"),
        ("EC-DiT-tiny-text", {"text_mask": torch.ones(3, 7)}, "dtype torch.float32"),
        ("EC-DiT-tiny-text", {"labels": torch.zeros(3, dtype=torch.int64)}, "labels given"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    model = _model(name)
    with pytest.raises(ValueError, match=message):
        model(**{**_inputs(model.config), **change})


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    config = PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_fields_are_refused() -> None:
    values = PRESETS["EC-DiT-tiny"].to_dict()
    with pytest.raises(ValueError, match=r"unknown model fields \['hidden_dim'\]"):
        ModelConfig.from_dict({**values, "hidden_dim": 3})
    del values["depth"]
    with pytest.raises(ValueError, match=r"missing model fields \['depth'\]"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("DiT-tiny", "family", "unet"),
        ("DiT-tiny", "depth", 0),
        ("DiT-tiny", "depth", 2.0),
        ("DiT-tiny", "num_heads", 5),
        ("DiT-tiny", "num_kv_heads", 3),
        ("DiT-tiny", "hidden_size", True),
        ("DiT-tiny", "image_size", 15),
        ("DiT-tiny", "num_classes", -1),
        ("DiT-tiny", "mlp_ratio", 0.001),
        ("DiT-tiny", "time_scale", 0.0),
        ("DiT-tiny", "time_scale", float("nan")),
        ("DiT-tiny", "mlp_bias", 1),
        ("DiT-tiny", "num_experts", 8),
        ("DiT-tiny", "affinity", "sigmoid"),
        ("DiT-MoE-tiny", "top_k", 9),
        ("DiT-MoE-tiny", "top_k", 0),
        ("DiT-MoE-tiny", "capacity_factor", 2.0),
        ("DiT-MoE-tiny", "group", "batch"),
        ("DiT-MoE-tiny", "affinity", "identity"),
        ("DiT-MoE-tiny", "expert_activation", "relu"),
        ("EC-DiT-tiny", "capacity_factor", 0.0),
        ("EC-DiT-tiny", "capacity_factor", 8.5),
        ("EC-DiT-tiny", "top_k", 2),
        ("EC-DiT-tiny", "moe_every", 7),
        ("EC-DiT-tiny", "group", "layer"),
        ("EC-DiT-tiny", "group", 0),
        ("EC-DiT-tiny", "rounding", "up"),
        ("EC-DiT-tiny", "normalize", "softmax"),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(name: str, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as error:
        dataclasses.replace(PRESETS[name], **{field: value})
    assert repr(value) in str(error.value)
