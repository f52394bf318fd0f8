from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.lowering.flashinfer import installed, latent, prefill
from sm12x_compile.lowering.flashinfer.plans import Plans
from sm12x_compile.ops.mla import per_head


def _project(x: Tensor, w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return per_head(x, w).to(dtype or x.dtype)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Give the adapters these entry points in place of FlashInfer's, and tell them that it is installed."""

    def give(entries: dict[str, Any]) -> None:
        monkeypatch.setattr(installed, "entry", entries.__getitem__)
        monkeypatch.setattr(installed, "refusal", lambda *args, **kwargs: None)
        for module in (latent, prefill):
            monkeypatch.setattr(module, "PLANS", Plans())
        if not torch.cuda.is_available():  # a Triton kernel of our own
            monkeypatch.setattr(latent, "project", _project)

    return give
