"""The counts as tables."""

from collections.abc import Iterator

from benchmarks.roofline.counts import STAGES, Stage, floor_of, kept_by_eager, kept_by_ours
from benchmarks.roofline.shapes import LAYERS, Gpu, Layer

KEPT_GOAL = 0.6  # of what good eager code keeps for backward
_HEAD = ("stage", "GFLOP", "MB", "FLOP/byte", "floor, us", "at peak, us", "bound by")


def rows(layer: Layer, gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """A row for each stage, then forward, backward and both."""
    for stage in STAGES:
        yield _row(stage.name, [stage], layer, gpu)
    forward = [stage for stage in STAGES if not stage.is_backward]
    backward = [stage for stage in STAGES if stage.is_backward]
    yield _row("**forward**", forward, layer, gpu)
    yield _row("**backward**", backward, layer, gpu)
    yield _row("**both**", [*forward, *backward], layer, gpu)


def _row(name: str, stages: list[Stage], layer: Layer, gpu: Gpu) -> tuple[str, ...]:
    flops = sum(stage.flops(layer) for stage in stages)
    moved = sum(stage.bytes(layer) for stage in stages)
    floor = floor_of(stages, layer, gpu)
    if len(stages) > 1:
        rate = flops / floor.seconds / 1e12
        bound = f"arithmetic {floor.arithmetic / floor.seconds:.0%}; {rate:.0f} TFLOPS at the floor"
    elif stages[0].inside:
        bound = f"part of {stages[0].inside}: alone"
    else:
        bound = "arithmetic" if floor.arithmetic else "memory"
    return (
        name,
        f"{flops / 1e9:.1f}",
        f"{moved / 1e6:.1f}",
        f"{flops / moved:.0f}",
        f"{floor.seconds * 1e6:.1f}",
        f"{floor.peak_seconds * 1e6:.1f}",
        bound,
    )


def markdown(gpu: Gpu) -> str:
    """The whole page."""
    lines = [
        "# Roofline of the layers",
        "",
        "**Counted from shapes, not measured**: `python -m benchmarks.roofline`. bf16 tokens and "
        "weights, 32-bit indices and router. FLOPs are those of matrix products; bytes count each "
        "tensor of a stage once. *floor*: the larger of arithmetic and traffic at the rates that "
        f"large products and copies reach on an {gpu.name} "
        f"({_rates(gpu.reachable_flops, gpu.reachable_bytes)}); *at peak*: at its data sheet's "
        f"({_rates(gpu.peak_flops, gpu.peak_bytes)}). Sums add the kernels as if none overlapped; "
        "the gather runs inside the first product, its own row is what it would need alone. "
        "Launches, sorting and exponentials are not counted.",
    ]
    for layer in LAYERS:
        lines += ["", f"## {layer.name}", "", _line(_HEAD), _line(("---",) * len(_HEAD))]
        lines += [_line(row) for row in rows(layer, gpu)]
    lines += ["", "## Kept between forward and backward", ""]
    lines += [
        "Ours: x, h, router logits, routing weights and plan. Good eager code: gathered rows, h, "
        "a, y, silu(gate) of SwiGLU, and the same of the router. "
        f"Wanted: at most {KEPT_GOAL} of it. *activation fused*: of eager code whose activation "
        "keeps nothing but h and a.",
        "",
        _line(("layer", "ours, MB", "eager, MB", "ratio", "activation fused")),
        _line(("---",) * 5),
    ]
    for layer in LAYERS:
        ours, eager = kept_by_ours(layer), kept_by_eager(layer)
        fused = kept_by_eager(layer, fused_activation=True)
        ratios = (f"{ours / eager:.2f}", f"{ours / fused:.2f}")
        lines.append(_line((layer.name, f"{ours / 1e6:.1f}", f"{eager / 1e6:.1f}", *ratios)))
    lines += ["", "## What is counted", ""]
    lines += [_line(("stage", "tensor", "why so much")), _line(("---",) * 3)]
    for stage in STAGES:
        for part in stage.traffic:
            lines.append(_line((stage.name, part.tensor, part.reason)))
    return "\n".join(lines) + "\n"


def _rates(flops: float, moved: float) -> str:
    return f"{flops / 1e12:.0f} TFLOPS, {moved / 1e12:.2f} TB/s"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def text(gpu: Gpu) -> Iterator[str]:
    """The same for a terminal: one block for each layer."""
    widths = (28, 9, 9, 10, 10, 12, 0)
    yield f"Counted, not measured; floors for {gpu.name}."
    for layer in LAYERS:
        yield f"\n{layer.name}"
        for cells in (_HEAD, *rows(layer, gpu)):
            padded = (cell.strip("*").ljust(w) for cell, w in zip(cells, widths, strict=True))
            yield " ".join(padded).rstrip()
        ours, eager = kept_by_ours(layer), kept_by_eager(layer)
        kept = f"{ours / 1e6:.1f} MB, eager {eager / 1e6:.1f} MB, ratio {ours / eager:.2f}"
        yield f"kept for backward: {kept}"
