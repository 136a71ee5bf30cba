"""What several tests of the pages share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.integration.pages import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all of the processes that share the tests out."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    built = shared / "site"
    with FileLock(shared / "site.lock"):
        if not built.is_dir():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(shared / "building")]
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
            made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            (shared / "building").rename(built)
    return built
