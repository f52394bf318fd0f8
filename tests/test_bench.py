"""The league table on this machine, and what was measured on an H200."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sm12x_compile import YES, bench, register_kernel, registry
from sm12x_compile.arch import by_name
from sm12x_compile.cli import app
from sm12x_compile.lowering.select import floor
from sm12x_compile.race.spec import DIMS
from sm12x_compile.samples import samples

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "league-h200.json"
runner = CliRunner()
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the small samples are for a CPU")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kernels", {op: list(found) for op, found in registry._kernels.items()})


class Known:
    """A timer that knows the answer."""

    def seconds(self, calls: Any) -> float:
        calls[0]()
        return 1e-3


@on_cpu
def test_the_league_of_one_op() -> None:
    rows = bench.bench(["causal_conv1d", "moe_route"], timer=Known())
    assert [(r.op, r.kernel, r.status) for r in rows] == [
        ("moe_route", "aten", "ran"), ("moe_route", "triton.moe_route", "refused"),
        ("causal_conv1d", "aten", "ran"), ("causal_conv1d", "triton.conv", "refused"),
    ]  # fmt: skip
    for row in rows:
        assert (row.seconds == 1e-3 and row.error is not None) == (row.status == "ran")
        assert row.floor and row.note


@on_cpu
def test_a_wrong_kernel_shows_and_fails_the_run() -> None:
    register_kernel("moe_route", "mine.bad", accepts=lambda call, arch: YES)(
        lambda logits, top_k, *rest: (
            torch.zeros(logits.shape[0], top_k, dtype=torch.int64), torch.ones(logits.shape[0], top_k),
        )
    )  # fmt: skip
    result = runner.invoke(app, ["bench", "--op", "moe_route"])
    assert result.exit_code == 1
    assert "mine.bad" in result.stdout and "off by" in result.stdout


@on_cpu
def test_json_and_mistakes() -> None:
    found = json.loads(runner.invoke(app, ["bench", "--op", "causal_conv1d_update", "--json"]).stdout)
    assert found["arch"] == "cpu" and found["versions"]["torch"].startswith("2.")
    assert found["rows"][0]["kernel"] == "step" and found["rows"][0]["seconds"] > 0
    result = runner.invoke(app, ["bench", "--op", "atention"])
    assert result.exit_code == 2 and "unknown op 'atention'; known: attention, mla" in " ".join(result.stderr.split())


@pytest.mark.parametrize("large", [True, False])
def test_samples_name_every_op(large: bool) -> None:
    found = samples("cpu", large=large)
    assert {s.call.op for s in found} == set(DIMS)
    for sample in found:
        least = floor(sample.call, by_name("rtx5090"))
        assert least is not None and least.bytes > 0 and least.flops > 0


def test_floors_are_floors_where_it_was_measured() -> None:
    """The byte and FLOP models against an H200: no kernel is below its floor, and the best large ones are near."""
    data = json.loads(RESULTS.read_text())
    assert data["device"] == "NVIDIA H200"
    ran = [row for row in data["rows"] if row["status"] == "ran"]
    assert {row["op"] for row in ran} <= set(DIMS) and len({row["op"] for row in ran}) >= 10
    assert all(row["status"] in ("ran", "refused") for row in data["rows"])
    assert min(row["times_floor"] for row in ran) >= 1.0
    # Where a kernel moves tens of MB and does little else, the model must explain most of its time.
    near = {row["call"].split(" (")[0]: row["times_floor"] for row in ran if row["times_floor"] < 1.3}
    assert {"16 tokens", "8 rows, lengths"} <= set(near)
