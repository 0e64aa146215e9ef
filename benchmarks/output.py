"""The folder of a run: refused when it holds results already, files written whole."""

import json
from pathlib import Path
from typing import Any

from dit_models.atomic import write_text

# Of runs that nobody keeps, which git ignores; and stored ones, which the page shows.
RUNS = Path(__file__).resolve().parent / "runs"
RESULTS = RUNS.parent / "results"


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
    """A document that ``write`` wrote; the folder or the file may be named.

    Raises:
        OSError: when there is no such file.
        ValueError: when it holds something else.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} is not a result: expected an object, not {type(document)}")
    return document


def read_run(path: Path) -> dict[str, Any]:
    """The same of a run of the suite, which has entries.

    Raises:
        OSError: when there is no such file.
        ValueError: when it holds something else.
    """
    document = read(path)
    entries = document.get("entries")
    wanted = {"name", "providers", "modes"}
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and wanted <= entry.keys() for entry in entries
    ):
        raise ValueError(
            f'{path} has no list "entries" of measurements; expected the results.json of '
            "python -m benchmarks.run, or its folder"
        )
    return document
