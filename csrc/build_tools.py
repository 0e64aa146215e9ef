"""What the environment asks of the build, and the programs that there are to do it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CHOICES = ("auto", "cpu", "cuda", "none")
SANITIZERS = ("address", "undefined")
COMPILERS = ("c++", "g++", "clang++")
LAUNCHERS = ("ccache", "sccache", "distcc")


class BuildError(Exception):
    """A module cannot be built; the text is the reason and what to do about it."""


def build_choice(environ: Mapping[str, str]) -> str:
    """Read ``MOE_KERNELS_BUILD``."""
    choice = environ.get("MOE_KERNELS_BUILD") or "auto"
    if choice not in CHOICES:
        raise BuildError(f"MOE_KERNELS_BUILD is {choice!r}; expected {', '.join(CHOICES)}.")
    return choice


def wants_simulated(environ: Mapping[str, str]) -> bool:
    """Read ``MOE_KERNELS_SIMULATED``: whether to build the CUDA kernels for a simulated GPU."""
    return environ.get("MOE_KERNELS_SIMULATED") == "1"


def sanitizers(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Read ``MOE_KERNELS_SANITIZE``, a list with commas."""
    words = {word.strip() for word in environ.get("MOE_KERNELS_SANITIZE", "").split(",")} - {""}
    for word in sorted(words - set(SANITIZERS)):
        raise BuildError(
            f"MOE_KERNELS_SANITIZE holds {word!r}; expected a list of {', '.join(SANITIZERS)}."
        )
    return tuple(sorted(words))


def max_jobs(environ: Mapping[str, str]) -> int | None:
    """Read ``MAX_JOBS``: how many compilers ninja starts at once; ``None`` leaves it to ninja."""
    value = environ.get("MAX_JOBS") or None
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise BuildError(f"MAX_JOBS is {value!r}; expected a positive integer.")
    return int(value)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words that start it, and its name and version for the record."""

    command: tuple[str, ...]
    name: str

    @property
    def program(self) -> str:
        """The compiler itself, without what starts it and without flags."""
        return next(word for word in self.command if Path(word).name not in LAUNCHERS)


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    """Return the compiler named by ``CXX``, else the first one on ``PATH``."""
    if sys.platform == "win32":
        raise BuildError("the C++ kernels do not build on Windows yet; other backends serve there")
    path = environ.get("PATH")
    if environ.get("CXX"):
        command = tuple(shlex.split(environ["CXX"]))
        if shutil.which(command[0], path=path) is None:
            raise BuildError(
                f"the C++ compiler {command[0]} (from CXX) was not found; "
                "correct CXX and run pip install again"
            )
    else:
        found = next((name for name in COMPILERS if shutil.which(name, path=path)), None)
        if found is None:
            raise BuildError(
                f"no C++ compiler was found (tried {', '.join(COMPILERS)}); "
                "install one and run pip install again"
            )
        command = (found,)
    try:
        result = subprocess.run(
            [*command, "--version"], env=environ, capture_output=True, text=True
        )
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started ({error.strerror})") from None
    output = result.stdout
    banner = output.partition("\n")[0]
    name = Path(command[-1]).name
    if "clang" in banner:
        name = "clang++"
    elif "Free Software Foundation" in output:
        name = "g++"
    # Distributions put their own version in brackets before the compiler's.
    version = re.search(r"\d+\.\d+(\.\d+)*", re.sub(r"\([^)]*\)", "", banner))
    return Compiler(command, f"{name} {version[0]}" if version else name)


def find_ninja(environ: Mapping[str, str]) -> str | None:
    """Return the path of ninja, from its Python package or from ``PATH``."""
    path = environ.get("PATH", os.defpath)
    if find_spec("ninja") is not None:
        import ninja

        # Empty when pip put the program into a folder that the package does not guess.
        path = os.pathsep.join(filter(None, (ninja.BIN_DIR, path)))
    return shutil.which("ninja", path=path)
