"""The folder of a run: refused when it holds results already, files written whole."""

import json
from pathlib import Path
from typing import Any

from dit_models.atomic import write_text

RESULTS = Path(__file__).resolve().parent / "results"


def claim(folder: Path, force: bool) -> Path:
    """Make ``folder`` and return it when results may be written there.

    Raises:
        FileExistsError: when something is there and ``force`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give another --out, or --force.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, document: dict[str, Any], indent: int | None = 1) -> Path:
    """Write ``results.json``; without indent it is written faster."""
    path = folder / "results.json"
    write_text(path, text(document, indent))
    return path


def text(document: dict[str, Any], indent: int | None = 1) -> str:
    """A document as the file holds it."""
    return json.dumps(document, indent=indent) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A document that ``write`` wrote; the folder or the file may be named."""
    document = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    assert isinstance(document, dict)
    return document
