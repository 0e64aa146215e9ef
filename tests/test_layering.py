"""Import arrows: dit_models -> moe_kernels -> (csrc), public names only, extras only when used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = {"diffusers", "sklearn", "omegaconf", "matplotlib", "safetensors", "PIL", "tqdm"}
EXTRAS |= {"torch_fidelity", "torchvision", "webdataset"}
EXTRAS |= {"tensorboard", "transformers", "triton", "megablocks", "kernels", "timm", "datasets"}
# Beside the package itself; it needs torch.distributed.
PUBLIC_MODULES = {"moe_kernels.distributed"}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at module level) of every import statement."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, node.lineno, id(node) in top))
    return found


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    return files


def test_moe_kernels_never_imports_dit_models():
    for path in sources("moe_kernels"):
        for module, line, _ in imports(path):
            assert not module.startswith("dit_models"), f"{path}:{line}"


def test_dit_models_uses_only_public_names_of_moe_kernels():
    for path in sources("dit_models"):
        for module, line, _ in imports(path):
            public = module in PUBLIC_MODULES or not module.startswith("moe_kernels.")
            assert public, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("package", ["moe_kernels", "dit_models"])
def test_extras_are_imported_only_when_used(package):
    for path in sources(package):
        for module, line, top in imports(path):
            if module.startswith("triton") and path.parent.name == "triton":
                continue  # this folder is itself imported only when used
            assert not (top and module.split(".")[0] in EXTRAS), f"{path}:{line} imports {module}"


def test_importing_both_packages_loads_no_extra():
    code = (
        "import sys, torch.utils.flop_counter; before = set(sys.modules); "  # loads tqdm and triton
        "import moe_kernels, dit_models, dit_models.models; "
        f"print(sorted({EXTRAS!r} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
