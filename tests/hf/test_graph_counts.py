"""One graph a phase for mixtures of experts, whatever experts they run: counted by the backend, not by Dynamo.

Dynamo's own counter misses a kind of break. Expected graphs: 1 for a prompt; 3 with a cache that grows (prompt,
first token, every further token); with a static cache 1, and 2 where a sliding layer counts in Python.
"""

from __future__ import annotations

import pytest
import torch

import sm12x_compile

from .experts import FAMILIES, Phase, build, calls

IMPLEMENTATIONS = (None, "eager")
PHASES: tuple[Phase, ...] = ("prompt", "dynamic", "static")
CASES = [(name, experts, phase) for name in FAMILIES for experts in IMPLEMENTATIONS for phase in PHASES]
# Families whose experts are written in different ways; one phase each.
CI = [
    ("mixtral", "eager", "prompt"), ("gpt_oss", "eager", "static"), ("longcat_flash", None, "prompt"),
    ("deepseek_v3", "eager", "prompt"), ("qwen3_moe", "eager", "dynamic"), ("phimoe", "eager", "prompt"),
    ("granitemoe", None, "prompt"), ("hunyuan_v1_moe", "eager", "prompt"),
]  # fmt: skip


def graphs_of(name: str, phase: Phase) -> int:
    return {"prompt": 1, "dynamic": 3, "static": FAMILIES[name].static_graphs}[phase]


def check(name: str, experts: str | None, phase: Phase) -> None:
    torch._dynamo.reset()
    model = build(name, experts)
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad():
        with sm12x_compile.collect() as report:
            got = list(calls(model, phase, compiled))
        wanted = list(calls(model, phase, model))
    assert report.graphs == graphs_of(name, phase), (report.recompiles, report.graph_breaks)
    assert not report.graph_breaks
    assert not any("left as it is" in line for line in report.code_rewrites)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "experts", "phase"), CI, ids=lambda v: str(v))
def test_graphs(name: str, experts: str | None, phase: Phase) -> None:
    check(name, experts, phase)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "experts", "phase"), [c for c in CASES if c not in CI], ids=lambda v: str(v)
)
def test_graphs_of_all(name: str, experts: str | None, phase: Phase) -> None:
    check(name, experts, phase)


@pytest.mark.parametrize("name", ["mixtral", "longcat_flash"])
def test_a_full_graph_can_be_demanded(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, "eager" if name == "mixtral" else None)
    options = {"codegen": "eager"}
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options=options, fullgraph=True)
    with torch.no_grad():
        (got,), (wanted,) = (list(calls(model, "prompt", f)) for f in (compiled, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
