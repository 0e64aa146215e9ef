"""What ptxas says of each kernel while it compiles (``-Xptxas -v``), as figures."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

_ENTRY = re.compile(r"ptxas info\s+: Compiling entry function '(\S+)' for '(\S+)'")
_STACK = re.compile(
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"ptxas info\s+: Used (\d+) registers")
_CUMULATIVE = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")

DEMANGLERS = ("c++filt", "cu++filt", "llvm-cxxfilt")
# By the number of the enumerator; see csrc/cuda/block.hpp.
_TEAMS = ("cluster", "grid")


@dataclass(frozen=True)
class Figures:
    """What one kernel needs on one architecture.

    Attributes:
        symbol: the kernel's name as the linker knows it.
        arch: ``sm_90a``.
        registers: of a thread.
        stack: bytes of a thread, those of the functions included that it calls.
        spill_stores, spill_loads: bytes that a thread moves for want of registers, likewise.
        shared: bytes of a block that are known before the launch.
    """

    symbol: str
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


def parse(text: str) -> list[Figures]:
    """Read the remarks of one file, one architecture after the other."""
    found: list[Figures] = []
    for line in text.splitlines():
        if entry := _ENTRY.match(line):
            found.append(Figures(entry[1], entry[2]))
        elif not found:
            continue  # of the file as a whole
        elif stack := _STACK.match(line):
            # First the kernel's own, then those of functions that were not inlined.
            last = found[-1]
            found[-1] = replace(
                last,
                stack=max(last.stack, int(stack[1])),
                spill_stores=last.spill_stores + int(stack[2]),
                spill_loads=last.spill_loads + int(stack[3]),
            )
        elif used := _USED.match(line):
            stack, shared = _CUMULATIVE.search(line), _SHARED.search(line)
            found[-1] = replace(
                found[-1],
                registers=int(used[1]),
                stack=int(stack[1]) if stack else found[-1].stack,
                shared=int(shared[1]) if shared else 0,
            )
    return found


def readable(symbols: list[str]) -> Iterator[str]:
    """Names as the source has them, for a reader who knows that these are kernels.

    Raises:
        FileNotFoundError: when no program is there that knows how.
    """
    program = next(filter(shutil.which, DEMANGLERS), None)
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(DEMANGLERS)} was found; install binutils")
    text = "\n".join(symbols)
    result = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return map(shorten, result.stdout.splitlines())


def shorten(name: str) -> str:
    """Drop result, arguments and namespaces; ``kernel<K, (Team)1>`` becomes ``K, grid``."""
    name = name.replace("(anonymous namespace)::", "").replace("moe::cuda::", "")
    name = _without_arguments(name.removeprefix("void "))
    launched = re.fullmatch(r"kernel<(.*), \(Team\)(\d)>", name)
    return f"{launched[1]}, {_TEAMS[int(launched[2])]}" if launched else name


def _without_arguments(name: str) -> str:
    depth = 0
    for position in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[position], 0)
        if name[position] == "(" and depth == 0 and name.endswith(")"):
            return name[:position]
    return name
