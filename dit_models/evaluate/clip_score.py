"""CLIP score: how well images fit their captions, by a CLIP model on the user's disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_models.extras import require


@torch.inference_mode()
def clip_score(
    images: Any,
    captions: Sequence[str],
    path: Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda count: None,
) -> float:
    """Mean over the images of ``100·max(cos(image, caption), 0)``.

    Images are prepared by the model's own processor with Pillow (resize, cut, normalise); a caption
    longer than the model reads is cut.

    Args:
        images: a source of uint8 images with ``batches(batch_size)``.
        captions: one for each image.
        path: folder of a ``transformers`` CLIP model with its tokenizer and processor.
        device: where it runs.
        batch_size: images a call.
        progress: called with the number of finished images.

    Raises:
        ValueError: another number of captions, or no such model in the folder.

    Source: Hessel et al. (arXiv 2104.08718), with 100 in the place of their 2.5.
    """
    if len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} images")
    transformers = require("transformers", extra="eval")
    # Only transformers 5 has it under this name; the one of transformers 4 is the same.
    processor_class = getattr(
        transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor
    )
    if not path.is_dir():
        raise ValueError(f"--clip {path} is not a folder; expected one of a CLIP model.")
    try:
        model = transformers.CLIPModel.from_pretrained(path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        processor = processor_class.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--clip {path} holds no CLIP model with tokenizer and processor ({reason})."
        ) from error
    model = model.float().to(device).eval()
    max_length = model.config.text_config.max_position_embeddings
    total, start = torch.zeros((), dtype=torch.float64), 0
    for pixels in images.batches(batch_size):
        part = list(captions[start : start + len(pixels)])
        start += len(pixels)
        tokens = tokenizer(
            part, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        prepared = processor(images=list(pixels), return_tensors="pt")
        output = model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=prepared["pixel_values"].to(device),
        )
        cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        total += cosines.clamp(min=0).double().cpu().sum()
        progress(len(pixels))
    return float(100 * total / len(images))
