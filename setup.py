"""Entry point of setuptools: the compiled modules. All that is declarative is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from build_native import MODULES, build_modules  # noqa: E402
from build_tools import BuildError  # noqa: E402


class BuildNative(build_ext):
    """Leave the compiling to csrc/build_native.py, also where it ends with none."""

    def run(self) -> None:
        packages = [Path(self.build_lib) / "moe_kernels"]
        if self.inplace:
            packages.append(ROOT / "moe_kernels")
        try:
            build_modules(ROOT, packages, os.environ)
        except BuildError as error:
            raise CompileError(str(error)) from None

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "moe_kernels"
        paths = {path for module, _ in MODULES.values() for path in folder.glob(f"{module}.*")}
        return [str(path) for path in sorted(paths | set(folder.glob("_build.json")))]

    def get_output_mapping(self) -> dict[str, str]:
        names = [Path(path).name for path in self.get_outputs()] if self.inplace else []
        return {f"{self.build_lib}/moe_kernels/{name}": f"moe_kernels/{name}" for name in names}


setup(
    # The sources are in MANIFEST.in; this line makes the wheel one of this platform.
    ext_modules=[Extension("moe_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
