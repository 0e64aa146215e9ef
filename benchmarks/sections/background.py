"""Who took part, what was not measured, and how to repeat it."""

from collections.abc import Iterator
from typing import Any

from benchmarks.stages import STAGES
from benchmarks.words import listed, table

_WORDS = {"used": "took part", "importable": "installed, not in this run", "skipped": "left out"}


def providers(document: dict[str, Any]) -> Iterator[str]:
    """What each provider is; libraries with versions, reasons and install commands."""
    rows = list(_provider_rows(document["entries"]))
    yield from table(("stage", "provider", "what it is"), rows)
    if rows:
        yield ""
    libraries = document.get("libraries", [])
    if libraries:
        yield "Libraries of others:"
        yield ""
        cells = [
            (
                library["name"],
                library.get("version") or "",
                _WORDS.get(library["status"], library["status"]),
                library.get("reason") or "",
            )
            for library in libraries
        ]
        yield from table(("library", "version", "", "reason"), cells)
        yield ""
    yield from _install(libraries)
    yield from _left_out(document["entries"])


def _provider_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    used: dict[str, dict[str, None]] = {}
    for result in results:
        used.setdefault(result["stage"], {}).update(dict.fromkeys(result["providers"]))
    for stage, names in used.items():
        for name in names:
            yield stage, f"`{name}`", summary_of(stage, name)


def summary_of(stage: str, provider: str) -> str:
    """One line about a provider; older results may name one that is gone."""
    known = STAGES[stage].providers if stage in STAGES else {}
    return known[provider].summary if provider in known else "no longer part of the suite"


def _install(libraries: list[dict[str, Any]]) -> Iterator[str]:
    missing = [each for each in libraries if each["status"] == "skipped" and each.get("install")]
    if missing:
        yield "To install those that were left out, each beside the torch that is there:"
        yield ""
        yield "```"
        for library in missing:
            yield f"# {library['name']}"
            yield from library["install"]
        yield "```"
        yield ""


def _left_out(results: list[dict[str, Any]]) -> Iterator[str]:
    """Providers that were skipped or wrong in an entry, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for name, verdict in result["providers"].items():
            if verdict["status"] in ("wrong", "skipped"):
                key = (name, verdict["status"], verdict["reason"])
                reasons.setdefault(key, []).append(result["name"])
    rows = [
        (name, word, reason, entries[0] if len(entries) == 1 else f"{len(entries)} entries")
        for (name, word, reason), entries in reasons.items()
    ]
    if rows:
        yield "Left out of single entries:"
        yield ""
        yield from table(("provider", "", "reason", "where"), rows)
        yield ""


def checks(document: dict[str, Any]) -> Iterator[str]:
    """Tests that ran before a GPU was measured, and what compute-sanitizer said."""
    found = {**document.get("tests", {}), **document.get("sanitizer", {})}
    for name, check in found.items():
        word = "**failed**: " if check["failed"] else ""
        yield f"- {name}: {word}{check['words']}"
    if found:
        yield ""


def not_measured(document: dict[str, Any]) -> Iterator[str]:
    """What had no time, no memory, no library."""
    items = document.get("not_measured", [])
    yield from table(("", "reason"), [(item["name"], item["reason"]) for item in items])
    if items:
        yield ""


def reproduce(document: dict[str, Any]) -> Iterator[str]:
    """The command, at the commit."""
    environment = document["environment"]
    yield "```"
    if environment.get("commit"):
        yield f"git checkout {environment['commit']}"
    yield environment["command"]
    yield "```"
    yield ""
    settings = document["settings"]
    words = [f"{key} {_words(value)}" for key, value in settings.items() if _words(value)]
    if words:
        yield f"Settings: {listed(words)}."
        yield ""


def _words(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return ""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
