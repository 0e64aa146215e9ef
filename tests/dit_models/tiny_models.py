"""Tiny random text encoders and VAEs, saved as their libraries save real ones."""

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

COLOURS = ["red", "green", "blue", "yellow", "navy"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OTHERS = ["a", "left", "right", "of", "above", "below", "cat", "dog", "on", "mat", "very", "long"]
WORDS = [*COLOURS, *NUMBERS, *OTHERS, "caption"]
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
DIM = 16


def save_tokenizer(folder: Path, begin: str = "", end: str = "</s>", side: str = "right") -> None:
    """A word tokenizer that puts the tokens ``begin`` and ``end`` around a text."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = f"{begin} $A {end}".strip()
    marks = [(mark, vocabulary[mark]) for mark in (begin, end) if mark]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>", padding_side=side,
    ).save_pretrained(folder)  # fmt: skip


def save_t5(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=DIM, d_kv=8, d_ff=32, num_layers=2,
        num_heads=2, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_clip(folder: Path, whole: bool = False) -> Path:
    """The text half of a CLIP, or all of it."""
    torch.manual_seed(1)
    text = transformers.CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=DIM, intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77, pad_token_id=1,
        bos_token_id=3, eos_token_id=1,
    )  # fmt: skip
    if whole:
        vision = transformers.CLIPVisionConfig(
            hidden_size=DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        )  # fmt: skip
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
        )
        transformers.CLIPModel(config).save_pretrained(folder)
    else:
        transformers.CLIPTextModel(text).save_pretrained(folder)
    save_tokenizer(folder, begin="<s>")
    return folder


def save_gemma(folder: Path) -> Path:
    torch.manual_seed(2)
    config = transformers.GemmaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=DIM, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        pad_token_id=0, bos_token_id=3, eos_token_id=1,
    )  # fmt: skip
    transformers.GemmaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, begin="<s>", end="", side="left")
    return folder


def save_vae(folder: Path, seed: int = 0, shift_factor: float | None = 0.1) -> Path:
    """Four latent channels at half the size."""
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=16, scaling_factor=0.5, shift_factor=shift_factor,
    ).save_pretrained(folder)  # fmt: skip
    return folder
