"""The plans of every card are those of the golden file."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import pytest

from sm12x_compile.race.spec import DIMS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import plans  # noqa: E402

REGENERATE = "python tests/golden/plans.py > tests/golden/plans.txt"
SECTIONS = {part.split("\n", 1)[0]: part for part in (HERE / "plans.txt").read_text().split("\n## ")[1:]}


IN_CI = (plans.SAMPLES, "gpt_oss, static", "deepseek_v3, static")
MARKED = [s if s in IN_CI else pytest.param(s, marks=pytest.mark.nightly) for s in plans.SECTIONS]


@pytest.mark.parametrize("section", MARKED)
def test_every_card_gets_the_kernels_of_the_golden_file(section: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    golden, found = SECTIONS[section].strip().splitlines(), plans.section(section)
    difference = difflib.unified_diff(golden, found, "golden", "now", lineterm="", n=2)
    assert found == golden, f"if this is meant: {REGENERATE}\n" + "\n".join(difference)


def test_the_golden_file_names_every_op_and_card_and_no_failure() -> None:
    samples = SECTIONS[plans.SAMPLES]
    for op in DIMS:
        assert f"\n{op}: " in samples
    for text in SECTIONS.values():
        assert all(card in text for card in plans.CARDS)
        assert "accepts() failed" not in text
