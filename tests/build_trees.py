"""Projects with the layout of this one and next to nothing in them, for the tests of the build.

Their modules are made with the Python C API instead of pybind11, which compiles slowly.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import build_tools
import pytest
from build_tools import BuildError

ROOT = Path(__file__).parent.parent

BINDINGS = """
#include <Python.h>
namespace moe::baseline { const char* name(); }
#ifdef MOE_HAS_AVX512
namespace moe::avx2 { const char* name(); }
namespace moe::avx512 { const char* name(); }
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "", -1, {}, {}, {}, {}, {}};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "first", moe::baseline::name());
#ifdef MOE_HAS_AVX512
  PyModule_AddStringConstant(m, "last", moe::avx512::name());
#endif
  return m;
}
"""
KERNEL = """
#include "cpu/text.hpp"
namespace moe::MOE_ISA { const char* name() { return TEXT(MOE_ISA); } }
"""
HEADER = "#define TEXT_OF(x) #x\n#define TEXT(x) TEXT_OF(x)\n"

CUDA_BINDINGS = """
#include <Python.h>
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
const char* name();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(MOE_MODULE), "", -1, {}, {}, {}, {}, {}};
PyMODINIT_FUNC JOIN(PyInit_, MOE_MODULE)() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "name", name());
  return m;
}
"""
CUDA_KERNEL = """
#include "cuda/text.hpp"
#ifdef MOE_SIMULATED
const char* simulated();
const char* name() { return simulated(); }
#else
#include <cuda_runtime.h>
__global__ void __launch_bounds__(128) scale(float* x, float factor) { x[threadIdx.x] *= factor; }
void launch(float* x, cudaStream_t stream) { scale<<<1, 128, 0, stream>>>(x, 2); }
const char* name() { return DEVICE; }
#endif
"""
CUDA_HEADER = '#define DEVICE "GPU"\n'
SIMULATOR = 'const char* simulated() { return "simulated"; }\n'


def found(choose) -> bool:
    """Whether the build finds the program."""
    try:
        return bool(choose(os.environ))
    except BuildError:
        return False


needs_compiler = pytest.mark.skipif(
    not found(build_tools.find_compiler) or find_spec("pybind11") is None,
    reason="needs a C++ compiler and pybind11",
)


def make_tree(folder: Path) -> Path:
    """Make a project with a ``_cpu`` module only."""
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "moe_kernels").mkdir()
    shutil.copy(ROOT / "moe_kernels" / "build_info.py", folder / "moe_kernels")
    (folder / "moe_kernels" / "__init__.py").write_text("")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for path in (ROOT / "csrc").glob("*.py"):
        shutil.copy(path, folder / "csrc")
    (folder / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (folder / "csrc" / "cpu" / "kernel.cpp").write_text(KERNEL)
    (folder / "csrc" / "cpu" / "text.hpp").write_text(HEADER)
    return folder


def add_cuda(folder: Path) -> Path:
    """Add the sources of ``_cuda`` and ``_cuda_simulated``."""
    cuda = folder / "csrc" / "cuda"
    (cuda / "simulator").mkdir(parents=True)
    (cuda / "bindings.cpp").write_text(CUDA_BINDINGS)
    (cuda / "kernel.cu").write_text(CUDA_KERNEL)
    (cuda / "text.hpp").write_text(CUDA_HEADER)
    (cuda / "simulator" / "host.cpp").write_text(SIMULATOR)
    return folder


def environment(**settings: str) -> dict[str, str]:
    """Return the process's environment without the settings of whoever runs the tests."""
    ours = ("MOE_KERNELS_", "CXXFLAGS", "LDFLAGS", "LD_PRELOAD", "MAX_JOBS", "ASAN_")
    ours += ("TORCH_CUDA_ARCH_LIST", "NVCC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | settings


def run(tree: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Call Python in the project's folder."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=environment(**settings),
        capture_output=True,
        text=True,
    )
