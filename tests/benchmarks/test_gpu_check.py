"""``gpu-check`` without a GPU: refusals, side-by-side jobs, workers that break, the rehearsal."""

import json
import os
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.environment import ROOT
from benchmarks.gpu import first_call, first_steps, supervise
from benchmarks.gpu.jobs import Job, Outcome, run_jobs

# A worker that does what the names say; written here, so that a test needs no device to break.
WORKER = """
import json, os, sys, time
names, out = [], sys.argv[sys.argv.index("--out") + 1]
for word in sys.argv[1:]:
    if word.startswith("--"):
        break
    names.append(word)
def write(**line):
    with open(out, "a") as stream:
        stream.write(json.dumps(line) + "\\n")
write(rates={"copy_tb_s": 3.0})
for name in names:
    write(started=name)
    if name == "breaks":
        print("an illegal memory access")
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "fails":
        write(failed=name, reason="ValueError: no")
    else:
        write(result={"name": name})
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return sys.executable, str(path)


def test_it_refuses_without_a_gpu_and_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in (gpu_check.why_not() or "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("MOE_KERNELS_SIMULATED_GPU", "1")
    assert "simulated GPU" in (gpu_check.why_not() or "")
    monkeypatch.delenv("MOE_KERNELS_SIMULATED_GPU")
    assert gpu_check.why_not() is None


def test_a_bad_selection_is_explained(capsys):
    assert gpu_check.main(["--rehearse", "--only", "no-such-entry"]) == 2
    assert "no entry" in capsys.readouterr().err


def test_jobs_run_side_by_side_and_are_stopped_in_time():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    jobs = [
        Job("good", [sys.executable, "-c", "print('first'); print('last'); print()"]),
        Job("bad", [sys.executable, "-c", "import sys; sys.exit('no')"]),
        Job("named", [sys.executable, "-c", "import os; print(os.environ['X'])"], {"X": "y"}),
        Job("long", sleep),
        Job("late", sleep),
    ]
    began = time.monotonic()
    outcomes = run_jobs(jobs, at_once=3, seconds=3)
    assert time.monotonic() - began < 20
    assert (outcomes["good"].status, outcomes["good"].last_line) == (0, "last")
    assert (outcomes["bad"].status, outcomes["bad"].last_line) == (1, "no")
    assert outcomes["named"].last_line == "y"
    assert outcomes["long"].status is None


def test_a_job_has_a_limit_of_its_own():
    sleep = "import time; time.sleep(60)"
    jobs = [
        Job("limited", [sys.executable, "-c", sleep], seconds=1),
        Job("in time", [sys.executable, "-c", "print('done')"], seconds=30),
    ]
    began = time.monotonic()
    outcomes = run_jobs(jobs, at_once=2, seconds=50)
    assert time.monotonic() - began < 20
    assert outcomes["limited"].status is None
    assert outcomes["limited"].seconds >= 1
    assert (outcomes["in time"].status, outcomes["in time"].last_line) == (0, "done")


def test_a_job_is_stopped_with_what_it_started(tmp_path):
    number = tmp_path / "number"
    inner = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    run_jobs(
        [Job("starts another", [sys.executable, "-c", outer], seconds=3)], at_once=1, seconds=9
    )
    child = int(number.read_text())
    for _ in range(50):  # until the system has taken note of its end
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} goes on")


def options(*words: str):
    return gpu_check._parser().parse_args(words)


def test_it_says_why_the_sanitizer_is_not_run(monkeypatch):
    cuda = gpu_check.BACKENDS["cuda"]
    monkeypatch.setattr(type(cuda), "why_not", lambda *_: "was not built")
    for path in (None, "/x"):
        assert gpu_check.why_not_sanitized(options("--rehearse"), path) == "a rehearsal has no GPU"
        for word in ("--skip-tests", "--skip-sanitizer"):
            assert gpu_check.why_not_sanitized(options(word), path) == "left out on request"
        assert gpu_check.why_not_sanitized(options(), path) == "backend cuda was not built"
    monkeypatch.setattr(type(cuda), "why_not", lambda *_: None)
    assert "was not found (PATH, CUDA_HOME" in gpu_check.why_not_sanitized(options(), None)
    assert gpu_check.why_not_sanitized(options(), "/x") == ""


def test_a_finding_of_the_sanitizer_is_a_failure(tmp_path, capsys):
    document: dict[str, Any] = {"entries": [], "not_measured": [], "first_call": {}, "seconds": 1.0}
    clean = {"words": "no findings in 3 tests", "failed": False}
    found = {"words": "2 findings, the first: Invalid", "failed": True}
    document |= {"tests": {}, "sanitizer": {"compute-sanitizer memcheck": clean}}
    assert gpu_check._finish(tmp_path / "x.json", document) == 0
    assert "compute-sanitizer memcheck: no findings in 3 tests" in capsys.readouterr().out
    document["sanitizer"]["compute-sanitizer racecheck"] = found
    assert gpu_check._finish(tmp_path / "x.json", document) == 1
    assert "FAIL: found something: compute-sanitizer racecheck" in capsys.readouterr().out


def test_a_worker_that_breaks_is_started_again_behind_the_entry(worker):
    seen: list[str] = []
    measured = supervise.run_entries(
        ["a", "breaks", "fails", "b"],
        [],
        60,
        command=worker,
        report=lambda result: seen.append(result["name"]),
    )
    assert seen == ["a", "b"]
    assert [result["name"] for result in measured.results] == ["a", "b"]
    assert measured.rates == {"copy_tb_s": 3.0}
    reasons = {item["name"]: item["reason"] for item in measured.not_measured}
    assert reasons["fails"] == "ValueError: no"
    assert "status 3: an illegal memory access" in reasons["breaks"]


def test_a_worker_that_hangs_is_stopped(worker):
    measured = supervise.run_entries(["a", "hangs", "b"], [], 60, command=worker, stall_seconds=1.5)
    assert [result["name"] for result in measured.results] == ["a", "b"]
    assert measured.not_measured == [{"name": "hangs", "reason": "it did not return"}]


def test_a_worker_that_never_starts_is_said():
    command = (sys.executable, "-c", "raise SystemExit(1)")
    measured = supervise.run_entries(["a"], [], 60, command=command)
    assert measured.not_measured == [{"name": "a", "reason": "the worker did not start it"}]
    late = supervise.run_entries(["a"], [], 0, command=command)
    assert late.not_measured == [{"name": "a", "reason": supervise.OUT_OF_TIME}]


def test_only_files_with_gpu_tests_are_run():
    files = first_steps.test_files()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py")}
    assert expected <= set(files)
    assert not any(name.startswith("tests/benchmarks") for name in files)


def test_results_of_tests_and_first_calls_are_read():
    outcomes = {
        "tests/test_a.py": Outcome(0, "....\n4 passed in 1s\n", 2.0),
        "tests/test_b.py": Outcome(1, "F\n1 failed in 1s\n", 2.0),
        "tests/test_c.py": Outcome(5, "no tests ran\n", 2.0),
        "tests/test_d.py": Outcome(None, "..", 9.0),
        "first call x": Outcome(0, 'noise\n{"first_s": 3.0, "second_s": 0.1}\n', 4.0),
        "first call y": Outcome(1, "Traceback", 4.0),
        "warm x": Outcome(0, "{}", 4.0),
    }
    tests = first_steps.test_results(outcomes)
    assert {name: found["failed"] for name, found in tests.items()} == {
        "tests/test_a.py": False,
        "tests/test_b.py": True,
        "tests/test_c.py": False,
        "tests/test_d.py": True,
    }
    assert tests["tests/test_b.py"]["words"] == "1 failed in 1s"
    assert tests["tests/test_d.py"]["words"] == "stopped after 9 s"
    assert first_steps.first_calls(outcomes) == {"x": {"first_s": 3.0, "second_s": 0.1}}


def test_first_call_prints_json(capsys):
    arguments = ["gpu_ec_layer/B32-S256-D1152-E8", "--device", "cpu", "--tiny"]
    assert first_call.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_s"] > 0 < found["second_s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal runs the tests for a GPU, too")
def test_the_rehearsal_goes_through_every_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_steps, "test_files", lambda: ["tests/test_gpu_ops.py"])
    only = "gpu_dispatch/T8192|gpu_ec_layer/B32"
    arguments = ["--rehearse", "--seconds", "300", "--only", only, "--out", str(tmp_path)]
    status = gpu_check.main(arguments)
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    (path,) = tmp_path.glob("rehearsal-*.json")
    document = json.loads(path.read_text())
    assert document["complete"]
    assert {result["stage"] for result in document["entries"]} == {"ec_layer", "dispatch"}
    assert document["tests"]["tests/test_gpu_ops.py"]["failed"] is False
    for found in document["sanitizer"].values():
        assert found["words"] == "not run: a rehearsal has no GPU"
    assert len(document["sanitizer"]) == 4
    assert "backend cuda: " in said.out
    assert list(document["first_call"]) == ["gpu_ec_layer/B32-S256-D1152-E8"]
    assert path.with_suffix(".md").exists()
    assert (tmp_path / f"{path.stem}-gpu_ec_layer.png").exists()
    assert said.out.rstrip().splitlines()[-1].startswith(f"wrote {path}")
    assert "goals met: 0 of 0; 2 entries" in said.out
    assert os.environ.get("TRITON_CACHE_DIR") is None
