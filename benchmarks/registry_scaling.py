"""Entries in which one size grows, as data: the cost against tokens, experts, capacity and width.

A series is made of the entries with one first word; ``scaling.py`` fits its exponent. Everything
but the size on the axis stays the same along a series: with the experts only their number grows,
a token passes as many of them, and the activated arithmetic stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.entry import Axis, Entry, Shape

MODES = ("forward", "both")
ROUTE_MODES = ("forward", "backward")
_TINY_LAYER = {"B": 2, "S": 24, "D": 16, "E": 8}
# How a point's name begins; else the size's own letter.
_LETTERS = {"capacity_factor": "f"}


@dataclass(frozen=True)
class Series:
    """Entries of one stage whose shapes differ in one size.

    Attributes:
        stage: key of ``benchmarks.stages.STAGES``.
        axis: see ``Axis``.
        key: the size's name in the shape.
        values: its values; at least three of them have an exponent.
        base: the rest of the shape.
        tiny: for the smoke suite.
        providers: that are timed; empty where only memory is measured.
        memory: whose peak memory is measured.
        modes, dtype: of the entries.
        prefix: first part of the name.
    """

    stage: str
    axis: str
    key: str
    values: tuple[int, ...]
    base: Shape
    tiny: Shape
    providers: tuple[str, ...]
    memory: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    dtype: str = "float32"
    prefix: str = "scaling"

    def entries(self) -> Iterator[Entry]:
        """The points, from the smallest."""
        for value in self.values:
            letter = _LETTERS.get(self.key, self.key)
            yield Entry(
                f"{self.prefix}_{self.stage}_{self.axis}/{letter}{value}",
                self.stage,
                {**self.base, self.key: value},
                {**self.tiny, self.key: self.tiny.get(self.key, 2)},
                self.modes,
                self.providers,
                dtype=self.dtype,
                memory=self.memory,
                axis=Axis(self.axis, float(value)),
            )


def _ec(axis: str, key: str, values: tuple[int, ...], tokens: int = 1024) -> Series:
    base = {"B": tokens // 256, "S": 256, "D": 256, "E": 8}
    providers = ("one_hot", "good_eager", "dense_limit", "ours")
    return Series("ec_layer", axis, key, values, base, _TINY_LAYER, providers)


def _dit_moe(axis: str, key: str, values: tuple[int, ...], tokens: int = 512) -> Series:
    # Token choice does not see where an image ends.
    base = {"B": 1, "S": tokens, "D": 256, "E": 8}
    providers = ("published", "good_eager", "dense_limit", "ours")
    return Series("dit_moe_layer", axis, key, values, base, _TINY_LAYER, providers)


def _router(stage: str, axis: str, key: str, values: tuple[int, ...]) -> Series:
    base, tiny = {
        "token_choice": ({"T": 2048, "E": 8, "K": 2}, {"T": 33, "E": 8, "K": 2}),
        "expert_choice": ({"B": 8, "S": 256, "E": 8}, {"B": 2, "S": 37, "E": 8}),
    }[stage]
    providers = ("eager", "tuned", "ours")
    return Series(stage, axis, key, values, base, tiny, providers, modes=ROUTE_MODES)


def _memory(stage: str, plain: tuple[str, ...]) -> Series:
    providers = (*plain, "ours")
    base = {"B": 1, "D": 256, "E": 8}
    return Series(
        *(stage, "tokens", "S", (512, 1024, 2048, 4096), base, _TINY_LAYER, providers),
        memory=providers,
        modes=(),
        prefix="scaling_memory",
    )


# At 2 cores and 0.6 s for an entry and mode about four minutes, memory left out.
SERIES: tuple[Series, ...] = (
    _ec("images", "B", (1, 2, 4, 8, 16)),
    _dit_moe("tokens", "S", (128, 256, 512, 1024, 2048, 4096)),
    _ec("experts", "E", (4, 8, 16, 32, 64)),
    _dit_moe("experts", "E", (4, 8, 16, 32, 64)),
    _ec("capacity", "capacity_factor", (1, 2, 3, 4)),
    _dit_moe("capacity", "K", (1, 2, 3, 4)),
    _ec("width", "D", (64, 128, 256, 512, 768), tokens=512),
    _dit_moe("width", "D", (64, 128, 256, 512, 768), tokens=256),
    # Longer images: here products with one-hot matrices cost their square.
    _ec("tokens", "S", (256, 512, 1024, 2048, 4096), tokens=256),
    _router("token_choice", "tokens", "T", (512, 2048, 8192, 32768)),
    _router("token_choice", "experts", "E", (8, 16, 32, 64)),
    _router("expert_choice", "tokens", "S", (64, 256, 1024, 4096)),
    _router("expert_choice", "experts", "E", (8, 16, 32, 64)),
    _memory("ec_layer", ("one_hot", "good_eager")),
    _memory("dit_moe_layer", ("published", "good_eager")),
)

SCALING_ENTRIES: tuple[Entry, ...] = tuple(entry for series in SERIES for entry in series.entries())


def _gpu_ec(axis: str, key: str, values: tuple[int, ...]) -> Series:
    base = {"B": 32, "S": 256, "D": 1152, "E": 8}
    providers = ("one_hot", "good_eager", "dense_limit", "ours")
    return _on_gpu("ec_layer", axis, key, values, base, providers)


def _gpu_dit_moe(axis: str, key: str, values: tuple[int, ...]) -> Series:
    base = {"B": 1, "S": 8192, "D": 1152, "E": 8}
    providers = ("good_eager", "grouped_permute", "dense_limit", "ours")
    return _on_gpu("dit_moe_layer", axis, key, values, base, providers)


def _on_gpu(
    stage: str,
    axis: str,
    key: str,
    values: tuple[int, ...],
    base: Shape,
    providers: tuple[str, ...],
) -> Series:
    """Time and, as it costs nothing there, memory; in bf16."""
    return Series(
        *(stage, axis, key, values, base, _TINY_LAYER, providers),
        memory=providers,
        dtype="bfloat16",
        prefix="gpu_scaling",
    )


GPU_SERIES: tuple[Series, ...] = (
    _gpu_ec("images", "B", (4, 16, 64, 256)),
    _gpu_dit_moe("tokens", "S", (1024, 4096, 16384, 65536)),
    _gpu_ec("experts", "E", (8, 16, 32, 64)),
    _gpu_dit_moe("experts", "E", (8, 16, 32, 64)),
    _gpu_ec("capacity", "capacity_factor", (1, 2, 3, 4)),
    _gpu_dit_moe("capacity", "K", (1, 2, 3, 4)),
    _gpu_ec("width", "D", (384, 768, 1536, 3072)),
    _gpu_dit_moe("width", "D", (384, 768, 1536, 3072)),
)

GPU_SCALING_ENTRIES: tuple[Entry, ...] = tuple(
    entry for series in GPU_SERIES for entry in series.entries()
)
