"""The tests of the installed transformers: downloaded once from PyPI, kept in `.cache/`, never in this repository."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

CACHE = Path(__file__).parents[2] / ".cache"
# Not `tests`, which is ours.
_PACKAGE = "transformers_tests"
# Siblings of the common tests that the source distribution leaves out, and the mixin that each would give.
_ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def common_tests() -> ModuleType:
    """The module `test_modeling_common`, which has `ModelTesterMixin`.

    Raises:
        SystemExit: the source distribution cannot be downloaded.
    """
    folder = CACHE / f"transformers-{transformers.__version__}"
    if not folder.is_dir():
        _download(folder)
    sys.path.insert(0, str(folder))
    for module, mixin in _ABSENT.items():
        _stand_in(f"{_PACKAGE}.{module}", mixin)
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


def _download(folder: Path) -> None:
    CACHE.mkdir(exist_ok=True)
    wanted = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", scratch]
        # Of a source distribution pip wants the metadata; setuptools, which makes them, is here already.
        command = [*pip, "--no-deps", "--no-binary", ":all:", "--no-build-isolation", wanted]
        if subprocess.run(command).returncode:
            sys.exit(f"error: the source of {wanted} could not be downloaded; check the connection and run make again")
        unpacked = Path(scratch) / "unpacked"
        (unpacked / _PACKAGE).mkdir(parents=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                path, content = Path(member.name), archive.extractfile(member)
                if path.parts[1:-1] == ("tests",) and path.suffix == ".py" and content is not None:
                    (unpacked / _PACKAGE / path.name).write_bytes(content.read())
        unpacked.rename(folder)  # a folder of this name is whole


def _stand_in(name: str, mixin: str) -> None:
    """Let `name` be importable, with an empty class `mixin`."""
    parent = name.rpartition(".")[0]
    sys.modules[parent] = ModuleType(parent)
    sys.modules[name] = ModuleType(name)
    setattr(sys.modules[name], mixin, type(mixin, (), {}))
