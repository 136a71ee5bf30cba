"""The wheel, and what the kernels need."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_softprompt"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_kernels_depend_on_torch_alone() -> None:
    for path in (ROOT / "kernels" / "softprompt_kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "softprompt_kernels"}, path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside the wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = [*PACKAGE.rglob("*"), *(ROOT / "kernels").rglob("*"), *(ROOT / n for n in ("README.md", "LICENSE"))]
    for path in (*sources, ROOT / "pyproject.toml"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = folder / "source" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, folder, folder / "source"], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_ships_both_packages_and_no_kernels(wheel: list[str]) -> None:
    # A top-level package `kernels` would hide Hugging Face's, which transformers imports by that name.
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if ".dist-info" not in name} == {"lightning_softprompt", "softprompt_kernels"}
    for package in ("lightning_softprompt", "softprompt_kernels"):
        assert f"{package}/py.typed" in wheel and f"{package}/__init__.py" in wheel
    assert not (ROOT / "kernels" / "__init__.py").exists()
    every = {f"lightning_softprompt/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert every <= set(wheel)
