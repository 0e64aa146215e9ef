"""Options of the backbone: rotary positions, grouped heads, query and key norms, dense FFN."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_models.attention import SelfAttention
from dit_models.backbone import DiT
from dit_models.count import count_macs, count_model
from dit_models.dit import DenseFFN
from dit_models.models import build_model
from dit_models.presets import PRESETS
from dit_models.rope import Rotation, rotate, rotation_of_grid
from moe_kernels.testing import assert_as_accurate, relative_error


def _turned(heads: Tensor, rows: int, columns: int, theta: float) -> Tensor:
    """The rotation written out with complex numbers in fp64, channel pair by channel pair."""
    head_dim = heads.shape[-1]
    pairs = torch.complex(*heads.double().chunk(2, dim=-1)).clone()
    quarter = head_dim // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                for axis, position in enumerate((row, column)):
                    angle = torch.tensor(position * theta ** (-i / quarter), dtype=torch.float64)
                    turn = torch.polar(torch.ones_like(angle), angle)
                    pairs[..., row * columns + column, axis * quarter + i] *= turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def _plainly_turned(heads: Tensor, rows: int, columns: int, theta: float) -> Tensor:
    """The same in the dtype of ``heads``, with plain PyTorch."""
    quarter = heads.shape[-1] // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=heads.dtype) / quarter)
    token = torch.arange(rows * columns)
    positions = torch.stack([token // columns, token % columns], dim=1).to(heads.dtype)
    angles = (positions[:, :, None] * frequencies).flatten(1)
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize(
    ("rows", "columns", "head_dim", "theta"),
    [(3, 5, 8, 10000.0), (4, 4, 16, 100.0), (1, 7, 4, 10.0), (32, 2, 8, 10000.0)],
)
def test_rotations_match_complex_numbers(rows, columns, head_dim, theta):
    heads = torch.randn(2, 3, rows * columns, head_dim)
    got = rotate(heads, rotation_of_grid(rows, columns, head_dim, theta))
    plain = _plainly_turned(heads, rows, columns, theta)
    assert_as_accurate(got, plain, _turned(heads, rows, columns, theta))


def test_scores_depend_on_the_difference_of_rows_and_of_columns_alone():
    rows, columns, head_dim = 4, 5, 16
    query, key = torch.randn(2, head_dim, dtype=torch.float64)
    rotation = Rotation(*(part.double() for part in rotation_of_grid(rows, columns, head_dim)))
    everywhere = torch.stack([query, key])[:, None, None].expand(2, 1, rows * columns, head_dim)
    queries, keys = rotate(everywhere, rotation)[:, 0]
    scores = (queries @ keys.T).view(rows, columns, rows, columns)
    by_offset: dict[tuple[int, int], Tensor] = {}
    for row in range(rows):
        for column in range(columns):
            for other in range(rows):
                for another in range(columns):
                    score = scores[row, column, other, another]
                    first = by_offset.setdefault((other - row, another - column), score)
                    # cosines are rounded to fp32
                    assert abs(score - first) < 2e-6 * query.norm() * key.norm()
    values = torch.stack(list(by_offset.values()))
    assert len(values) == (2 * rows - 1) * (2 * columns - 1)
    assert values.unique().numel() == len(values)


def test_low_precision_heads_are_turned_in_fp32():
    heads = torch.randn(1, 2, 12, 8).bfloat16()
    rotation = rotation_of_grid(3, 4, 8)
    assert rotation.cos.dtype == torch.float32
    got = rotate(heads, rotation)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(heads.float(), rotation).bfloat16())


@pytest.mark.parametrize("qk_norm_kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("rotated", [False, True])
def test_attention_matches_the_written_out_formula(qk_norm_kind, rotated):
    rows, columns, head_dim = 2, 3, 8
    attention = SelfAttention(48, 6, 2, qk_norm=True, qk_norm_kind=qk_norm_kind)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    x = torch.randn(2, rows * columns, 48)

    def written_out(module: SelfAttention, x: Tensor, turned: Any) -> Tensor:
        query, key, value = module.qkv(x).split([48, 16, 16], dim=2)
        out = torch.empty_like(x)

        def norm(part: Tensor, weights: nn.Module) -> Tensor:
            if qk_norm_kind == "layer_norm":
                part = part - part.mean(dim=-1, keepdim=True)
            part = part / (part.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            part = part * weights.weight
            return part + weights.bias if qk_norm_kind == "layer_norm" else part

        for head in range(6):
            kv = slice(head // 3 * head_dim, (head // 3 + 1) * head_dim)
            mine = slice(head * head_dim, (head + 1) * head_dim)
            q, k = norm(query[..., mine], module.q_norm), norm(key[..., kv], module.k_norm)
            if rotated:
                q, k = turned(q, rows, columns, 10000.0), turned(k, rows, columns, 10000.0)
            weights = (q @ k.transpose(1, 2) / head_dim**0.5).softmax(dim=2)
            out[..., mine] = weights @ value[..., kv]
        return module.proj(out)

    rotation = rotation_of_grid(rows, columns, head_dim) if rotated else None
    got, plain = attention(x, rotation=rotation), written_out(attention, x, _plainly_turned)
    exact = written_out(attention.double(), x.double(), _turned)
    assert_as_accurate(got, plain, exact)


@pytest.mark.filterwarnings("error")  # PyTorch warns of an rms_norm in mixed dtypes
@pytest.mark.parametrize("qk_norm_kind", ["layer_norm", "rms_norm"])
def test_attention_runs_under_autocast(qk_norm_kind):
    attention = SelfAttention(32, 4, 2, qk_norm=True, qk_norm_kind=qk_norm_kind)
    x, rotation = torch.randn(2, 6, 32), rotation_of_grid(2, 3, 8)
    exact = attention(x, rotation=rotation)
    with torch.autocast("cpu", torch.bfloat16):
        low = attention(x, rotation=rotation)
    assert low.dtype == torch.bfloat16
    gradients = torch.autograd.grad(low, list(attention.parameters()), torch.randn_like(low))
    assert all(gradient.isfinite().all() for gradient in gradients)
    # a few roundings to 8 bits
    assert (low - exact).norm() < 3 * 2**-8 * exact.norm()


def test_grouped_heads_equal_repeated_ones():
    grouped, full = SelfAttention(32, 8, 2), SelfAttention(32, 8)
    for parameter in grouped.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = getattr(grouped.qkv, name).split([32, 8, 8])
            heads = [part.unflatten(0, (-1, 4)) for part in parts]
            repeated = [heads[0], *(part.repeat_interleave(4, dim=0) for part in heads[1:])]
            getattr(full.qkv, name).copy_(torch.cat([part.flatten(0, 1) for part in repeated]))
    full.proj.load_state_dict(grouped.proj.state_dict())
    x = torch.randn(2, 9, 32)
    got, plain = grouped(x), full(x)
    assert_as_accurate(got, plain, full.double()(x.double()))
    assert grouped.qkv.weight.shape == (32 + 2 * 8, 32)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu_tanh", lambda h: nn.functional.gelu(h, approximate="tanh")),
        ("gelu", nn.functional.gelu),
        ("swiglu", lambda h: nn.functional.silu(h[..., :24]) * h[..., 24:]),
    ],
)
def test_the_dense_ffn_has_the_activation_of_the_config(activation, function):
    ffn = DenseFFN(8, 24, activation=activation)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter)
    first = ffn.gate_up_proj if activation == "swiglu" else ffn.up_proj
    x = torch.randn(2, 3, 8)

    def plainly(dtype: torch.dtype) -> Tensor:
        ffn.to(dtype)
        return ffn.down_proj(function(first(x.to(dtype))))

    got, plan = ffn(x)
    assert plan is None
    assert_as_accurate(got, plainly(torch.float32), plainly(torch.float64))
    weights = sum(parameter.numel() for parameter in ffn.parameters() if parameter.ndim == 2)
    assert weights == (3 if activation == "swiglu" else 2) * 8 * 24


OPTIONS: dict[str, dict[str, Any]] = {
    "both": {"positions": "both", "rope_theta": 100.0},
    "everything": {
        "positions": "rope",
        "qk_norm": True,
        "qk_norm_kind": "rms_norm",
        "num_kv_heads": 2,
        "mlp_activation": "swiglu",
    },
}


def _model(**changes: Any) -> DiT:
    config = dataclasses.replace(
        PRESETS["EC-DiT-tiny"], depth=2, hidden_size=32, num_experts=4, **changes
    )
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _inputs(batch_size: int = 2, height: int = 16, width: int = 16) -> dict[str, Tensor]:
    return {
        "latents": torch.randn(batch_size, 1, height, width, dtype=torch.float64),
        "timesteps": torch.rand(batch_size),
        "labels": torch.arange(batch_size),
    }


@pytest.mark.parametrize("name", ["both", "everything"])
def test_models_with_options_train_compiled_checkpointed_and_on_other_sizes(name):
    model = _model(**OPTIONS[name]).double()
    inputs = _inputs(height=12, width=20)
    upstream = torch.randn(2, 1, 12, 20, dtype=torch.float64)

    def backward() -> list[Tensor]:
        sample = model(**inputs).sample
        return torch.autograd.grad(sample, list(model.parameters()), upstream)

    expected = backward()
    for (parameter, _), gradient in zip(model.named_parameters(), expected, strict=True):
        assert gradient.isfinite().all(), parameter
        assert gradient.abs().max() > 0, parameter
    model.gradient_checkpointing = True
    for got, wanted in zip(backward(), expected, strict=True):
        assert torch.equal(got, wanted)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    for got, wanted in zip(backward(), expected, strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_each_kind_of_positions_sees_where_a_patch_is():
    inputs = _inputs()
    turned = {**inputs, "latents": inputs["latents"].roll(2, dims=3)}  # by one patch
    stored = {}
    for positions in ("sincos", "rope", "both"):
        model = _model(positions=positions).eval()
        moved = model(**turned).sample.roll(-2, dims=3)
        assert (moved - model(**inputs).sample).abs().max() > 1e-3
        stored[positions] = model.pos_embed
    assert stored["rope"] is None
    assert torch.equal(stored["sincos"], stored["both"])


def test_without_any_position_a_rolled_image_gives_the_rolled_prediction():
    # The check of the test above can fail: with the rotations undone nothing sees the place.
    model = _model(positions="rope").double().eval()
    model._rotation = lambda *_: None
    inputs = _inputs()
    turned = {**inputs, "latents": inputs["latents"].roll(2, dims=3)}
    moved = model(**turned).sample.roll(-2, dims=3)
    assert relative_error(moved, model(**inputs).sample) < 1e-12


def test_rotations_survive_a_model_in_bf16():
    config = dataclasses.replace(PRESETS["DiT-tiny"], depth=1, positions="rope")
    model = build_model(config, dtype=torch.bfloat16)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].rotation))
    assert model(**_inputs()).sample.dtype == torch.float64  # that of the latents
    assert seen[0].cos.dtype == torch.float32
    copy = build_model(config, device="meta").to_empty(device="cpu")
    copy.reset_parameters()
    assert copy(**_inputs()).sample.isfinite().all()


def test_counts_follow_the_options():
    config = dataclasses.replace(
        PRESETS["EC-DiT-tiny"],
        positions="rope",
        mlp_activation="swiglu",
        num_kv_heads=2,
        mask_decoder_depth=2,
        qk_norm_kind="rms_norm",
    )
    model = build_model(config, device="meta")
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embedding_table" in name or ".experts." in name:
            continue
        expected += parameter.numel() * (1 if "adaLN" in name or "t_embedder" in name else 64)
    per_expert = 2 * 128 * 512  # both matrices
    expected += len(config.moe_blocks) * 64 * 2 * per_expert  # two experts a token
    assert count_macs(config, 16, 16) == expected
    count = count_model(model)
    assert count.frozen == 0
    assert count.total == count.trainable
    dense = count_model(build_model(PRESETS["EC-DiT-tiny"], device="meta"))
    gate = len(range(0, 6, 2)) * (512 * 128 + 512)  # of the dense blocks, with biases
    keys = 6 * 2 * 64 * (128 + 1)
    norms = 6 * 2 * 32  # no biases
    assert count.trainable == dense.trainable + gate - keys - norms + 128


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DiT-tiny", {"positions": "alibi"}, "positions='alibi': expected one of sincos, rope"),
        ("DiT-tiny", {"rope_theta": 100.0}, "has no rotations: leave it at 10000.0"),
        ("DiT-tiny", {"positions": "rope", "rope_theta": 0.0}, "expected a number above 0"),
        ("DiT-tiny", {"positions": "rope", "hidden_size": 24}, "a multiple of 4, not 6"),
        ("DiT-tiny", {"qk_norm": False, "qk_norm_kind": "rms_norm"}, "qk_norm=False has no norm"),
        ("DiT-tiny", {"mlp_activation": "relu"}, "expected one of gelu_tanh, gelu, swiglu"),
        ("DiT-MoE-tiny", {"mlp_activation": "swiglu"}, "no block is dense"),
        ("DiT-tiny", {"mask_decoder_depth": 6}, "expected below depth=6"),
        ("DiT-tiny", {"mask_decoder_depth": -1}, "an integer of at least 0"),
    ],
)
def test_options_without_effect_or_sense_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS[name], **changes)
