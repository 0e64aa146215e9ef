"""A small GenEval for ``digit-scenes``: do scenes show what was asked, category by category?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.data import Scene, build_dataset, parse_caption
from dit_models.drawing import Artist, Prompts, captions_of
from dit_models.evaluate.draw import draw_all
from dit_models.quality.reader import SCENE_IMAGE_SIZE, ReaderSettings, read_scenes, scene_reader
from dit_models.quality.scenes import SceneVerdict, judge, real_scenes
from dit_models.quality.trained import check_images, in_chunks

# GenEval's name -> (objects in the caption, what must be right). "counting" is left out: GenEval
# asks for a number of equal objects there, and no caption of digit-scenes does.
_CATEGORIES: dict[str, tuple[int, Callable[[SceneVerdict], bool | None]]] = {
    "single_object": (1, lambda verdict: verdict.digit),
    "two_object": (2, lambda verdict: verdict.digit),
    "colors": (1, lambda verdict: verdict.color),
    "position": (2, lambda verdict: verdict.position),
    "color_attr": (2, lambda verdict: verdict.color),
}


def scene_geneval(
    artist: Artist,
    num_samples: int = 500,
    *,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    first_seed: int = 1_000_000,
    cache_dir: str | Path | None = None,
    settings: ReaderSettings | None = None,
) -> dict[str, Any]:
    """Draw scenes of held-out captions and judge them by GenEval's categories.

    Args:
        artist: a model of ``digit-scenes``.
        num_samples: scenes, one for each of the first held-out captions.
        guidance_scale: instead of the configured one.
        batch_size: scenes drawn at a time.
        first_seed: scene i has seed ``first_seed + i``.
        cache_dir: folder that keeps the trained reader; None is the package's cache folder.
        settings: of the reader's training; None is its default.

    Returns:
        What ``scene_categories`` returns, with ``guidance_scale`` and ``first_seed``.

    Raises:
        ValueError: the model draws no captioned scenes of 32 pixels, or fewer than 2 are asked.
    """
    if artist.model.backbone.config.num_classes or artist.image_shape[-1] != SCENE_IMAGE_SIZE:
        raise ValueError(
            f"images are {artist.image_shape} of {artist.model.backbone.config.num_classes} "
            f"classes; expected a model of captioned scenes of {SCENE_IMAGE_SIZE} pixels"
        )
    if num_samples < 2 or batch_size < 1:
        raise ValueError(
            f"num_samples={num_samples}, batch_size={batch_size}; expected at least 2 and 1"
        )
    captions = captions_of(build_dataset("digit-scenes", split="heldout"), num_samples)
    images = draw_all(
        artist, Prompts(None, captions), first_seed, batch_size, guidance_scale=guidance_scale
    )
    scale = artist.sampling.guidance_scale if guidance_scale is None else guidance_scale
    figures = scene_categories(images, captions, cache_dir or mk.cache_folder(), settings=settings)
    return {**figures, "guidance_scale": scale, "first_seed": first_seed}


@torch.no_grad()
def scene_categories(
    images: Tensor,
    captions: Sequence[str],
    cache_dir: str | Path | None = None,
    seed: int = 0,
    settings: ReaderSettings | None = None,
) -> dict[str, Any]:
    """Shares of scenes that are right, by GenEval's categories.

    The names are those of GenEval (arXiv 2310.11513) where they mean the same: ``single_object``
    (the asked object is there), ``two_object`` (both are), ``colors`` (the one object is there in
    its colour), ``color_attr`` (both are, each in its colour), ``position`` (both are, on the asked
    sides). A small network reads the scenes here, a detector of COCO objects there: no figure of
    the two compares. Here every image counts in each category that its caption asks something of.

    Args:
        images: (n, 3, 32, 32) float in [-1, 1], on any device.
        captions: n captions that ``parse_caption`` understands.
        cache_dir: folder that keeps the trained reader; None trains it anew (minutes).
        seed: of the reader.
        settings: of the reader's training; None is its default.

    Returns:
        ``categories``: for each ``score`` (share right), ``count`` (scenes asked) and ``real`` (the
        score of as many real scenes in unseen hands, what perfect scenes would get); ``score`` and
        ``real`` are None where no caption asked. ``overall`` and ``overall_real``: the mean over
        the categories, as in GenEval. ``everything_right``: share of scenes with objects, colours,
        places and number right. ``num_samples``.

    Raises:
        ValueError: wrong shapes, a caption of another form, fewer than 2 images, NaN or infinity.
    """
    images = check_images(images, (3, SCENE_IMAGE_SIZE, SCENE_IMAGE_SIZE))
    if len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} images")
    asked = [parse_caption(caption) for caption in captions]
    reader, _ = scene_reader(cache_dir, seed, settings)

    def verdicts_of(shown: Tensor) -> list[SceneVerdict]:
        scenes = read_scenes(reader.heads(in_chunks(reader.features, shown)))
        return [judge(*pair) for pair in zip(asked, scenes, strict=True)]

    drawn = verdicts_of(images)
    real = verdicts_of(real_scenes("heldout", asked, len(images)))
    categories = {name: _category(name, asked, drawn, real) for name in _CATEGORIES}
    scored = [figures for figures in categories.values() if figures["count"]]
    return {
        "categories": categories,
        "overall": _mean([figures["score"] for figures in scored]),
        "overall_real": _mean([figures["real"] for figures in scored]),
        "everything_right": _mean([verdict.overall for verdict in drawn]),
        "num_samples": len(images),
    }


def scene_geneval_table(figures: dict[str, Any]) -> str:
    """The figures of ``scene_categories`` as a table."""
    lines = [f"  {'category':<16}{'right':>8}{'real':>8}{'scenes':>8}"]
    for name, category in figures["categories"].items():
        if category["count"]:
            score, real = category["score"], category["real"]
            lines.append(f"  {name:<16}{score:>8.3f}{real:>8.3f}{category['count']:>8}")
    lines.append(
        f"  {'overall':<16}{figures['overall']:>8.3f}{figures['overall_real']:>8.3f}"
        f"{figures['num_samples']:>8}"
    )
    return "\n".join(lines)


def _category(
    name: str, asked: list[Scene], drawn: list[SceneVerdict], real: list[SceneVerdict]
) -> dict[str, Any]:
    objects, is_right = _CATEGORIES[name]
    chosen = [i for i, scene in enumerate(asked) if len(scene.objects) == objects]
    if not chosen:
        return {"score": None, "real": None, "count": 0}
    return {
        "score": _mean([bool(is_right(drawn[i])) for i in chosen]),
        "real": _mean([bool(is_right(real[i])) for i in chosen]),
        "count": len(chosen),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
