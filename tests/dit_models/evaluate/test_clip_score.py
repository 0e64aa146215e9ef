"""CLIP score against cosines computed here, with a tiny random CLIP made on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_models.evaluate.adm import NpzImages
from dit_models.evaluate.clip_score import clip_score

from .cases import command

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red seven", "two", "a cat left of a dog and much more than the model can read"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("clip")
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {
        word: number for number, word in enumerate(["<unk>", "<pad>", "<s>", "</s>", *words])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(path)  # fmt: skip
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = {**shape, "vocab_size": len(vocabulary), "max_position_embeddings": 9,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(15)
    with torch.no_grad():
        for parameter in model.parameters():  # as they are, all cosines would be nearly the same
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    pixels[1] //= 4
    pixels[2] = 255 - pixels[2] // 4
    np.savez(tmp_path / "samples.npz", pixels)
    return tmp_path / "samples.npz"


def cosine(clip: Path, pixels: np.ndarray, caption: str) -> float:
    """One image and one caption, without padding, in fp64."""
    model = transformers.CLIPModel.from_pretrained(clip).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    resized = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    mean, std = (np.array(value) for value in (processor.image_mean, processor.image_std))
    image = torch.from_numpy((np.asarray(resized) / 255 - mean) / std).permute(2, 0, 1)[None]
    tokens = tokenizer([caption], truncation=True, max_length=9, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=image)
    return float((output.image_embeds * output.text_embeds).sum())


def test_score_is_100_times_the_mean_of_positive_cosines(clip, samples):
    pixels = next(NpzImages(samples).batches(3))
    expected = [cosine(clip, *pair) for pair in zip(pixels, CAPTIONS, strict=True)]
    assert min(expected) < 0 < max(expected)  # so that cutting at 0 shows
    mean = 100 * np.mean(np.maximum(expected, 0))
    for batch_size in (1, 2, 3):
        score = clip_score(NpzImages(samples), CAPTIONS, clip, batch_size=batch_size)
        assert score == pytest.approx(mean, rel=1e-4)


def test_the_command_writes_the_score(clip, samples, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    words = (samples, "--clip", clip, "--prompts", prompts, "--json", tmp_path / "f.json")
    assert command(*words) == 0
    (entry,) = json.loads((tmp_path / "f.json").read_text())["measurements"]
    score = clip_score(NpzImages(samples), CAPTIONS, clip)
    assert entry["figures"] == {"clip_score": pytest.approx(score, rel=1e-5)}
    assert len(entry["settings"]["clip_sha256"]) == 64
    assert command(samples, "--clip", clip) == 2
    assert "give --prompts FILE" in capsys.readouterr().err


def test_a_folder_without_clip_is_refused(clip, samples, tmp_path):
    with pytest.raises(ValueError, match="holds no CLIP model"):
        clip_score(NpzImages(samples), CAPTIONS, tmp_path)
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        clip_score(NpzImages(samples), CAPTIONS[:2], clip)
