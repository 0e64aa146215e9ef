"""A small result document with something for every section of a report."""

from typing import Any


def summaries(**medians: float) -> dict[str, Any]:
    """Medians whose quartiles are a tenth away."""
    return {
        name: {"median": value, "low": 0.9 * value, "high": 1.1 * value}
        for name, value in medians.items()
    }


def verdict(kind: str = "plain", status: str = "ok", reason: str = "") -> dict[str, Any]:
    errors = {"out": 1e-7} if status == "ok" else {}
    return {"kind": kind, "status": status, "errors": errors, "reason": reason}


def timed(mode_times: dict[str, dict[str, float]], limit: float = 0.0) -> dict[str, Any]:
    """Modes from times of every provider; ratios follow from them."""
    return {
        mode: {
            "rounds": 5,
            "limit": limit,
            "cost": {"flops": 2e9, "bytes": 1e6},
            "times": summaries(**times),
            "ratios": summaries(
                **{name: time / times["ours"] for name, time in times.items() if name != "ours"}
            ),
        }
        for mode, times in mode_times.items()
    }


def result(name: str, stage: str, times: dict[str, dict[str, float]], **more: Any) -> Any:
    """An entry with every provider that its times name."""
    kinds = {"ours": "ours", "dense_limit": "limit", "ours:cuda": "backend"}
    names = dict.fromkeys(provider for of_mode in times.values() for provider in of_mode)
    return {
        "name": name,
        "stage": stage,
        "shape": {},
        "dtype": "float32",
        "device": "cpu",
        "axis": None,
        "providers": {name: verdict(kinds.get(name, "plain")) for name in names},
        "modes": timed(times, more.pop("limit", 0.0)),
        "memory": {},
        "calls": {},
        "goals": [],
        "slower": [],
    } | more


def layer() -> Any:
    """A layer: two modes, memory, goals, counts, a library that could not run."""
    entry = result(
        "dit_moe_layer/D384-T2048",
        "dit_moe_layer",
        {
            "forward": {"published": 2e-3, "good_eager": 9e-4, "dense_limit": 1e-4, "ours": 1e-3},
            "both": {"published": 6e-3, "good_eager": 4.5e-3, "dense_limit": 3e-3, "ours": 3e-3},
        },
        limit=5e-4,
        memory={
            "published": {"peak_bytes": 5 << 20, "saved_bytes": 8 << 20, "gradient_bytes": 1 << 20},
            "ours": {"peak_bytes": 10 << 20, "saved_bytes": 4 << 20, "gradient_bytes": 1 << 20},
            "good_eager": {"reason": "killed"},
            "dense_limit": {"peak_bytes": 1 << 20, "saved_bytes": 1, "gradient_bytes": 1},
        },
        goals=[
            {"mode": "forward", "against": "published", "wanted": ">= 1.5x"}
            | {"ratio": 2.0, "met": True},
            {"mode": "memory", "against": "published", "wanted": "<= 0.5 of it"}
            | {"ratio": 0.5, "met": False},
        ],
        calls={
            "published": {"mode": "both", "ops": 90, "device_reads": 8},
            "ours": {"mode": "both", "ops": 12, "device_reads": 0},
        },
        slower=[{"mode": "forward", "provider": "good_eager", "ratio": 0.9}],
    )
    entry["providers"]["megablocks_grouped"] = verdict(status="skipped", reason="needs a CUDA GPU")
    return entry


def point(tokens: int) -> Any:
    """A point of a series: ours grows with the tokens, the other with their square."""
    other, ours = 1e-9 * tokens**2, 1e-6 * tokens
    return result(
        f"scaling_ec_layer_tokens/S{tokens}",
        "ec_layer",
        {"both": {"one_hot": other, "ours": ours}},
        axis={"name": "tokens", "value": float(tokens)},
    )


def skewed(skew: str, ours: float, load: float) -> Any:
    return result(
        f"dit_moe_skew/{skew}-T512",
        "dit_moe_layer",
        {"both": {"published": 4e-3, "ours": ours}},
        shape={"T": 512, "skew": skew},
        load=load,
    )


def environment() -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m benchmarks.run --only layer",
        "cpu": "A | Processor",
        "cores": 4,
        "isa": {"avx2": True, "amx_bf16": False},
        "load_average": [0.5, 1.0, 1.0],
        "threads": 2,
        "torch": "2.13.0",
        "served_by": {"combine": "moe_kernels.backends.cpu.rows"},
        "commit": "0123abc",
        "dirty": False,
    }


def document(*entries: Any, **more: Any) -> dict[str, Any]:
    """A whole document; without entries, with one of each kind."""
    found = entries or (
        layer(),
        *(point(tokens) for tokens in (512, 1024, 256)),
        skewed("uniform", 1e-3, 1.0),
        skewed("collapsed", 1.5e-3, 4.0),
    )
    return {
        "schema": 2,
        "environment": environment(),
        "settings": {"suite": "default", "busy": 0, "modes": ["forward", "both"]},
        "complete": True,
        "seconds": 12.0,
        "libraries": [
            {"name": "Liger", "version": "0.8", "status": "used"}
            | {"reason": "", "install": ["pip install liger"]},
            {
                "name": "megablocks",
                "version": None,
                "status": "skipped",
                "reason": "No module named 'megablocks'",
                "install": ["pip install --no-deps megablocks"],
            },
        ],
        "rates": {"product": {"float32": 1.5e11}, "copy": 1.2e10},
        "entries": list(found),
        "compile": [
            {
                "name": "ec_layer",
                "provider": "ours_compiled",
                "import_seconds": 2.0,
                "build_seconds": 0.5,
                "new_size_seconds": [3.0, 2e-3],
                "first_seconds": 8.0,
                "steady_seconds": 1e-3,
                "graph_breaks": 0,
                "recompiles": 1,
            },
            {"name": "ec_layer", "provider": "compiled", "reason": "no C++ compiler"},
        ],
        "models": [
            {
                "name": "EC-DiT-S/2-8E",
                "batch_size": 8,
                "seconds": {"ours": 0.4, "dense twin": 0.38},
                "images_per_second": {"ours": 20.0, "dense twin": 21.05},
                "ratio": 0.95,
                "quartiles": [0.94, 0.97],
                "against": "dense twin",
            }
        ],
        "stages": [
            {
                "entry": "ec_layer/D384-T2048",
                "provider": "ours",
                "mode": "both",
                "seconds": 0.2,
                "stages": {"experts": 0.15, "router": 0.048, "losses": 0.002},
                "trace": None,
            }
        ],
        "not_measured": [{"name": "model_layer/DiT-MoE-G", "reason": "needs 40 GiB of memory"}],
    } | more
