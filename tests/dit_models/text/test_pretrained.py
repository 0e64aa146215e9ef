"""Frozen transformers encoders: the right features, no trace of padding, a sound cache."""

import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from dit_models.text import EmbeddingCache, FrozenEncoder, describe_encoder

from ..tiny_models import DIM, save_clip, save_gemma, save_t5, save_tokenizer

PROMPTS = ["a red seven", "", "a cat on a mat", "a red seven"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {
        "t5": save_t5(root / "t5"),
        "clip": save_clip(root / "clip"),
        "whole clip": save_clip(root / "whole-clip", whole=True),
        "gemma": save_gemma(root / "gemma"),
    }


CLASSES = {
    "t5": transformers.T5EncoderModel,
    "clip": transformers.CLIPTextModel,
    "whole clip": transformers.CLIPTextModel,
    "gemma": transformers.GemmaModel,
}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", list(CLASSES))
def test_features_are_those_of_the_bare_model_on_the_bare_tokens(encoders, name, layer):
    folder = encoders[name]
    spec = describe_encoder(str(folder), max_length=12, layer=layer)
    assert spec.dim == DIM
    frozen = FrozenEncoder(spec)
    got = frozen.encode(PROMPTS)
    model = CLASSES[name].from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    exact = CLASSES[name].from_pretrained(folder).eval().double()
    for prompt, features in zip(PROMPTS, got, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")  # no padding at all
        assert features.shape == (tokens["input_ids"].shape[1], DIM)
        with torch.no_grad():
            bare, truth = (
                each(**tokens).last_hidden_state[0]
                if layer == -1
                else each(**tokens, output_hidden_states=True).hidden_states[layer][0]
                for each in (model, exact)
            )
        # Padding and the batch may cost rounding, as much as fp32 itself does, and no more.
        error, floor = (features - truth).abs().max(), (bare - truth).abs().max()
        assert error <= 2 * floor + 1e-6, (prompt, error, floor)
    assert torch.equal(got[0], got[3])


def test_the_batch_changes_features_by_rounding_at_most(encoders):
    spec = describe_encoder(str(encoders["t5"]), max_length=12)
    frozen = FrozenEncoder(spec)
    alone = frozen.encode(["a cat on a mat"])[0]
    words = ["one two three", "a blue dog", ""]
    beside = frozen.encode([*words, "a cat on a mat", "a very long caption"])[3]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-6)
    wide = FrozenEncoder(describe_encoder(str(encoders["t5"]), max_length=40))
    torch.testing.assert_close(wide.encode(["a cat on a mat"])[0], alone, rtol=0, atol=1e-6)


def test_a_text_without_any_token(tmp_path):
    save_gemma(tmp_path)
    save_tokenizer(tmp_path, end="")
    frozen = FrozenEncoder(describe_encoder(str(tmp_path), max_length=4),
                           EmbeddingCache(tmp_path / "cache"))  # fmt: skip
    for _ in range(2):  # encoded, and from the cache
        none, some = frozen.encode(["", "a cat"])
        assert (none.shape, some.shape) == ((0, DIM), (2, DIM))
        assert some.isfinite().all()


def test_dtype_of_computation_and_features(encoders):
    spec = describe_encoder(str(encoders["t5"]), max_length=12, dtype="bf16")
    frozen = FrozenEncoder(spec)
    (features,) = frozen.encode(["a cat"])
    assert features.dtype == torch.bfloat16
    assert next(frozen.load().parameters()).dtype == torch.bfloat16


def test_a_long_prompt_is_cut_and_said_once(encoders):
    frozen = FrozenEncoder(describe_encoder(str(encoders["t5"]), max_length=4))
    with pytest.warns(UserWarning, match="a prompt of 7 tokens is cut to text max_length=4"):
        (features,) = frozen.encode(["a cat on a red mat"])
    assert features.shape[0] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen.encode(["a dog on a red mat", "a red cat"])  # the second fills it exactly
    assert frozen.cut == 2


def test_a_tokenizer_beside_the_weights_as_in_a_pipeline(encoders, tmp_path):
    shutil.copytree(encoders["t5"], tmp_path / "text_encoder_2")
    (tmp_path / "tokenizer_2").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(tmp_path / "text_encoder_2" / name, tmp_path / "tokenizer_2" / name)
    spec = describe_encoder(str(tmp_path / "text_encoder_2"), max_length=12)
    expected = FrozenEncoder(describe_encoder(str(encoders["t5"]), max_length=12))
    got = FrozenEncoder(spec).encode(["a cat"])[0]
    assert torch.equal(got, expected.encode(["a cat"])[0])
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="has no tokenizer"):
        describe_encoder(str(tmp_path / "text_encoder_2"))


def test_the_identity_is_that_of_the_content(encoders, tmp_path):
    spec = describe_encoder(str(encoders["t5"]))
    copy = tmp_path / "copy"
    shutil.copytree(encoders["t5"], copy)
    assert describe_encoder(str(copy)).identity == spec.identity
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = describe_encoder(str(copy))
    assert changed.identity != spec.identity
    moved = FrozenEncoder(spec.__class__(**{**spec.__dict__, "encoder": str(copy)}))
    with pytest.raises(ValueError, match="it is not the one that the features are from"):
        moved.encode(["a cat"])


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ("/no/such/folder", {}, "no such folder. Give the folder of a model"),
        ("nothing", {}, "its name on the Hugging Face hub"),
        ("clip", {"max_length": 78}, "reads at most 77 tokens"),
        ("clip", {"layer": -4}, "has 3 layers: -1 to -3"),
        ("clip", {"layer": 1}, "has 3 layers"),
        ("clip", {"dtype": "fp8"}, "expected one of fp32, bf16, fp16"),
        ("clip", {"revision": "v1"}, "text revision 'v1' has no effect on the folder"),
    ],
)
def test_what_cannot_be_is_said(encoders, encoder, options, message):
    with pytest.raises(ValueError, match=message):
        describe_encoder(str(encoders.get(encoder, encoder)), **options)


def test_a_name_without_a_network_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download google/none-such --local-dir FOLDER"):
        describe_encoder("google/none-such")


def test_missing_weights_are_no_random_weights(encoders, tmp_path):
    shutil.copytree(encoders["t5"], tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    config["num_layers"] = 3
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    frozen = FrozenEncoder(describe_encoder(str(tmp_path / "t5"), max_length=8))
    with pytest.raises(ValueError, match=r"lack .* tensors: encoder.block.2"):
        frozen.encode(["a cat"])


# --- the cache


@pytest.fixture
def cached(encoders, tmp_path) -> FrozenEncoder:
    spec = describe_encoder(str(encoders["t5"]), max_length=12)
    return FrozenEncoder(spec, EmbeddingCache(tmp_path / "cache"))


def test_cached_features_are_the_same_bits_without_the_encoder(cached, encoders):
    first = cached.encode(PROMPTS)
    assert (cached.cache.hits, cached.cache.misses) == (0, 3)
    again = FrozenEncoder(cached.spec, EmbeddingCache(cached.cache.folder))
    again.load = lambda device="cpu": pytest.fail("the encoder was loaded")
    second = again.encode(PROMPTS)
    assert (again.cache.hits, again.cache.misses) == (3, 0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert len(list(cached.cache.folder.rglob("*.safetensors"))) == 3


def test_the_key_is_everything_that_features_depend_on(cached, encoders):
    cached.encode(["a cat"])
    for options in (
        {"max_length": 11}, {"layer": -2, "max_length": 12}, {"dtype": "bf16", "max_length": 12}
    ):  # fmt: skip
        spec = describe_encoder(str(encoders["t5"]), **options)
        assert cached.cache.load(spec, "a cat") is None
    assert (
        cached.cache.load(describe_encoder(str(encoders["clip"]), max_length=12), "a cat") is None
    )
    assert cached.cache.load(cached.spec, "a cat ") is None
    assert cached.cache.load(cached.spec, "a cat") is not None


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "swapped", "text"])
def test_a_damaged_file_is_found_and_made_again(cached, damage):
    (expected,) = cached.encode(["a cat"])
    path = cached.cache.path_of(cached.spec, "a cat")
    data = bytearray(path.read_bytes())
    if damage == "bit":
        start = data.index(expected.numpy().tobytes())  # of the features, not of the header
        data[start + 5] ^= 1
    elif damage == "swapped":
        cached.encode(["a dog"])
        data = bytearray(cached.cache.path_of(cached.spec, "a dog").read_bytes())
    else:
        data = {"cut": data[:-3], "empty": bytearray(), "text": bytearray(b"not a tensor")}[damage]
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged; its prompt is encoded again") as record:
        (again,) = cached.encode(["a cat"])
    assert len(record) == 1
    assert torch.equal(again, expected)
    assert cached.cache.damaged == 1
    assert torch.equal(cached.encode(["a cat"])[0], expected)  # mended
    assert cached.cache.damaged == 1


def test_several_writers_share_a_folder(encoders, tmp_path):
    spec = describe_encoder(str(encoders["t5"]), max_length=12)
    prompts = [f"{a} {b}" for a in ("red", "blue", "green") for b in ("one", "two", "three")]
    features = {prompt: torch.randn(3, DIM) for prompt in prompts}

    def write() -> None:
        cache = EmbeddingCache(tmp_path)
        for prompt in prompts:
            cache.save(spec, prompt, features[prompt])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = EmbeddingCache(tmp_path)
    for prompt in prompts:
        assert torch.equal(cache.load(spec, prompt), features[prompt])
    assert not list(tmp_path.rglob("*.tmp"))
