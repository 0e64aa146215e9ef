"""Masked training: what is kept, what the blocks see, what is compared; it goes on exactly."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_models.backbone import DiT
from dit_models.checkpoints import CheckpointError
from dit_models.config_io import differing_fields, fields_of
from dit_models.diffusion import DDPM, RectifiedFlow
from dit_models.drawing import example_prompts
from dit_models.embeddings import patchify
from dit_models.masking import draw_kept_tokens, kept_count, kept_pixels, reconstruction_loss
from dit_models.models import build_model
from dit_models.outputs import DiTOutput
from dit_models.presets import PRESETS
from dit_models.trainer import Trainer
from moe_kernels.testing import assert_as_accurate, relative_error

from .training import tiny_config

MASKED = ("masking.ratio=0.5",)
DECODER = (
    *MASKED,
    "model_options.depth=4",
    "model_options.mask_decoder_depth=1",
    "masking.reconstruction=0.1",
)


def _model(name: str = "EC-DiT-tiny", **changes: Any) -> DiT:
    config = {"depth": 4, "hidden_size": 32, **changes}
    if PRESETS[name].num_experts:
        config["num_experts"] = 4
    model = build_model(dataclasses.replace(PRESETS[name], **config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.reset_buffers()  # positions in fp64
    return model


def _inputs(model: DiT, height: int = 16, width: int = 16) -> dict[str, Tensor]:
    config = model.config
    inputs = {
        "latents": torch.randn(2, config.in_channels, height, width, dtype=torch.float64),
        "timesteps": torch.rand(2),
    }
    if config.num_classes:
        inputs["labels"] = torch.tensor([3, 10])
    if config.text_dim:
        inputs["text"] = torch.randn(2, 5, config.text_dim, dtype=torch.float64)
        inputs["text_mask"] = torch.arange(5) < torch.tensor([[5], [2]])
    return inputs


def _lengths(model: DiT) -> list[int]:
    """Fills, at each forward, with the tokens that each block and the final layer get."""
    seen: list[int] = []
    for module in (*model.blocks, model.final_layer):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize(
    ("seq_len", "ratio", "kept"),
    [(256, 0.5, 128), (256, 0.75, 64), (10, 0.7, 3), (10, 0.9, 1), (4, 0.99, 1), (7, 0.0, 7)],
)
def test_every_image_keeps_the_same_number_of_distinct_tokens_in_order(seq_len, ratio, kept):
    tokens = draw_kept_tokens(50, seq_len, ratio, torch.Generator().manual_seed(0))
    assert kept_count(seq_len, ratio) == kept
    assert tokens.shape == (50, kept)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 1:] > tokens[:, :-1]).all()
    assert tokens.min() >= 0
    assert tokens.max() < seq_len


def test_every_token_is_kept_as_often_and_the_generator_decides():
    def draw(seed: int) -> Tensor:
        return draw_kept_tokens(4000, 12, 0.75, torch.Generator().manual_seed(seed))

    tokens = draw(0)
    assert torch.equal(tokens, draw(0))
    assert not torch.equal(tokens, draw(1))
    share = tokens.flatten().bincount(minlength=12) / 4000
    # 6 standard deviations of a share of 1/4 of 4000
    assert (share - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / 4000)
    together = (tokens == 0).any(1) & (tokens == 1).any(1)
    assert abs(together.double().mean() - 3 / 12 * 2 / 11) < 6 * math.sqrt(0.0454 / 4000)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        draw_kept_tokens(2, 4, ratio)


@pytest.mark.parametrize("positions", ["sincos", "rope", "both"])
@pytest.mark.parametrize("name", ["DiT-tiny", "DiT-MoE-tiny", "EC-DiT-tiny", "EC-DiT-tiny-text"])
def test_keeping_a_rectangle_is_the_image_cut_to_it(name, positions):
    model = _model(name, positions=positions)
    patch, inputs = model.config.patch_size, _inputs(model, *(2 * [8 * PRESETS[name].patch_size]))
    rows, columns = 4, 6
    corner = (torch.arange(rows)[:, None] * 8 + torch.arange(columns)).flatten()
    masked = model(**inputs, kept_tokens=corner.expand(2, -1))
    cut = {**inputs, "latents": inputs["latents"][:, :, : rows * patch, : columns * patch]}
    expected = model(**cut)
    inside = masked.sample[:, :, : rows * patch, : columns * patch]
    assert relative_error(inside, expected.sample) < 1e-12
    outside = masked.sample.clone()
    outside[:, :, : rows * patch, : columns * patch] = 0
    assert torch.equal(outside, torch.zeros_like(outside))
    for got, wanted in zip(masked.plans, expected.plans, strict=True):
        assert torch.equal(got.token_indices, wanted.token_indices)
        assert got.num_rows == wanted.num_rows


def test_keeping_everything_changes_no_bit():
    for depth in (0, 2):
        model = _model(mask_decoder_depth=depth)
        inputs = _inputs(model)
        everything = draw_kept_tokens(2, 64, 0.0)
        assert torch.equal(model(**inputs, kept_tokens=everything).sample, model(**inputs).sample)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_blocks_get_the_kept_tokens_and_the_decoder_all(depth):
    model = _model(mask_decoder_depth=depth)
    seen = _lengths(model)
    plans = model(**_inputs(model), kept_tokens=draw_kept_tokens(2, 64, 0.75)).plans
    encoder = [16] * (4 - depth)
    assert seen == [*encoder, *[64] * depth, 64 if depth else 16]
    # expert choice: C = 2 S / 4 follows the tokens there are
    assert [plan.capacity for plan in plans] == ([8, 8] if depth == 0 else [8, 32])


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_hidden_patches_never_reach_a_prediction(depth, positions):
    model = _model(mask_decoder_depth=depth, positions=positions)
    inputs = _inputs(model)
    kept = draw_kept_tokens(2, 64, 0.5)
    hidden = kept_pixels(kept, inputs["latents"], 2) == 0
    sample = model(**inputs, kept_tokens=kept).sample
    for junk in (1e4, float("nan"), float("inf")):
        latents = inputs["latents"].masked_fill(hidden, junk)
        assert torch.equal(model(**{**inputs, "latents": latents}, kept_tokens=kept).sample, sample)
    changed = {**inputs, "latents": inputs["latents"].masked_fill(~hidden, 0.0)}
    assert not torch.equal(model(**changed, kept_tokens=kept).sample, sample)


def test_mask_tokens_know_their_place_and_learn():
    model = _model("DiT-tiny", mask_decoder_depth=1)
    kept = draw_kept_tokens(2, 64, 0.5)
    decoder_input: list[Tensor] = []
    model.blocks[3].register_forward_pre_hook(lambda _, args: decoder_input.append(args[0]))
    sample = model(**_inputs(model), kept_tokens=kept).sample
    (gradient,) = torch.autograd.grad(sample, model.mask_token, torch.randn_like(sample))
    assert gradient.abs().min() > 0
    expected = (model.mask_token + model.pos_embed[0]).expand(2, -1, -1)
    for image in range(2):
        hidden = [token for token in range(64) if token not in kept[image]]
        assert torch.equal(decoder_input[0][image, hidden], expected[image, hidden])


def test_a_decoder_adds_the_mask_token_and_nothing_changes_without_masking():
    torch.manual_seed(0)
    plain = _model()
    model = _model(mask_decoder_depth=2)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["mask_token"]
    inputs = _inputs(model)
    assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
    with torch.no_grad():
        model.mask_token.fill_(float("nan"))
    model.reset_parameters()
    assert 0.01 < model.mask_token.std() < 0.03


def test_masked_training_is_checkpointed_and_compiled():
    model = _model(depth=2, mask_decoder_depth=1, positions="both")
    inputs = {**_inputs(model), "kept_tokens": draw_kept_tokens(2, 64, 0.5)}
    upstream = torch.randn(2, 1, 16, 16, dtype=torch.float64)

    def backward() -> list[Tensor]:
        sample = model(**inputs).sample
        return torch.autograd.grad(sample, list(model.parameters()), upstream)

    expected = backward()
    model.gradient_checkpointing = True
    for got, wanted in zip(backward(), expected, strict=True):
        assert torch.equal(got, wanted)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    for got, wanted in zip(backward(), expected, strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), r"shape \(3, 4\): expected \(2, 1 to 64\)"),
        (torch.zeros(2, 65, dtype=torch.int64), "1 to 64"),
        (torch.zeros(2, 0, dtype=torch.int64), "1 to 64"),
        (torch.zeros(2, 4, dtype=torch.int32), "expected torch.int64"),
    ],
)
def test_kept_tokens_that_do_not_fit_are_refused(kept, message):
    model = _model()
    with pytest.raises(ValueError, match=message):
        model(**_inputs(model), kept_tokens=kept)


def _batch(channels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, kept tokens of 4 x 6 patches of 2, and which patches they are (B, S)."""
    images, noise = torch.randn(2, 2, channels, 8, 12).clamp(-1, 1)
    kept = draw_kept_tokens(2, 24, 0.5)
    is_kept = torch.zeros(2, 24, dtype=torch.bool)
    for image, tokens in enumerate(kept.tolist()):
        is_kept[image, tokens] = True
    return images, noise, kept, is_kept


def _patch_means(error: Tensor, chosen: Tensor) -> Tensor:
    patches = patchify(error, 2)
    return torch.stack([patches[image, chosen[image]].mean() for image in range(len(error))])


def test_kept_pixels_are_those_of_the_kept_patches():
    images, _, kept, is_kept = _batch()
    pixels = kept_pixels(kept, images, 2)
    assert pixels.shape == (2, 1, 8, 12)
    assert pixels.dtype == images.dtype
    assert torch.equal(patchify(pixels, 2), is_kept[:, :, None].expand(-1, -1, 4).float())


@pytest.mark.parametrize("objective", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_the_loss_is_that_of_the_kept_patches(objective):
    images, noise, kept, is_kept = _batch()
    timesteps = objective.sample_timesteps(2, None, images.device)
    prediction = torch.randn(2, objective.prediction_channels(3), 8, 12)
    weights = kept_pixels(kept, images, 2)

    def loss(prediction: Tensor, weights: Tensor | None, cut: Any = lambda x: x) -> Tensor:
        parts = (cut(images), cut(noise), timesteps)
        return objective.loss_at(lambda x, t: DiTOutput(prediction, ()), *parts, weights).loss

    got = loss(prediction, weights)
    # What the hidden patches hold plays no part, be it finite or not.
    junk = torch.where(weights > 0, prediction, torch.full_like(prediction, float("nan")))
    assert torch.equal(loss(junk, weights), got)

    # Every pixel has the same say, so the kept patches side by side are an image of their own.
    def cut(x: Tensor) -> Tensor:
        patches = patchify(x, 2).unflatten(2, (-1, 4))
        held = torch.stack([patches[image, is_kept[image]] for image in range(2)])
        return held.permute(0, 2, 1, 3)

    expected = loss(cut(prediction), None, cut)
    assert_as_accurate(got, expected, expected)


def test_the_reconstruction_compares_the_hidden_patches_of_the_first_channels():
    images, _, kept, is_kept = _batch()
    prediction = torch.randn(2, 6, 8, 12)
    got = reconstruction_loss(prediction, images, kept_pixels(kept, images, 2))
    error = (prediction[:, :3] - images).square()
    exact = _patch_means(error.double(), ~is_kept)
    assert_as_accurate(got, _patch_means(error, ~is_kept), exact)


def _steps(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    values = [trainer.train_step() for _ in range(count)]
    return [{name: torch.as_tensor(v).tolist() for name, v in each.items()} for each in values]


@pytest.mark.parametrize(
    "overrides",
    [
        (*MASKED, "masking.unmask_from=0.6"),  # stages change at step 4 of 6
        (*DECODER, "accumulate=2", "gradient_checkpointing=true"),
    ],
)
def test_masked_runs_go_on_bit_for_bit(tmp_path, overrides):
    whole = Trainer(tiny_config(tmp_path / "a", *overrides), tmp_path / "a")
    expected = _steps(whole, 6)
    first = Trainer(tiny_config(tmp_path / "b", *overrides), tmp_path / "b")
    got = _steps(first, 3)
    first.save()
    second = Trainer(tiny_config(tmp_path / "b", *overrides), tmp_path / "b")
    assert second.resume()
    assert got + _steps(second, 3) == expected
    for mine, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("recipe", ["digits", "digits-token-choice"])
def test_accumulated_masked_micro_batches_equal_the_batch(tmp_path, recipe):
    gradients, losses = [], []
    for accumulate in (1, 4):
        words = (*DECODER, f"accumulate={accumulate}", "router_loss.balance=1.0")
        trainer = Trainer(tiny_config(tmp_path, *words, recipe=recipe), tmp_path)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        losses.append(float(trainer.train_step()["loss"]))
        gradients.append([parameter.grad.double() for parameter in trainer.model.parameters()])
    assert math.isclose(*losses, rel_tol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(a.norm()) + 1e-9


def test_the_stage_ends_where_it_should_and_drawing_sees_every_patch(tmp_path):
    config = tiny_config(tmp_path, *MASKED, "masking.unmask_from=0.5")
    trainer = Trainer(config, tmp_path)
    seen = _lengths(trainer.model.backbone)
    per_step = []
    for _ in range(6):
        trainer.train_step()
        per_step.append(list(seen))
        seen.clear()
    assert per_step == [[32] * 3] * 3 + [[64] * 3] * 3
    masked = Trainer(tiny_config(tmp_path / "b", *MASKED), tmp_path / "b")
    masked.train_step()
    artist = masked.artist()
    drawn = _lengths(artist.model.backbone)
    artist.draw(example_prompts(masked.info, config.data, 2), [0, 1])
    assert set(drawn) == {64}


def test_without_masking_no_random_number_is_drawn_and_nothing_is_passed_on(tmp_path):
    trainer = Trainer(tiny_config(tmp_path), tmp_path)
    draws = trainer.randomness.draw(next(trainer.loader))
    before = trainer.generator.get_state()
    assert trainer.randomness.masked(draws, trainer.step) is draws
    assert torch.equal(trainer.generator.get_state(), before)
    assert draws.kept_tokens is None


def test_the_runs_own_generator_decides_what_is_kept(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, *MASKED), tmp_path)
    draws = trainer.randomness.draw(next(trainer.loader))
    expected = draw_kept_tokens(8, 64, 0.5, trainer.generator.clone_state())
    torch.manual_seed(99)
    assert torch.equal(trainer.randomness.masked(draws, trainer.step).kept_tokens, expected)


@pytest.mark.parametrize("target", ["noisy", "clean"])
def test_the_hidden_patches_loss_is_logged_and_added(tmp_path, target):
    words = (*DECODER, f"masking.reconstruction_target={target}", "masking.reconstruction=0.25")
    trainer = Trainer(tiny_config(tmp_path, *words), tmp_path)
    nn.init.normal_(trainer.model.backbone.final_layer.linear.bias)
    # A new model predicts the final layer's bias alone.
    bias = trainer.model.backbone.final_layer.linear.bias.detach().view(2, 2).repeat(8, 8)
    seen = []
    masked = trainer.randomness.masked
    trainer.randomness.masked = lambda *given: seen.append(masked(*given)) or seen[-1]
    losses = trainer.train_step()
    (draws,) = seen
    total = losses["diffusion_loss"] + 0.25 * losses["reconstruction_loss"]
    assert torch.equal(losses["loss"], total)
    noisy = trainer.objective.add_noise(draws.images, draws.noise, draws.timesteps)
    wanted = noisy if target == "noisy" else draws.images
    chosen = torch.ones(len(wanted), 64, dtype=torch.bool)
    for image, tokens in enumerate(draws.kept_tokens.tolist()):
        chosen[image, tokens] = False
    expected = _patch_means((bias - wanted).square(), chosen).mean()
    assert_as_accurate(losses["reconstruction_loss"], expected, expected)


@pytest.mark.parametrize(
    "recipe",
    ["digits-dense", "digits-ddpm", "digits-decoupled", "digits-diffmoe", "digits-expert-race",
     "digits-loss-free"],
)  # fmt: skip
def test_every_kind_of_model_trains_masked(tmp_path, recipe):
    words = DECODER if recipe != "digits-dense" else (*DECODER, "model_options.num_experts=0")
    trainer = Trainer(tiny_config(tmp_path, *words, recipe=recipe), tmp_path)
    seen = _lengths(trainer.model.backbone)
    losses = _steps(trainer, 2)[1]
    assert seen == [32, 32, 32, 64, 64] * 2
    assert all(math.isfinite(losses[name]) for name in ("loss", "reconstruction_loss", "grad_norm"))


def test_a_masked_model_learns(tmp_path):
    words = (*DECODER, "steps=40", "batch_size=32", "masking.reconstruction_target=clean")
    values = _steps(Trainer(tiny_config(tmp_path, *words), tmp_path), 40)
    for name in ("diffusion_loss", "reconstruction_loss"):
        first = sum(v[name] for v in values[:5]) / 5
        assert sum(v[name] for v in values[-10:]) / 10 < 0.8 * first, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("masking.ratio=1.0",), "masking.ratio=1.0; expected at least 0 and below 1"),
        (("masking.ratio=0.5", "masking.unmask_from=0"), "expected above 0 and at most 1"),
        (("masking.unmask_from=0.5",), "masking.ratio=0 hides nothing"),
        (("masking.ratio=0.5", "masking.reconstruction=-1"), "masking.reconstruction=-1"),
        (("masking.ratio=0.5", "masking.reconstruction_target=x"), "expected one of noisy, clean"),
        (
            ("masking.ratio=0.5", "masking.reconstruction_target=clean"),
            "no effect with masking.reconstruction=0",
        ),
        (("masking.ratio=0.5", "masking.reconstruction=0.1"), "set model_options.mask_decoder"),
        (("model_options.mask_decoder_depth=1",), "no effect with masking.ratio=0"),
        (("masking.ratio=0.001",), "hides none of the 64 patches"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_config(tmp_path, *words), tmp_path)


def test_a_stage_at_a_share_of_the_run_keeps_its_length(tmp_path):
    words = (*MASKED, "optimizer.schedule=constant")
    by_stage = "model_options.routing_options.capacity_by_stage=[[0,2.0],[0.5,1.0]]"
    saved = {name: value for name, value, _ in fields_of(tiny_config(tmp_path, *words))}
    assert not differing_fields(saved, tiny_config(tmp_path, *words, "steps=9"))
    staged = (*words, "masking.unmask_from=0.5")
    trainer = Trainer(tiny_config(tmp_path, *staged), tmp_path)
    trainer.save()
    (different,) = differing_fields(
        {name: value for name, value, _ in fields_of(tiny_config(tmp_path, *words, by_stage))},
        tiny_config(tmp_path, *words, by_stage, "steps=9"),
    )
    assert different == "steps: 6 before, 9 now"
    with pytest.raises(CheckpointError, match="steps: 6 before, 9 now"):
        Trainer(tiny_config(tmp_path, *staged, "steps=9"), tmp_path).resume()


def test_runs_from_before_masking_go_on(tmp_path):
    config = tiny_config(tmp_path)
    saved = {name: value for name, value, _ in fields_of(config) if "masking" not in name}
    assert not differing_fields(saved, config)
    (different,) = differing_fields(saved, tiny_config(tmp_path, *MASKED))
    assert different == "masking.ratio: 0.0 before, 0.5 now"
