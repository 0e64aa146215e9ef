"""The simulated GPU: it runs right kernels rightly, and wrong ones do not pass unseen."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ORDERS = ("0", "1", "2")  # forward, backward, shuffled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def backend() -> None:
    """No backend of the library takes part."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("simulator") / "probe"
    sources = [Path(__file__).with_name("simulator_probe.cpp")]
    sources += sorted((ROOT / "csrc" / "cuda" / "simulator").glob("*.cpp"))
    command = [*str(COMPILER).split(), "-std=c++17", "-O1", "-DMOE_SIMULATED=1"]
    command += [f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def say(probe: Path, case: str, order: str = "0") -> str:
    result = subprocess.run([probe, case, order], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_race_gives_other_results_in_another_order(probe):
    assert len({say(probe, "race", order) for order in ORDERS}) > 1
    expected = " ".join(str(100 + (i + 1) % 64) for i in range(64))
    assert {say(probe, "no race", order) for order in ORDERS} == {expected}


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_do_not_come_to_a_barrier_are_reported(probe, order):
    words = "error: threads wait for ever: 48 of 64 threads of block 0 wait at sync; 16 of 64"
    assert say(probe, "half waits", order).startswith(words)
    assert "of warp " in say(probe, "part ways", order)
    assert "part ways: one is at" in say(probe, "part ways", order)


@pytest.mark.parametrize("order", ORDERS)
def test_an_error_in_a_thread_ends_the_launch(probe, order):
    assert say(probe, "fails", order) == "error: thread 3 fails"


@pytest.mark.parametrize("order", ORDERS)
def test_reductions_over_runs_of_lanes(probe, order):
    found = iter(map(int, say(probe, "reductions", order).split()))
    values = [thread * 7 % 32 for thread in range(64)]
    for thread in range(64):
        for lanes in (1, 2, 4, 8, 16, 32):
            first = thread // lanes * lanes
            run = values[first : first + lanes]
            expected = (sum(run), max(run), sum(values[first:thread]))
            assert (next(found), next(found), next(found)) == expected, (thread, lanes)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_team_meet_and_the_last_team_sees_all(probe, order):
    counter, *numbers = map(int, say(probe, "teams", order).split())
    assert counter == 0
    assert numbers[:6] == [0, 10, 20, 30, 40, 50]
    assert numbers[-1] == 150


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("odd threads", "40 threads a block"),
        ("many threads", "128 threads a block"),
        ("much memory", "1048576 bytes of shared memory"),
        ("many blocks", "more than 2^31 - 1 blocks"),
    ],
)
def test_what_no_gpu_starts_is_refused(probe, case, words):
    assert say(probe, case) == f"error: cannot start kernel neighbour: {words}"
