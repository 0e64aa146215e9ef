"""Images in the folders that GenEval's evaluator reads."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from dit_models.atomic import fsync_path
from dit_models.evaluate.folder import UNFINISHED
from dit_models.extras import require


def read_metadata(path: Path) -> tuple[list[str], list[str]]:
    """The lines of GenEval's ``evaluation_metadata.jsonl`` and the prompts in them.

    Raises:
        ValueError: names a line that is not a JSON object with a string ``prompt``.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--geneval {path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'line {number} of {path}: {error!r}; expected a JSON object with a "prompt".'
            ) from error
        if not isinstance(prompt, str):
            raise ValueError(
                f"line {number} of {path}: the prompt is {prompt!r}; expected a string."
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no line; expected a JSON object a line.")
    return lines, prompts


class PromptFolders:
    """One folder a prompt: ``00000/metadata.jsonl``, ``samples/0000.png`` ... and ``grid.png``.

    Image i belongs to prompt ``i // images_per_prompt``. A folder appears whole or not at all.

    Args:
        out: where the folders go.
        lines: the metadata line of each prompt, written as it is.
        images_per_prompt: 4 in GenEval.
        prompts_at_a_time: prompts whose images are drawn together.

    Source: the layout in the README of GenEval (arXiv 2310.11513).
    """

    def __init__(
        self, out: Path, lines: list[str], images_per_prompt: int, prompts_at_a_time: int
    ) -> None:
        self.out = out
        self.lines = lines
        self.images_per_prompt = images_per_prompt
        count, step = len(lines) * images_per_prompt, images_per_prompt * prompts_at_a_time
        self.pieces = [range(start, min(start + step, count)) for start in range(0, count, step)]

    def has(self, piece: range) -> bool:
        """Whether the folders of all prompts of the piece are there."""
        return all(self._folder(prompt).exists() for prompt in self._prompts(piece))

    def write(self, piece: range, pixels: np.ndarray) -> None:
        """Write the folders that are not there yet."""
        for number, prompt in enumerate(self._prompts(piece)):
            if not self._folder(prompt).exists():
                start = number * self.images_per_prompt
                self._write_folder(prompt, pixels[start : start + self.images_per_prompt])

    def _prompts(self, piece: range) -> range:
        return range(piece.start // self.images_per_prompt, piece.stop // self.images_per_prompt)

    def _folder(self, prompt: int) -> Path:
        return self.out / f"{prompt:05d}"

    def _write_folder(self, prompt: int, pixels: np.ndarray) -> None:
        temporary = self.out / f"{UNFINISHED}{prompt:05d}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "samples").mkdir(parents=True)
        try:
            (temporary / "metadata.jsonl").write_text(self.lines[prompt] + "\n", encoding="utf-8")
            for number, image in enumerate(pixels):
                (temporary / "samples" / f"{number:04d}.png").write_bytes(png_bytes(image))
            (temporary / "grid.png").write_bytes(png_bytes(_grid(pixels)))
            for path in (*temporary.rglob("*"), temporary):
                fsync_path(path)
            os.rename(temporary, self._folder(prompt))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(self.out)


def png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    stream = io.BytesIO()
    require("PIL.Image", extra="train").fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _grid(pixels: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) as one picture, as square as it gets, row by row; empty places are black."""
    count, height, width, channels = pixels.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    full = np.zeros((rows * columns, height, width, channels), np.uint8)
    full[:count] = pixels
    tiles = full.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * height, columns * width, channels)
