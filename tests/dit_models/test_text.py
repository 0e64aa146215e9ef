"""The byte-level text encoder: tokens, masks and independence of padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_models.text import BOS, EOS, PAD, ByteTextEncoder


@pytest.fixture(scope="module")
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(32, max_length=24, depth=2, num_heads=4)


_shared_encoder = ByteTextEncoder(8, max_length=64, depth=1, num_heads=2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=15), min_size=1, max_size=4))
def test_tokens_hold_the_utf8_bytes_between_bos_and_eos(captions: list[str]) -> None:
    tokens, mask = _shared_encoder.tokenize(captions)
    assert tokens.dtype == torch.int64
    assert mask.dtype == torch.bool
    for row, kept, caption in zip(tokens.tolist(), mask, captions, strict=True):
        length = int(kept.sum())
        assert row[0] == BOS
        assert row[length - 1] == EOS
        assert bytes(row[1 : length - 1]).decode("utf-8") == caption
        assert row[length:] == [PAD] * (len(row) - length)
        assert kept[:length].all()


def test_the_null_caption_is_two_tokens_and_never_all_padding(encoder: ByteTextEncoder) -> None:
    tokens, mask = encoder.tokenize(["", "a red cat"])
    assert tokens[0, :3].tolist() == [BOS, EOS, PAD]
    assert mask[0].sum() == 2
    features = encoder(tokens, mask)
    assert features.isfinite().all()


def test_padding_to_the_longest_or_to_max_length(encoder: ByteTextEncoder) -> None:
    assert encoder.tokenize(["abc", "a"])[0].shape == (2, 5)
    assert encoder.tokenize(["abc", "a"], pad_to_max=True)[0].shape == (2, 24)


def test_a_caption_too_long_is_refused_with_its_length(encoder: ByteTextEncoder) -> None:
    assert encoder.tokenize(["x" * 22])[0].shape == (1, 24)
    with pytest.raises(ValueError, match=r"24 UTF-8 bytes .* max_length is 24"):
        encoder.tokenize(["ok", "é" * 12])


@pytest.mark.parametrize("captions", ["a single string", []])
def test_captions_must_be_a_list(encoder: ByteTextEncoder, captions: object) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        encoder.tokenize(captions)  # type: ignore[arg-type]


def test_padding_changes_no_feature_of_a_token(encoder: ByteTextEncoder) -> None:
    tokens, mask = encoder.tokenize(["a cat", "two dogs"])
    wide, wide_mask = encoder.tokenize(["a cat", "two dogs"], pad_to_max=True)
    features, wide_features = encoder(tokens, mask), encoder(wide, wide_mask)
    torch.testing.assert_close(wide_features[:, : tokens.shape[1]], features)
    other_pad = torch.where(wide_mask, wide, 7)
    assert torch.equal(encoder(other_pad, wide_mask), wide_features)
    assert torch.equal(wide_features[~wide_mask], torch.zeros_like(wide_features[~wide_mask]))


def test_features_depend_on_the_order_of_the_bytes(encoder: ByteTextEncoder) -> None:
    features = encoder(*encoder.tokenize(["ab", "ba"]))
    assert not torch.allclose(features[0, -1], features[1, -1], atol=1e-3)


def test_every_parameter_gets_a_gradient(encoder: ByteTextEncoder) -> None:
    encoder.zero_grad()
    features = encoder(*encoder.tokenize(["a cat", ""]))
    features.backward(torch.randn_like(features))
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_train_and_eval_agree_bit_for_bit(encoder: ByteTextEncoder) -> None:
    batch = encoder.tokenize(["a cat", "xyz"])
    trained = encoder(*batch)
    with torch.no_grad():
        evaluated = encoder.eval()(*batch)
    encoder.train()
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_dim": 30}, "multiple of num_heads"),
        ({"text_dim": 32, "max_length": 1}, "max_length=1"),
        ({"text_dim": 32, "depth": 0}, "depth=0"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteTextEncoder(**arguments)


def test_bad_shapes_are_refused(encoder: ByteTextEncoder) -> None:
    tokens, mask = encoder.tokenize(["abc"])
    with pytest.raises(ValueError, match="one shape"):
        encoder(tokens, mask[:, :-1])
    long = torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 24"):
        encoder(long, torch.ones_like(long, dtype=torch.bool))
