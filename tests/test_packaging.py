"""The wheel, and what the kernels need."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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
    assert "lightning_softprompt/style.mplstyle" in wheel


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    """What the library, and each of its extras, needs."""
    listed = itertools.chain(project()["dependencies"], *project()["optional-dependencies"].values())
    return [Requirement(line) for line in listed]


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    lowest = {each.name: str(each.specifier).removeprefix(">=") for each in requirements() if each.specifier}
    # Of its lowest PyTorch, PyPI has no small build for a CPU.
    assert Version(pinned.pop("torch")) > Version(lowest["torch"])
    assert {name: Version(lowest[name]) for name in pinned} == {name: Version(of) for name, of in pinned.items()}
    extras = project()["optional-dependencies"]
    always = [
        *project()["dependencies"],
        *extras["serve"],
        *extras["gguf"],
    ]
    assert {Requirement(line).name for line in always} == pinned.keys() - {"peft"} | {"torch"}


def test_the_extra_for_gguf_has_what_transformers_asks_for_to_read_one() -> None:
    of_transformers = [Requirement(line) for line in requires("transformers") or ()]
    asked = next(each for each in of_transformers if each.name == "accelerate")
    (listed,) = (Requirement(line) for line in project()["optional-dependencies"]["gguf"] if "accelerate" in line)
    assert Version(str(listed.specifier).removeprefix(">=")) >= Version(str(asked.specifier).removeprefix(">="))


def test_the_pinned_versions_are_allowed() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    of = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for each in requirements():
        if each.name != "lightning-softprompt":
            assert each.specifier.contains(of[each.name.lower().replace("_", "-")]), each


def test_a_version_is_the_same_wherever_it_stands() -> None:
    version = project()["version"]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
