"""Decoders that nothing was written for: one graph, eager's numbers, every attention and mixture of experts found."""

from __future__ import annotations

import pytest
import torch

import sm12x_compile

from .families import FAMILIES, Phase, build, calls, exists
from .test_coverage import FP32_BOUND, distance, largest

CI = {("llama4_text", "prefill"), ("nemotron_h", "decode"), ("granitemoehybrid", "prefill"), ("flex_olmo", "prefill")}
CI |= {(name, ("prefill", "decode")[k // 6 % 2]) for k, name in enumerate(FAMILIES) if k % 6 == 0}
ALL = [(name, phase) for name in FAMILIES for phase in ("prefill", "decode")]


def check(name: str, phase: Phase) -> None:
    if not exists(name):
        pytest.skip("the installed transformers does not have it")
    model = build(FAMILIES[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        ours = list(calls(model, phase, compiled))
    assert not report.graph_breaks
    found = {pattern: report.count(pattern) for pattern in FAMILIES[name].sites}
    assert found == {k: n * report.graphs for k, n in FAMILIES[name].sites.items()}, f"{report}"
    eager = list(calls(model, phase, model))
    assert distance(ours, eager) <= FP32_BOUND * largest(eager)


@pytest.mark.parametrize("case", [c for c in ALL if c in CI], ids="-".join)
def test_family(case: tuple[str, Phase]) -> None:
    check(*case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [c for c in ALL if c not in CI], ids="-".join)
def test_family_full_grid(case: tuple[str, Phase]) -> None:
    check(*case)
