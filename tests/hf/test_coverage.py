"""The coverage table of `cases`: every attention site is rewritten, tagged right, and numerically sound.

Bounds, with `truth` the same weights run in fp32:
  fp32  |compiled - eager| <= 1e-5 max|eager|: two orders of summation. Eager itself is off by up to 4.4e-6
        from fp64 on these models, whose outputs reach 4.
  bf16  max|compiled - truth| <= 2 max|eager - truth|: no worse than eager bf16, but for the luck of maxima.
A window that is off by one moves the outputs by more than 1 (`test_the_models_notice_a_wrong_mask`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile.model_zoo import Workload, attention_implementations, family, workload
from sm12x_compile.report import Report

from .cases import CI, Case, cases, checked_tags

FP32_BOUND = 1e-5
BF16_FACTOR = 2.0


def largest(values: list[Tensor]) -> float:
    return max(float(v.abs().max()) for v in values)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(left, right, strict=True))


def run_compiled(job: Workload) -> tuple[list[Tensor], Report]:
    torch._dynamo.reset()
    compiled = torch.compile(job.model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        outputs = job.run(compiled)
    return outputs, report


def in_fp32(job: Workload) -> list[Tensor]:
    """The outputs of the same weights and inputs, computed in fp32."""
    wide = copy.deepcopy(job)
    for parameter in wide.model.parameters():
        parameter.data = parameter.data.float()
    wide._inputs = {k: v.float() if v.is_floating_point() else v for k, v in wide._inputs.items()}
    return wide.run()


def assert_sound(job: Workload, compiled: list[Tensor]) -> None:
    eager = job.run()
    if eager[0].dtype == torch.float32:
        assert distance(compiled, eager) <= FP32_BOUND * largest(eager)
    else:
        truth = in_fp32(job)
        assert distance(compiled, truth) <= BF16_FACTOR * distance(eager, truth)


def sites_by_graph(report: Report) -> list[list[dict[str, object]]]:
    graphs: dict[int, list[dict[str, object]]] = {}
    for site in report.sites:
        if site.pattern in ("moe", "moe_route"):  # see test_moe
            continue
        graphs.setdefault(site.graph, []).append(checked_tags(site))
    return [graphs[index] for index in sorted(graphs)]


def check(case: Case) -> None:
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    job = workload(case.model, case.phase, attn=case.attn, dtype=dtype, batch=2)
    compiled, report = run_compiled(job)
    left = [f"{s.module}: {s.status}, {s.reason}" for s in report.sites if s.status != "rewritten"]
    assert not left
    assert not report.graph_breaks
    assert report.graphs == len(case.graphs)
    assert sites_by_graph(report) == case.graphs
    assert_sound(job, compiled)


ALL = list(cases())
SUBSET = [case for case in ALL if case.id in CI]


@pytest.mark.parametrize("case", SUBSET, ids=lambda c: c.id)
def test_coverage(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [c for c in ALL if c.id not in CI], ids=lambda c: c.id)
def test_coverage_full_grid(case: Case) -> None:
    check(case)


def test_the_subset_covers_all_pairs() -> None:
    def pairs(chosen: list[Case]) -> set[tuple[object, object]]:
        names = ("model", "phase", "attn", "precision")
        facts = [[(name, getattr(c, name)) for name in names] for c in chosen]
        return {(a, b) for fact in facts for a in fact for b in fact if a < b}

    assert pairs(SUBSET) == pairs(ALL)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_the_models_notice_a_wrong_mask(name: str) -> None:
    attn = attention_implementations(name)[-1]
    right = workload(name, attn=attn, batch=2).run()
    wrong = workload(name, attn=attn, batch=2, sliding_window=9).run()
    assert distance(right, wrong) > 1.0
    assert family(name).config["sliding_window"] == 8
