"""The machine, and what has to be known before its figures are believed."""

from collections.abc import Iterator
from typing import Any

from benchmarks import digest
from benchmarks.words import cell, listed


def name_of(document: dict[str, Any]) -> str:
    """A machine in a heading."""
    environment = document["environment"]
    gpu = environment.get("device", {}).get("gpu")
    cores = environment.get("cores")
    model = environment.get("cpu", "an unknown processor")
    processor = f"{_number(cores, 'cores')} of {model}" if cores else str(model)
    return f"{gpu}; {processor}" if gpu else processor


def machine(document: dict[str, Any]) -> Iterator[str]:
    """Hardware, versions, commit, load; warnings first."""
    for warning in digest.warnings(document):
        yield f"**{warning}**"
        yield ""
    environment = document["environment"]
    yield "| | |"
    yield "|---|---|"
    for key, value in _facts(environment):
        yield f"| {key} | {cell(value)} |"
    yield ""


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    device = environment.get("device", {})
    if device:
        words = [f"{device['gpu']}, {device.get('memory_gib', '?')} GiB"]
        words += [f"driver {device['driver']}"] if device.get("driver") else []
        words += [f"CUDA {device['cuda']}"] if device.get("cuda") else []
        words += [f"Triton {device['triton']}"] if device.get("triton") else []
        yield "GPU", listed(words)
    words = [environment.get("cpu", "unknown")]
    words += [flag for flag, there in environment.get("isa", {}).items() if there]
    yield "processor", listed(words)
    counts = [(environment.get(name), name) for name in ("cores", "threads")]
    yield "used", listed(_number(count, name) for count, name in counts if count)
    names = ("torch", "blas", "numpy", "python", "moe_kernels")
    versions = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    yield "versions", listed(versions)
    for key, where in (("served_by", ""), ("served_by_cuda", ", on the GPU")):
        backends = {_backend(module) for module in environment.get(key, {}).values()}
        if backends:
            yield f"ours is served by{where}", f"backend {listed(sorted(backends))}"
    load = environment.get("load_average")
    if load:
        yield "load at the start", f"{load[0]:.1f} processes on average in the last minute"
    if environment.get("commit"):
        yield "commit", environment["commit"]
    yield "date", str(environment.get("date", "unknown"))


def _number(count: int, plural: str) -> str:
    return f"{count} {plural if count != 1 else plural.removesuffix('s')}"


def _backend(module: str) -> str:
    """``cpu`` of ``moe_kernels.backends.cpu.route``."""
    return module.removeprefix("moe_kernels.backends.").partition(".")[0]
