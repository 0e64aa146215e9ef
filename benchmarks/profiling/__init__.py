"""Where the time of a layer goes: every provider under torch.profiler, by stages.

Times are those of calls that are being recorded, which makes each operator longer by a microsecond
or so: they show shares, and the suites show times.
"""

import gc
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.entry import Entry, Inputs, Provider, Run
from benchmarks.gpu.calls import call_of
from benchmarks.profiling import stepwise
from benchmarks.profiling.lookup import Sizes
from benchmarks.profiling.recorder import longest, record, spent_on_cpu, spent_on_gpu
from benchmarks.profiling.stages import in_order
from benchmarks.stages import STAGES
from dit_models.atomic import write_bytes

MODES = ("forward", "both")
LONGEST = 8


def profile_entry(
    entry: Entry,
    device: torch.device,
    providers: Sequence[str] | None = None,
    folder: Path | None = None,
    modes: Sequence[str] = MODES,
) -> list[dict[str, Any]]:
    """Time by stage of every provider of an entry, and of ours stage by stage.

    Args:
        entry: any; its providers should have been checked before.
        device: CPU or CUDA.
        providers: some of the entry's; by default all but those that need ``torch.compile``, in
            whose code there are no operators to see. What cannot be built or run here is left out.
        folder: where a chrome trace of each profile goes; ``None`` writes none.
        modes: ``"forward"``, ``"backward"`` or ``"both"``.

    Returns:
        Rows: ``entry``, ``provider``, ``mode``, ``device``, ``seconds`` of a call, ``stages`` with
        the seconds of each, ``longest`` operators or kernels, file name of the ``trace``.
    """
    stage = STAGES[entry.stage]
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype, device)
    if providers is None:
        providers = [name for name in entry.providers if not stage.providers[name].compiled]
    rows: list[dict[str, Any]] = []
    for name in providers:
        provider = stage.providers[name]
        only_forward = provider.forward_only or entry.modes == ("forward",)
        try:
            for shown, run in _runs(entry.stage, name, provider, inputs):
                for mode in modes:
                    if mode == "forward" or not only_forward:
                        rows.append(_profiled(entry, inputs, shown, run, mode, device, folder))
        except Exception:
            if provider.kind == "ours":
                raise
            # The suite's own row of this provider has the reason.
    return rows


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Stages with time and share, then the longest operators or kernels, row by row."""
    lines = []
    for row in rows:
        lines.append(f"{row['entry']}, {row['mode']}, {row['provider']}: {_ms(row['seconds'])}")
        for stage in sorted(row["stages"], key=in_order().index):
            spent = row["stages"][stage]
            lines.append(f"  {stage:28} {_ms(spent)}  {spent / row['seconds']:4.0%}")
        for item in row["longest"]:
            words = f"{item['number']} x {item['name']}"
            lines.append(f"    {_ms(item['seconds'])}  {words}  [{item['stage']}]")
        if row["trace"]:
            lines.append(f"    trace: {row['trace']}")
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms"


def _runs(stage: str, name: str, provider: Provider, inputs: Inputs) -> Iterator[tuple[str, Run]]:
    """The provider, and behind ours the same stage by stage."""
    yield name, provider.build(inputs)
    by_stage = stepwise.build(stage, inputs) if name == "ours" else None
    if by_stage is not None:
        yield stepwise.NAME, by_stage


def _profiled(
    entry: Entry,
    inputs: Inputs,
    provider: str,
    run: Run,
    mode: str,
    device: torch.device,
    folder: Path | None,
) -> dict[str, Any]:
    call = call_of(run, inputs, mode)
    gc.collect()
    profile = record(call, device)
    sizes = _sizes(entry)
    spent_on = spent_on_gpu if device.type == "cuda" else spent_on_cpu
    spent = spent_on(profile.events(), sizes)
    trace = None
    if folder is not None:
        trace = write_trace(profile, folder, f"{entry.name}-{provider}-{mode}")
    return {
        "entry": entry.name,
        "provider": provider,
        "mode": mode,
        "device": device.type,
        "seconds": spent.seconds,
        "stages": {name: spent.stages[name] for name in in_order() if spent.stages.get(name)},
        "longest": longest(spent, LONGEST),
        "trace": trace,
    }


def _sizes(entry: Entry) -> Sizes:
    shape = entry.shape
    return Sizes(shape.get("E", 0), shape["T"] if "T" in shape else shape["B"] * shape["S"])


def write_trace(profile: Any, folder: Path, words: str) -> str:
    """Write ``trace-<words>.json.gz`` in one step, for Perfetto or chrome://tracing; its name."""
    name = f"trace-{re.sub('[^A-Za-z0-9_.]+', '-', words).strip('-')}.json.gz"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        profile.export_chrome_trace(str(path))
        write_bytes(folder / name, path.read_bytes())
    return name
