from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sm12x_compile.lowering.flashinfer import installed, latent, prefill
from sm12x_compile.lowering.flashinfer.plans import Plans


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Give the adapters these entry points in place of FlashInfer's, and tell them that it is installed."""

    def give(entries: dict[str, Any]) -> None:
        monkeypatch.setattr(installed, "entry", entries.__getitem__)
        monkeypatch.setattr(installed, "refusal", lambda *args, **kwargs: None)
        for module in (latent, prefill):
            monkeypatch.setattr(module, "PLANS", Plans())

    return give
