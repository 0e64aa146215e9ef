"""The suite in two parts: every test belongs to one of them, and a failure of either is one."""

import ast
from types import SimpleNamespace

import pytest

from . import __main__ as command
from . import conftest, parts
from .parts import ROOT

JOBS = "tests/benchmarks/test_gpu_check.py::test_jobs_run_side_by_side_and_are_stopped_in_time"


@pytest.mark.parametrize("entry", [*parts.ALONE, *parts.LONG])
def test_entries_exist(entry):
    file, _, name = entry.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in names


def test_what_is_timed_by_pytest_benchmark_runs_alone():
    timed = [
        f"{path.relative_to(ROOT).as_posix()}::{node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and "benchmark" in [argument.arg for argument in node.args.args]
    ]
    assert timed
    assert {parts.part_of(test) for test in timed} == {"alone"}


def test_a_test_has_one_part():
    assert JOBS in parts.ALONE
    assert parts.part_of(JOBS) == parts.part_of(f"{JOBS}[a::b]") == "alone"
    assert parts.part_of(f"{JOBS}_else") == "shared"
    assert parts.part_of("tests/benchmarks/test_regression.py::test_x[0]") == "alone"
    assert parts.part_of("tests/test_x.py::test_x") == "shared"


def test_files_without_tests_of_the_part_are_not_read():
    regression, check = "tests/benchmarks/test_regression.py", JOBS.partition("::")[0]
    assert [parts.may_hold(regression, part) for part in parts.PARTS] == [False, True]
    assert [parts.may_hold(check, part) for part in parts.PARTS] == [True, True]
    assert [parts.may_hold("tests/test_x.py", part) for part in parts.PARTS] == [True, False]


@pytest.mark.parametrize("part", [None, *parts.PARTS])
def test_tests_of_the_other_part_are_left_out_and_long_ones_come_first(part):
    tests = ["tests/test_a.py::test_a", JOBS, f"{parts.LONG[0]}::test_b", "tests/test_c.py::test_c"]
    items = [item(test) for test in tests]
    left_out: list[object] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(getoption=lambda name: part, hook=hook)
    everything = set(map(id, items))
    conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    assert {id(each) for each in (*items, *left_out)} == everything
    order = {None: tests, "shared": [tests[2], tests[0], tests[3]], "alone": [JOBS]}
    assert [each.test for each in items] == order[part]


def item(test: str) -> SimpleNamespace:
    file, _, name = test.partition("::")
    return SimpleNamespace(
        test=test, path=ROOT / file, name=name, get_closest_marker=lambda name: None
    )


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ([], False),
        (["-k", "router"], False),
        (["tests/test_parts.py"], True),
        (["-x", "tests/test_parts.py::test_entries_exist", "tests/test_readme.py"], True),
        (["tests/test_parts.py", "tests/benchmarks"], False),
        (["tests/no_such_file.py"], False),
    ],
)
def test_few_files_take_one_process(words, whole, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command.names_files_only(words) == whole


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0, 0), 0),
        ((1, 0), 1),
        ((0, 1), 1),
        ((1, 1), 1),
        ((5, 0), 0),
        ((0, 5), 0),
        ((5, 1), 1),
        ((1, 5), 1),
        ((5, 5), 5),
        ((0, 3), 3),
        ((2, None), 2),  # interrupted, or -x: the second part does not run
        ((4, None), 4),
    ],
)
def test_a_failure_of_one_part_is_a_failure(statuses, expected, monkeypatch):
    left = [status for status in statuses if status is not None]
    calls = []

    def run(words):
        calls.append(words)
        return left.pop(0)

    monkeypatch.setattr(command, "run", run)
    assert command.main(["-k", "router"]) == expected
    assert not left
    for part, words in zip(parts.PARTS, calls, strict=False):
        assert words[words.index("--part") + 1] == part
        assert words[-2:] == ["-k", "router"]
    assert "-n" in calls[0]
    assert "-n" not in calls[-1] or len(calls) == 1


def test_processes_are_at_most_the_cores(monkeypatch):
    monkeypatch.setattr(parts, "cores", lambda: 2)
    assert parts.workers() == 2
    monkeypatch.setattr(parts, "cores", lambda: 64)
    assert parts.workers() == parts.MOST_WORKERS
    assert [parts.share_of_cores(count) for count in (1, 2, 8, 100)] == [64, 32, 8, 1]
