"""First calls: the figures, the children, and reasons instead of exceptions."""

import builtins
import json
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import first_calls
from benchmarks.gpu import jobs

TINY = "first_call/dit_moe-D32-T64"


@pytest.fixture
def aot_eager(monkeypatch):
    """Traced and differentiated as always, but no C++ is generated."""
    torch.compiler.reset()
    monkeypatch.setattr(first_calls, "why_not_compiled", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("provider", ["ours", "good_eager"])
def test_figures_of_an_eager_layer(provider):
    ticks = count()
    found = first_calls.in_this_process(TINY, provider, now=lambda: float(next(ticks)))
    assert found["graph_breaks"] is None
    assert found["recompiles"] is None
    assert found["import_seconds"] == found["build_seconds"] == 1.0
    assert found["first_seconds"] == found["steady_seconds"] == 1.0
    assert found["new_size_seconds"] == [1.0, 1.0]


def test_ours_compiles_into_one_graph_and_once_more_for_other_sizes(aot_eager):
    found = first_calls.in_this_process(TINY, "ours_compiled")
    assert (found["graph_breaks"], found["recompiles"]) == (0, 1)
    assert found["first_seconds"] > found["steady_seconds"] > 0


def test_breaks_and_recompilations_are_counted(aot_eager, monkeypatch):
    def broken(shape):
        weight = torch.nn.Parameter(torch.randn(shape["D"], shape["D"]))

        def layer(x):
            y = x @ weight
            torch._dynamo.graph_break()
            return y.exp(), y.sum()

        return layer

    monkeypatch.setattr(first_calls, "_good_eager", broken)
    found = first_calls.in_this_process(TINY, "compiled")
    assert found["graph_breaks"] == 1
    assert found["recompiles"] >= 1


def test_a_child_prints_its_figures_and_another_without_time_gives_the_reason():
    rows = list(first_calls.measure([TINY], 300, providers=["good_eager"], threads=1))
    assert [(row["name"], row["provider"]) for row in rows] == [(TINY, "good_eager")]
    assert rows[0]["import_seconds"] > 0.1  # a fresh process: PyTorch was not there
    assert "reason" not in rows[0]
    late = list(first_calls.measure([TINY], 0.0))
    assert [row["provider"] for row in late] == ["ours", "good_eager", "ours_compiled", "compiled"]
    assert {row["reason"] for row in late} == {"no time"}


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (jobs.Outcome(1, "Traceback\n  File x\nKeyError: 'x'\n", 1.0), "KeyError: 'x'"),
        (jobs.Outcome(-9, "", 1.0), "ended with status -9"),
        (jobs.Outcome(None, "half a line", 9.0), "did not end within 9 s"),
        (jobs.Outcome(0, '{"reason": "no compiler"}\nlast words\n', 1.0), "no compiler"),
    ],
)
def test_a_child_that_fails_gives_a_reason(monkeypatch, outcome, reason):
    monkeypatch.setattr(jobs, "run_jobs", lambda jobs, **options: {jobs[0].name: outcome})
    (row,) = first_calls.measure([TINY], providers=["ours"], limit=9)
    assert row == {"name": TINY, "provider": "ours", "reason": reason}


def test_a_child_finds_nothing_compiled_and_leaves_nothing_behind(monkeypatch):
    seen = []

    def run_jobs(started, **options):
        for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
            folder = Path(started[0].environment[name])
            seen.append((folder, list(folder.iterdir())))
        return {}

    monkeypatch.setattr(jobs, "run_jobs", run_jobs)
    assert "did not end" in next(first_calls.measure([TINY], providers=["ours"]))["reason"]
    (temporary, inside), (cache, cached) = seen
    assert inside == cached == []
    assert not temporary.exists()
    assert not cache.exists()


def test_without_a_compiler_the_compiled_ones_say_so(monkeypatch):
    from torch._inductor import cpp_builder

    def no_compiler():
        raise RuntimeError("none")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    monkeypatch.setattr(first_calls, "_child", lambda *case: {"first_seconds": 1.0})
    eager, compiled = first_calls.measure([TINY], providers=["ours", "ours_compiled"])
    assert "reason" not in eager
    assert list(compiled) == ["name", "provider", "reason"]
    assert "torch.compile needs a C++ compiler" in compiled["reason"]


def test_the_code_generator_of_torch_compile_is_imported_on_the_clock(monkeypatch):
    class Enough(Exception):
        pass

    seen = []
    imported = builtins.__import__

    def noted(name, *rest):
        seen.append(name)
        return imported(name, *rest)

    def now():
        seen.append("now")
        if seen.count("now") == 2:
            raise Enough
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", noted)
        with pytest.raises(Enough):
            first_calls.in_this_process(TINY, "compiled", now)
    assert seen.index("now") < seen.index("torch._inductor.compile_fx") < len(seen) - 1


def test_the_command_prints_rows_and_says_with_its_status_that_one_is_missing(monkeypatch, capsys):
    def measure(names, seconds, **options):
        yield {"name": names[0], "provider": "ours", "first_seconds": 1.0}
        yield {"name": names[0], "provider": "compiled", "reason": "none"}

    monkeypatch.setattr(first_calls, "measure", measure)
    assert first_calls.main(["--names", TINY]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["provider"] for row in rows] == ["ours", "compiled"]
