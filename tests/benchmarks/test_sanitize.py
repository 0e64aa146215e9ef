"""compute-sanitizer without a GPU: finding it, its command lines, reading what it says."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.gpu import sanitize
from benchmarks.gpu.first_steps import FirstSteps
from benchmarks.gpu.jobs import Outcome

HEADER = "========= COMPUTE-SANITIZER\n"
MEMCHECK = (
    HEADER
    + """..========= Invalid __global__ read of size 4 bytes
=========     at void moe::cuda::kernel<moe::cuda::TokenChoice<(int)4>, (moe::cuda::Team)1>()+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6510c00001 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6510c00000 of size 128 bytes
=========
F
=================================== FAILURES ===================================
E   RuntimeError: CUDA error: unspecified launch failure
1 failed, 2 passed, 40 deselected in 9.81s
========= ERROR SUMMARY: 1,024 errors
========= ERROR SUMMARY: 1,004 errors were not printed. Use --print-limit option to adjust the \
number of printed errors
"""
)
RACECHECK = (
    HEADER
    + """========= Warning: Race reported between Write access at kernel()+0x90
=========     and Read access at kernel()+0x100 [508 hazards]
=========
...
3 passed, 40 deselected in 5.00s
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""
)
INITCHECK = (
    HEADER
    + """.========= Uninitialized __global__ memory read of size 4 bytes
=========     at kernel()+0x70
"""
)
CLEAN = HEADER + "...\n3 passed, 40 deselected in 5.00s\n========= ERROR SUMMARY: 0 errors\n"
NO_RACES = (
    HEADER
    + "...\n3 passed in 5.00s\n"
    + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
TESTS_FAILED = (
    HEADER
    + """F
=================================== FAILURES ===================================
E   RuntimeError: cannot start kernel expert_choice_fwd: cudaErrorCooperativeLaunchTooLarge
=========================== short test summary info ============================
1 failed in 4.00s
========= ERROR SUMMARY: 0 errors
"""
)
NOTHING_RAN = HEADER + "s\n1 skipped, 40 deselected in 1.00s\n========= ERROR SUMMARY: 0 errors\n"
DESELECTED = HEADER + "\n41 deselected in 1.00s\n========= ERROR SUMMARY: 0 errors\n"
# Where a container does not let it start a process, version 2026.4.
NOT_STARTED = (
    HEADER
    + """========= Error: process didn't terminate successfully
=========     The application may have hit an error when dereferencing Unified Memory from the host.
========= Error: Target application terminated before first instrumented API call
"""
)


def make_program(folder: Path, name: str = sanitize.NAME, text: str = "#!/bin/sh\n") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_it_is_looked_for_in_the_usual_places_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "USUAL_FOLDER", str(tmp_path / "usual"))
    places = {
        name: tmp_path / name / "bin" for name in ("home", "path", "toolkit", "site/nvidia/a")
    }
    places["site/nvidia/a"].mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    nvcc = make_program(places["toolkit"], "nvcc")
    environ = {"PATH": str(places["path"]), "CUDA_HOME": str(tmp_path / "home"), "CUDACXX": nvcc}
    assert sanitize.find_tool({}) is None
    assert sanitize.find_tool(environ) is None
    # From the last place to the first, which is then preferred to all others.
    for folder in ("site/nvidia/a", "usual", "toolkit", "home", "path"):
        expected = make_program(places.get(folder, tmp_path / folder))
        assert sanitize.find_tool(environ) == expected


def test_it_is_found_beside_the_nvcc_that_a_link_on_the_path_points_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "USUAL_FOLDER", str(tmp_path / "usual"))
    nvcc, expected = make_program(tmp_path / "cuda", "nvcc"), make_program(tmp_path / "cuda")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(nvcc)
    assert sanitize.find_tool({"PATH": str(tmp_path / "links")}) == expected


def test_every_tool_has_its_own_command_and_time():
    jobs = {job.name: job for job in sanitize.jobs("/cuda/bin/compute-sanitizer", {"A": "b"})}
    assert list(jobs) == [f"compute-sanitizer {tool}" for tool in sanitize.TOOLS]
    assert len(jobs) == 4
    for tool, cache in (("memcheck", False), ("racecheck", True), ("initcheck", False)):
        job = jobs[f"compute-sanitizer {tool}"]
        assert job.command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]
        python = job.command.index(sys.executable)
        assert job.command[python + 1 : python + 3] == ["-m", "pytest"]
        assert (ROOT / job.command[-1]).exists()
        assert job.environment is not None
        assert job.environment["A"] == "b"
        assert (sanitize.NO_CACHE in job.environment) is not cache
        assert 0 < (job.seconds or 0) <= 60


def test_the_line_to_type_is_what_is_run():
    line = sanitize.by_hand("/a b/compute-sanitizer", "memcheck")
    assert line.startswith(f"{sanitize.NO_CACHE}=1 '/a b/compute-sanitizer' --tool memcheck ")
    assert line.endswith(" tests/test_gpu_cuda.py")
    assert sanitize.by_hand("x", "racecheck").startswith("x --tool racecheck ")


def test_the_guide_has_the_lines_that_are_run():
    guide = (ROOT / "docs" / "gpu.md").read_text()
    assert f'TESTS="python {" ".join(sanitize.TESTS)}"' in guide
    assert f'OPTIONS="{" ".join(sanitize.OPTIONS)}"' in guide
    for tool, cache_hides in sanitize.TOOLS.items():
        line = f"{sanitize.NAME} --tool {tool} $OPTIONS $TESTS"
        assert f"\n{sanitize.NO_CACHE + '=1 ' if cache_hides else ''}{line}\n" in guide
    assert f"at most {sanitize.SECONDS:.0f} seconds" in guide


def test_the_tests_that_it_selects_exist():
    text = (ROOT / "tests" / "test_gpu_cuda.py").read_text()
    assert text.count("def test_small_") >= 3


@pytest.mark.parametrize(
    ("outcome", "findings", "failed", "words"),
    [
        (Outcome(0, CLEAN, 9.0), 0, False, "no findings in 3 tests"),
        (Outcome(0, NO_RACES, 9.0), 0, False, "no findings in 3 tests"),
        (
            Outcome(1, MEMCHECK, 9.0),
            1024,
            True,
            "1024 findings, the first: Invalid __global__ read",
        ),
        (Outcome(0, RACECHECK, 9.0), 1, True, "1 findings, the first: Warning: Race reported"),
        (Outcome(None, INITCHECK, 60.0), None, True, "findings, the first: Uninitialized __glob"),
        (Outcome(1, TESTS_FAILED, 9.0), 0, True, "no findings, but tests failed: 1 failed in 4.0"),
        (Outcome(0, NOTHING_RAN, 9.0), 0, False, "no result, no test ran: 1 skipped, 40 deselect"),
        (Outcome(5, DESELECTED, 9.0), 0, False, "no result, no test ran: 41 deselected in"),
        (
            Outcome(255, NOT_STARTED, 9.0),
            None,
            False,
            "no result, status 255: Error: process didn't",
        ),
        (Outcome(None, HEADER, 60.2), None, False, "no result: stopped after 60 s"),
        (Outcome(-11, "", 1.0), None, False, "no result, status -11: "),
    ],
)
def test_what_it_says_is_read(outcome, findings, failed, words):
    outcomes = {"compute-sanitizer memcheck": outcome}
    found = sanitize.results(outcomes, "cs", "")["compute-sanitizer memcheck"]
    assert found["words"].startswith(words)
    assert (found["findings"], found["failed"]) == (findings, failed)
    assert found["seconds"] == outcome.seconds
    assert found["command"] == sanitize.by_hand("cs", "memcheck")


def test_the_place_of_a_finding_is_said():
    outcomes = {"compute-sanitizer memcheck": Outcome(1, MEMCHECK, 9.0)}
    words = sanitize.results(outcomes, "cs", "")["compute-sanitizer memcheck"]["words"]
    assert "at void moe::cuda::kernel<moe::cuda::TokenChoice" in words
    assert len(words) <= 200


def test_what_was_not_run_says_why():
    found = sanitize.results({}, None, "compute-sanitizer was not found (PATH)")
    assert list(found) == [f"compute-sanitizer {tool}" for tool in sanitize.TOOLS]
    for result in found.values():
        assert result["words"] == "not run: compute-sanitizer was not found (PATH)"
        assert not result["failed"]
        assert result["command"] == ""
    late = sanitize.results({}, "cs", "")
    assert late["compute-sanitizer synccheck"]["words"] == "not run: the time was used up"


# Stands in for the tool: says what tool and what memory it was asked for, and runs nothing.
FAKE = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$2 cache-off=$PYTORCH_NO_CUDA_MEMORY_CACHING"
echo "2 passed in 1.00s"
if [ "$2" = racecheck ]; then
  echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
else
  echo "========= ERROR SUMMARY: 0 errors"
fi
"""


def test_the_first_steps_run_every_tool(tmp_path, monkeypatch):
    monkeypatch.delenv(sanitize.NO_CACHE, raising=False)
    path = make_program(tmp_path, text=FAKE)
    steps = FirstSteps(tests=False, first_calls=False, sanitizer=path)
    outcomes = steps.run([], seconds=30)
    found = sanitize.results(outcomes, path, "")
    assert {result["words"] for result in found.values()} == {"no findings in 2 tests"}
    said = {name: outcome.output.splitlines()[1] for name, outcome in outcomes.items()}
    assert said["compute-sanitizer initcheck"] == "initcheck cache-off=1"
    assert said["compute-sanitizer racecheck"] == "racecheck cache-off="
    assert sanitize.NO_CACHE not in os.environ
