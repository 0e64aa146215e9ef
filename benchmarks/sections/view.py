"""What a section is made from: a document, one device's entries, pictures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from benchmarks import digest

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
OF_GPU = "-cuda"  # how the names of a GPU's pictures end


@dataclass(frozen=True)
class View:
    """One document as a section sees it.

    Attributes:
        document: the whole of it.
        device: whose entries are meant.
        pictures: links to its pictures by their names, see ``benchmarks.plots``.
    """

    document: dict[str, Any]
    device: str
    pictures: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """Entries that were measured on the device."""
        entries = self.document["entries"]
        return [result for result in entries if digest.device_of(result) == self.device]

    @cached_property
    def comparisons(self) -> list[digest.Comparison]:
        """Ours beside the alternatives in every entry and mode."""
        return list(digest.comparisons(self.results))

    def drawn(self, *kinds: str) -> Iterator[str]:
        """Images of these kinds and their further pages (``<kind>-2``), one a line."""
        for picture, link in self.pictures.items():
            name = picture.removesuffix(OF_GPU)
            of_device = (picture != name) == (self.device == "cuda")
            if of_device and any(name == kind or name.startswith(f"{kind}-") for kind in kinds):
                yield f"![{name.replace('_', ' ')}]({link})"
                yield ""


def devices(document: dict[str, Any]) -> list[str]:
    """Devices that a document has entries of."""
    found = {digest.device_of(result) for result in document["entries"]}
    return [device for device in DEVICES if device in found] or ["cpu"]


def folded(title: str, lines: list[str]) -> Iterator[str]:
    """Lines that a reader opens; nothing when there are none."""
    if lines:
        yield from ("<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", "")
