from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sm12x_compile import registry
from sm12x_compile.race import races


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of one's own, nothing settled yet, and the kernels as they were afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(races, "_settled", {})
    monkeypatch.setattr(registry, "_kernels", {op: list(found) for op, found in registry._kernels.items()})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
