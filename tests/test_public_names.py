"""The names of the package: all there, each loaded when it is first used, and nothing heavier than it needs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

import lightning_softprompt


def in_a_second_process(code: str) -> Any:
    """What `code` prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_who_attaches_prompts_loads_no_lightning() -> None:
    code = "import json, sys; from lightning_softprompt import attach; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in in_a_second_process(code)}
    assert {"torch", "lightning_softprompt"} <= loaded
    assert not loaded & {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}


def test_the_package_itself_loads_nothing() -> None:
    code = "import json, sys; import lightning_softprompt; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in in_a_second_process(code)}
    assert "lightning_softprompt" in loaded and not loaded & {"torch", "transformers", "lightning", "datasets"}


def test_every_name_can_be_imported_and_is_listed() -> None:
    names = lightning_softprompt.__all__
    assert names == sorted(set(names)) and set(names) <= set(dir(lightning_softprompt))
    for name in names:
        value = getattr(lightning_softprompt, name)
        assert value.__name__ == name
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert getattr(lightning_softprompt, name) is value  # also the second time


def test_names_are_listed_before_they_are_used() -> None:
    code = "import json, lightning_softprompt as p; print(json.dumps([dir(p), p.__all__]))"
    listed, names = in_a_second_process(code)
    assert set(names) <= set(listed) and "__version__" in listed


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_softprompt' has no attribute 'atach'"):
        _ = lightning_softprompt.atach
    assert not hasattr(lightning_softprompt, "Labelz")


def test_the_gradients_need_no_import_of_their_own() -> None:
    code = (
        "import json, lightning_softprompt\n"
        "found = lightning_softprompt.gradients.CollapseGuard\n"
        "print(json.dumps([found.__name__, found is lightning_softprompt.CollapseGuard]))"
    )
    assert in_a_second_process(code) == ["CollapseGuard", True]
