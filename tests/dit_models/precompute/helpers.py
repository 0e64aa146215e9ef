"""Small sources, and what the tests of precompute and of training on its folders share."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dit_models.precompute.settings import Settings

CAPTIONS = ("a red seven", "a cat on a mat", "", "one two three four", "a green dog")


def settings(source: str | Path, out: Path, **options: object) -> Settings:
    values = {"shard_size": 4, "batch_size": 3, "device": "cpu", "dtype": "fp32", **options}
    return Settings(str(source), out, **values)  # type: ignore[arg-type]


def picture(seed: int, size: int = 16) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8))


def captioned(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        text = CAPTIONS[number % len(CAPTIONS)]
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def classes(folder: Path, count: int = 10) -> Path:
    for number in range(count):
        place = folder / ("cats", "dogs")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
