"""Every CUDA kernel compiles without spills, no worse than the kept table; and what finds that."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import build_steps
import pytest

from benchmarks.cuda_check import __main__ as cuda_check
from benchmarks.cuda_check import remarks, report, rules
from benchmarks.cuda_check.remarks import Figures, parse, shorten
from moe_kernels.build_info import build_record, why_not_built

ROOT = Path(__file__).resolve().parent.parent
needs_demangler = pytest.mark.skipif(
    not any(map(shutil.which, remarks.DEMANGLERS)), reason="needs c++filt"
)


@needs_demangler
@pytest.mark.skipif(
    not build_record().get("cuda", {}).get("built"),
    reason=f"the CUDA module {why_not_built('cuda')}",
)
def test_kernels_compile_for_every_architecture():
    command = [sys.executable, "-m", "benchmarks.cuda_check", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    findings = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert result.returncode == 0, "\n".join(findings) or result.stderr


# What nvcc 13.0 says of a kernel with 300 numbers a thread, and of one that needs nothing.
SPILLS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5spillILi300EEvPfi' for 'sm_80'
ptxas info    : Function properties for _Z5spillILi300EEvPfi
    1776 bytes stack frame, 2972 bytes spill stores, 3604 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1776 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 113.716 ms
ptxas info    : Compiling entry function '_Z5scalePff' for 'sm_80'
ptxas info    : Function properties for _Z5scalePff
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 1.267 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5scalePff' for 'sm_120'
ptxas info    : Function properties for _Z5scalePff
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers
ptxas info    : Compile time = 1.832 ms
"""  # noqa: E501

# Of a kernel with an array of shared memory that calls a function which was not inlined. The
# spills of the function are made up.
CALLS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3moe4cuda6kernelINS0_6SelectIfLi128EEELNS0_4TeamE1EEEvNT_4ArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN3moe4cuda6kernelINS0_6SelectIfLi128EEELNS0_4TeamE1EEEvNT_4ArgsE
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 48 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 5.940 ms
ptxas info    : Function properties for _ZN3moe4cuda6helperEfi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""  # noqa: E501


def test_remarks_are_parsed():
    assert parse("") == parse("ptxas info    : 0 bytes gmem\n") == []
    assert parse(SPILLS) == [
        Figures("_Z5spillILi300EEvPfi", "sm_80", 32, 1776, 2972, 3604),
        Figures("_Z5scalePff", "sm_80", 8),
        Figures("_Z5scalePff", "sm_120", 9),
    ]


def test_called_functions_belong_to_their_kernel():
    (figures,) = parse(CALLS)
    assert figures.arch == "sm_90a"
    assert (figures.registers, figures.shared, figures.stack) == (20, 512, 48)
    assert (figures.spill_stores, figures.spill_loads) == (8, 12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void spill<300>(float*, int)", "spill<300>"),
        ("scale(void (*)(int), float)", "scale"),
        (
            "void moe::cuda::kernel<moe::cuda::(anonymous namespace)::Select<unsigned short, 256>, "
            "(moe::cuda::Team)1>(moe::cuda::(anonymous namespace)::Select<unsigned short, 256>"
            "::Args)",
            "Select<unsigned short, 256>, grid",
        ),
        ("_Z9no mangle", "_Z9no mangle"),
    ],
)
def test_names_are_short(name, expected):
    assert shorten(name) == expected


@needs_demangler
def test_symbols_are_readable():
    symbols = [figures.symbol for figures in [*parse(SPILLS), *parse(CALLS)]]
    names = ["spill<300>", "scale", "scale", "Select<float, 128>, grid"]
    assert list(remarks.readable(symbols)) == names


def row(**fields: int) -> rules.Row:
    return rules.row_of("rows", "copy", Figures("_Z4copy", "sm_80", **fields))


def test_spills_and_stack_are_findings(monkeypatch):
    assert rules.broken(row(registers=255)) == []
    (spills,) = rules.broken(row(spill_stores=8, spill_loads=4))
    assert "rows: copy [sm_80]: spills 8 bytes and loads 4" in spills
    (stack,) = rules.broken(row(stack=16))
    assert "16 bytes of stack; allowed 0" in stack
    monkeypatch.setitem(rules.STACK_ALLOWED, "copy", 16)
    assert rules.broken(row(stack=16)) == []
    assert "allowed 16" in rules.broken(row(stack=17))[0]


def test_more_registers_than_in_the_table_are_a_finding(tmp_path):
    path = tmp_path / "table.json"
    assert report.read(path) == {"nvcc": None, "rows": {}}
    report.write([row(registers=30)], "nvcc 13.0", path)
    kept = report.read(path)
    allowed = 30 + rules.MORE_REGISTERS
    lost, remark = rules.compare([row(registers=allowed)], kept, "nvcc 13.0")
    assert lost == []
    assert remark == "1 kernels compared with the kept table"
    (lost,), _ = rules.compare([row(registers=allowed + 1)], kept, "nvcc 13.0")
    assert f"registers were 30, are {allowed + 1}; if that is meant: python -m" in lost
    lost, remark = rules.compare([row(registers=99)], kept, "nvcc 12.4")
    assert lost == []
    assert "The kept table is of nvcc 13.0, this is nvcc 12.4" in remark


def test_more_static_shared_memory_than_in_the_table_is_a_finding(tmp_path):
    path = tmp_path / "table.json"
    report.write([row(shared=16)], "n", path)
    kept = report.read(path)
    assert rules.compare([row(shared=16)], kept, "n")[0] == []
    (lost,), _ = rules.compare([row(shared=17)], kept, "n")
    assert "rows: copy [sm_80]: bytes of static shared memory were 16, are 17" in lost
    report.write([row()], "n", path)  # zeros are left out
    (lost,), _ = rules.compare([row(shared=4)], report.read(path), "n")
    assert "were 0, are 4" in lost


def test_new_and_gone_kernels_are_findings():
    other = rules.row_of("rows", "scale", Figures("_Z5scale", "sm_80", registers=8))
    elsewhere = rules.row_of("rows", "scale", Figures("_Z5scale", "sm_90", registers=8))
    later = rules.row_of("rows", "copy", Figures("_Z4copy", "sm_103", registers=8))
    kept = {"nvcc": "n", "rows": {one.key: one.fields for one in (other, elsewhere)}}
    (new, gone), remark = rules.compare([row(registers=8), later], kept, "n")
    assert new.startswith("rows: copy [sm_80] is not in the kept table: run python -m ")
    assert new.endswith("--update")
    assert gone.startswith("rows: scale [sm_80] is gone, ")
    assert remark == "0 kernels compared with the kept table; it has nothing for sm_103"
    assert rules.compare([row(registers=8)], kept, "another nvcc")[0] == []


def test_table_is_written_to_be_read(tmp_path):
    path = tmp_path / "table.json"
    later = rules.row_of("rows", "copy", Figures("_Z4copy", "sm_100", registers=40, shared=512))
    hopper = rules.row_of("rows", "copy", Figures("_Z4copy", "sm_90a", registers=32))
    report.write([later, hopper, row(registers=30)], "nvcc 13.0", path)
    lines = path.read_text().splitlines()
    assert sum('"kernel": "copy"' in line for line in lines) == 3
    page = path.with_suffix(".md").read_text()
    assert "| kernel | sm_80 | sm_90a | sm_100 | shared | stack | spills |" in page
    assert "| `copy` | 30 | 32 | 40 | 512 | 0 | 0 |" in page
    assert json.loads(path.read_text())["rows"]["rows: copy [sm_80]"]["registers"] == 30


@needs_demangler
def test_every_source_has_remarks_for_every_architecture(tmp_path):
    (tmp_path / "kernel.cu").touch()
    (tmp_path / "kernel.ptxas").write_text(SPILLS)
    rows, problems = cuda_check.read_build(tmp_path, tmp_path, ["8.0", "12.0+PTX"])
    assert [one.key for one in rows] == [
        "kernel: spill<300> [sm_80]",
        "kernel: scale [sm_80]",
        "kernel: scale [sm_120]",
    ]
    assert problems == []
    _, (problem,) = cuda_check.read_build(tmp_path, tmp_path, ["8.0", "9.0a", "12.0+PTX"])
    assert "kernel.ptxas has no kernel for sm_90a" in problem
    (tmp_path / "host.cu").touch()
    (tmp_path / "host.ptxas").write_text("ptxas info    : 0 bytes gmem\n")
    (tmp_path / "new.cu").touch()
    _, (problem,) = cuda_check.read_build(tmp_path, tmp_path, ["8.0", "12.0+PTX"])
    assert "new.ptxas is missing: MOE_KERNELS_BUILD=cuda" in problem


def test_remarks_are_where_the_build_leaves_them():
    assert cuda_check.build_folder() == ROOT / build_steps.build_folder("cuda")


def test_without_a_build_it_says_how_to_make_one(monkeypatch, capsys):
    entry = {"cuda": {"built": False, "reason": "of rain"}}
    monkeypatch.setattr(cuda_check, "build_record", lambda: entry)
    monkeypatch.setattr(cuda_check, "why_not_built", lambda name: "was not built: of rain")
    with pytest.raises(SystemExit):
        cuda_check.main([])
    said = capsys.readouterr().err
    assert "moe_kernels._cuda was not built: of rain" in said
    assert cuda_check.BUILD in said
