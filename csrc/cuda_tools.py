"""The nvcc that there is, and the GPU architectures that it is asked for."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_tools import BuildError

OLDEST_NVCC = (12, 0)
USUAL_FOLDER = Path("/usr/local/cuda/bin")

# The last one's PTX serves the GPUs that come after it.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
# What PyTorch means by them; its older ones are below 8.0.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
_OLDEST_ARCHITECTURE = 80
# Code for one architecture only (a), or for its family (f): since when each of them exists.
_OLDEST_OF_SUFFIX = {"": _OLDEST_ARCHITECTURE, "a": 90, "f": 100}


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler.

    Attributes:
        command: the words that start it.
        version: major and minor.
        architectures: the numbers that it knows, 90 for 9.0.
    """

    command: tuple[str, ...]
    version: tuple[int, int]
    architectures: frozenset[int]

    @property
    def name(self) -> str:
        """Name and version, for the record."""
        return f"nvcc {self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture to compile for.

    Attributes:
        number: 90 for 9.0.
        suffix: ``a``, ``f`` or nothing.
        ptx: whether later GPUs get its PTX.
    """

    number: int
    suffix: str
    ptx: bool

    @property
    def name(self) -> str:
        """The architecture as ``TORCH_CUDA_ARCH_LIST`` has it."""
        number = f"{self.number // 10}.{self.number % 10}"
        return f"{number}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def gencode(self) -> str:
        """The value of nvcc's option ``-gencode``."""
        target = f"{self.number}{self.suffix}"
        code = f"[sm_{target},compute_{target}]" if self.ptx else f"sm_{target}"
        return f"arch=compute_{target},code={code}"


def find_nvcc(environ: Mapping[str, str]) -> Nvcc:
    """Return the nvcc named by ``CUDACXX``, else the first one of the usual places."""
    path = environ.get("PATH")
    if environ.get("CUDACXX"):
        command = tuple(shlex.split(environ["CUDACXX"]))
        if shutil.which(command[0], path=path) is None:
            raise BuildError(
                f"the CUDA compiler {command[0]} (from CUDACXX) was not found; "
                "correct CUDACXX and run pip install again"
            )
    else:
        homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
        candidates = [
            *(shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes),
            shutil.which("nvcc", path=path),
            shutil.which("nvcc", path=str(USUAL_FOLDER)),
        ]
        found = next(filter(None, candidates), None)
        if found is None:
            raise BuildError(
                f"nvcc was not found (tried CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {USUAL_FOLDER}); "
                "install the CUDA toolkit, 12.0 or newer, and run pip install again"
            )
        command = (found,)
    version = _ask(command, "--version", environ)
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise BuildError(f"{command[0]} --version says {version.strip()!r}; expected an nvcc")
    known = re.findall(r"^sm_(\d+)$", _ask(command, "--list-gpu-code", environ), re.MULTILINE)
    nvcc = Nvcc(command, (int(release[1]), int(release[2])), frozenset(map(int, known)))
    if nvcc.version < OLDEST_NVCC:
        raise BuildError(
            f"{command[0]} is {nvcc.name}; expected 12.0 or newer: "
            "install a newer CUDA toolkit, or name its nvcc in CUDACXX"
        )
    return nvcc


def _ask(command: tuple[str, ...], option: str, environ: Mapping[str, str]) -> str:
    try:
        result = subprocess.run(
            [*command, option], env=environ, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started ({error.strerror})") from None
    return result.stdout


def architectures(environ: Mapping[str, str], nvcc: Nvcc) -> list[Architecture]:
    """Read ``TORCH_CUDA_ARCH_LIST``; by default everything common that ``nvcc`` knows."""
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        usual = map(_parse, DEFAULT_ARCHITECTURES.split(";"))
        known = [one for one in usual if one is not None and one.number in nvcc.architectures]
        if known and not any(one.ptx for one in known):  # an nvcc that is older than the last one
            known.append(Architecture(known[-1].number, "", ptx=True))
        return known
    found: dict[tuple[int, str], Architecture] = {}
    for word in re.split(r"[;,\s]+", asked.strip(";, ")):
        for part in NAMED_ARCHITECTURES.get(word, word).split(";"):
            one = _parse(part)
            if one is not None and one.number < _OLDEST_ARCHITECTURE:
                # The variable is set for PyTorch, in containers also with what it still supports.
                print(f"TORCH_CUDA_ARCH_LIST: {part} is left out, the kernels need 8.0 or newer")
                continue
            if one is None or not _possible(one, nvcc):
                raise BuildError(_not_possible(word, part, nvcc))
            key = (one.number, one.suffix)
            ptx = one.ptx or (key in found and found[key].ptx)
            found[key] = Architecture(one.number, one.suffix, ptx)
    if not found:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST is {asked!r}, all below 8.0, which the kernels need; "
            "other backends serve older GPUs"
        )
    return [found[key] for key in sorted(found)]


def _parse(word: str) -> Architecture | None:
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
    if match is None:
        return None
    return Architecture(int(match[1] + match[2]), match[3], bool(match[4]))


def _possible(one: Architecture, nvcc: Nvcc) -> bool:
    return one.number in nvcc.architectures and one.number >= _OLDEST_OF_SUFFIX[one.suffix]


def _not_possible(word: str, part: str, nvcc: Nvcc) -> str:
    known = sorted(number for number in nvcc.architectures if number >= _OLDEST_ARCHITECTURE)
    numbers = ", ".join(f"{number // 10}.{number % 10}" for number in known)
    what = repr(part) if word == part else f"{word!r}, which includes {part!r}"
    return (
        f"TORCH_CUDA_ARCH_LIST holds {what}; expected numbers of {nvcc.name} from 8.0 on "
        f"({numbers}; from 9.0 on also with 'a', from 10.0 on with 'f'), each also with '+PTX', "
        f"or {', '.join(NAMED_ARCHITECTURES)}"
    )
