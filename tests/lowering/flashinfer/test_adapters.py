"""The arguments that the adapters build, given to stand-ins that compute what FlashInfer documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .cases import CASES, Case
from .check import check
from .stand_ins import ENTRIES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapter(case: Case, enter: Callable[[dict[str, Any]], None]) -> None:
    enter(ENTRIES)
    check(case)
