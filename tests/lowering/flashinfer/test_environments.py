"""The contract tests against two releases of FlashInfer, which are downloaded: `environments.sh`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.nightly
def test_contract_with_two_releases(tmp_path: Path) -> None:
    script = Path(__file__).with_name("environments.sh")
    ran = subprocess.run(
        [str(script), str(tmp_path)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
