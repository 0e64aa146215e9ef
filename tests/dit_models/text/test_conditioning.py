"""What a text-conditional model reads: projections, null captions, and nothing of the padding."""

import copy
from pathlib import Path

import pytest
import torch

from dit_models.assemble import build_conditioned_model, model_config_for
from dit_models.checkpoints import CheckpointError, load_weights
from dit_models.conditioned import ConditionedModel
from dit_models.data import DatasetInfo
from dit_models.text import FrozenEncoder, PretrainedText, TextFeatures, describe_encoder
from dit_models.trainer import Trainer

from ..tiny_models import DIM, save_t5
from ..training import tiny_config

INFO = DatasetInfo("pictures", 8, 3, 0, has_captions=True)
LENGTH = 12


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("encoders") / "t5")


def config_for(run_dir: Path, t5: Path | str, *overrides: str):
    words = (f"text.encoder={t5}", f"text.max_length={LENGTH}", "text.cache=none")
    return tiny_config(run_dir, *words, *overrides, recipe="digit-scenes")


def build(run_dir: Path, t5: Path | str, *overrides: str) -> ConditionedModel:
    model = build_conditioned_model(config_for(run_dir, t5, *overrides), INFO, "cpu")
    with torch.no_grad():  # away from the zero start, where text has no effect
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def predict(model: ConditionedModel, **condition: torch.Tensor) -> torch.Tensor:
    batch_size = len(condition["text"])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch_size, 3, 8, 8, generator=generator)
    return model(x, torch.full((batch_size,), 0.5), **condition).sample


CAPTIONS = ["a red cat", "", "one two three four five"]


@pytest.mark.parametrize("encoder", ["bytes", "t5"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30, -7.0])
def test_what_stands_at_padding_never_changes_an_output(tmp_path, t5, encoder, garbage):
    if encoder == "bytes":
        config = tiny_config(
            tmp_path, "model_options.text_dim=16", "text.max_length=32", recipe="digit-scenes"
        )
        model = build_conditioned_model(config, INFO, "cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    else:
        model = build(tmp_path, t5, "text.projection=linear", "model_options.text_dim=16")
    condition = model.condition(captions=CAPTIONS)
    text, mask = condition["text"], condition["text_mask"]
    assert not mask.all()
    filled = torch.where(mask[:, :, None], text, torch.full_like(text, garbage))
    expected = predict(model, text=text, text_mask=mask)
    assert expected.isfinite().all()
    assert torch.equal(predict(model, text=filled, text_mask=mask), expected)
    changed = predict(model, text=text.roll(1, 0), text_mask=mask.roll(1, 0))
    assert (changed - expected).abs().max() > 1e-4  # text does have an effect


@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
@pytest.mark.parametrize("null", ["empty", "zeros", "learned"])
def test_stored_padding_never_changes_an_output(tmp_path, t5, null, garbage):
    overrides = ("text.projection=linear", "model_options.text_dim=16", f"text.null={null}")
    model = build(tmp_path, t5, *overrides)
    features = torch.randn(3, LENGTH, DIM)
    mask = torch.arange(LENGTH) < torch.tensor([4, 1, 12])[:, None]
    is_null = torch.tensor([False, True, False])
    clean = TextFeatures(features, mask, is_null)
    dirty = clean._replace(features=features.masked_fill(~mask[:, :, None], garbage))
    expected = predict(model, **model.condition(text=clean))
    assert torch.equal(predict(model, **model.condition(text=dirty)), expected)
    upstream = torch.randn_like(expected)
    gradients = []
    for text in (clean, dirty):
        model.zero_grad()
        predict(model, **model.condition(text=text)).backward(upstream)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_the_length_of_the_padding_changes_an_output_by_rounding_at_most(tmp_path, t5):
    overrides = ("text.projection=linear", "model_options.text_dim=16")
    short = build(tmp_path, t5, *overrides)
    wide = build_conditioned_model(
        config_for(tmp_path, t5, *overrides, "text.max_length=40"), INFO, "cpu"
    )
    wide.load_state_dict(short.state_dict())
    out, wide_out = (predict(m, **m.condition(captions=CAPTIONS)) for m in (short, wide))
    exact = predict(
        copy.deepcopy(short).double(),
        **{
            name: value.double() if value.is_floating_point() else value
            for name, value in short.condition(captions=CAPTIONS).items()
        },
    )
    floor = (out - exact).abs().max()
    assert (wide_out - exact).abs().max() <= 2 * floor + 1e-6


def test_a_caption_does_not_depend_on_its_batch(tmp_path, t5):
    model = build(tmp_path, t5)
    together = model.condition(captions=CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = model.condition(captions=[caption])
        assert torch.equal(alone["text_mask"][0], together["text_mask"][row])
        torch.testing.assert_close(alone["text"][0], together["text"][row], rtol=0, atol=1e-6)


def test_without_a_projection_the_model_has_the_encoders_width(tmp_path, t5):
    assert model_config_for(config_for(tmp_path, t5), INFO).text_dim == DIM
    model = build(tmp_path, t5)
    assert [name for name, _ in model.text_encoder.named_parameters()] == []
    with pytest.raises(ValueError, match="text_dim follows from the text encoder"):
        model_config_for(config_for(tmp_path, t5, "model_options.text_dim=32"), INFO)


def test_null_captions_are_what_the_option_says(tmp_path, t5):
    learned = build(tmp_path, t5, "text.null=learned")
    text, mask = learned.condition(captions=CAPTIONS).values()
    assert text.shape == (3, LENGTH, DIM)
    assert mask[1].tolist() == [True] + [False] * (LENGTH - 1)
    assert torch.equal(text[1, 0], learned.text_encoder.null_token)
    upstream = torch.randn_like(text)
    text.backward(upstream)
    assert torch.equal(learned.text_encoder.null_token.grad, upstream[1, 0])

    zeros = build(tmp_path, t5, "text.null=zeros", "text.projection=linear",
                  "model_options.text_dim=24")  # fmt: skip
    text, mask = zeros.condition(captions=CAPTIONS).values()
    assert mask[1].tolist() == [True] + [False] * (LENGTH - 1)
    assert not text[1].any()
    assert text[0].any()

    empty = build(tmp_path, t5)
    text, mask = empty.condition(captions=CAPTIONS).values()
    expected = FrozenEncoder(describe_encoder(str(t5), max_length=LENGTH)).encode([""])[0]
    assert torch.equal(text[1][mask[1]], expected)
    null = empty.null_condition(2)
    assert torch.equal(null["text"][0], text[1])
    assert null["text"].shape == (2, LENGTH, DIM)


def test_every_trained_part_gets_a_gradient_and_the_encoder_none(tmp_path, t5):
    model = build(tmp_path, t5, "text.projection=linear", "text.null=learned",
                  "model_options.text_dim=24")  # fmt: skip
    out = predict(model, **model.condition(captions=CAPTIONS))
    out.backward(torch.randn_like(out))
    for name, parameter in model.text_encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad for p in model.text_encoder.frozen.load().parameters())


def test_copies_share_the_frozen_weights_and_no_state_dict_holds_them(tmp_path, t5):
    model = build(tmp_path, t5, "text.projection=linear", "model_options.text_dim=24")
    assert copy.deepcopy(model).text_encoder.frozen is model.text_encoder.frozen
    names = {name for name in model.state_dict() if name.startswith("text_encoder.")}
    assert names == {f"text_encoder.{name}" for name in
                     ("identity", "projection.weight", "projection.bias")}  # fmt: skip


def test_weights_of_another_encoder_are_refused(tmp_path, t5):
    other = save_t5(tmp_path / "other", seed=9)
    trainer = Trainer(config_for(tmp_path / "run", t5), tmp_path / "run")
    checkpoint = trainer.save()
    load_weights(checkpoint, "model", build(tmp_path, t5).float())  # the same fits
    model = Trainer(config_for(tmp_path / "run2", other), tmp_path / "run2").model
    with pytest.raises(CheckpointError, match="were trained with the text encoder of SHA-256"):
        load_weights(checkpoint, "model", model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("text.encoder=bytes", "text.null=zeros"), "text.null='zeros' has no effect on the byte"),
        (("text.encoder=bytes", "text.dtype=bf16"), "text.dtype='bf16' has no effect"),
        (("text.depth=3",), "text.depth=3 has no effect on a pretrained"),
        (("text.encoder=/none",), "no such folder"),
    ],
)
def test_fields_without_effect_are_refused(tmp_path, t5, overrides, message):
    words = [] if "bytes" in overrides[0] else [f"text.encoder={t5}"]
    config = tiny_config(tmp_path, *words, *overrides, recipe="digit-scenes")
    with pytest.raises(ValueError, match=message):
        build_conditioned_model(config, INFO, "cpu")


def test_text_fields_of_a_class_conditional_model_are_refused(tmp_path):
    config = tiny_config(tmp_path, "text.max_length=9")
    with pytest.raises(ValueError, match=r"is class-conditional, so .* has no effect"):
        Trainer(config, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.null=nothing", "text.null='nothing'; expected one of empty, zeros, learned"),
        ("text.projection=mlp", "expected one of none, linear"),
        ("text.layer=0", "expected -1"),
        ("text.depth=0", "text.depth=0; expected at least 1"),
        ("text.max_length=1", "text.max_length=1"),
        ("text.encoder=''", "text.encoder is empty"),
    ],
)
def test_wrong_values_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, override, recipe="digit-scenes")


def test_features_of_another_width_are_refused(tmp_path, t5):
    text = PretrainedText(FrozenEncoder(describe_encoder(str(t5), max_length=LENGTH)))
    wrong = TextFeatures(torch.zeros(1, LENGTH, 8), torch.ones(1, LENGTH, dtype=torch.bool),
                         torch.zeros(1, dtype=torch.bool))  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \(B, L, 16\)"):
        text(wrong)
    with pytest.raises(ValueError, match="non-empty list"):
        text.encode("a single string")
