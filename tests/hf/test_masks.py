"""Masks that the caller brings: 2-D padding, packed sequences; and no dense mask anywhere else."""

from __future__ import annotations

import pytest
import torch

import sm12x_compile
from sm12x_compile.model_zoo import Phase, build, workload

from .cases import cases
from .test_coverage import assert_sound, run_compiled


def test_no_case_expects_a_dense_mask() -> None:
    """`test_coverage` holds each site to its tags, so it is enough that no tag there is dense."""
    masks = {site["mask"] for case in cases() for graph in case.graphs for site in graph}
    assert not {mask for mask in masks if "dense" in str(mask)}
    assert {"causal", "window"} <= masks


@pytest.mark.parametrize("phase", ["prefill", "decode", "static"])
@pytest.mark.parametrize(("name", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"),
                                            ("gpt_oss", "eager")])  # fmt: skip
def test_left_padding(name: str, attn: str, phase: Phase) -> None:
    job = workload(name, phase, attn=attn, batch=2, padding=True)
    outputs, report = run_compiled(job)
    assert len(report.rewritten) == len(report.sites) > 0
    for site in (s for s in report.sites if s.pattern == "attention"):
        assert "padding" in site.tags["mask"].split("+"), site.tags
        assert "dense" not in site.tags["mask"]
    assert_sound(job, outputs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_right_padding_of_an_encoder(name: str, attn: str) -> None:
    job = workload(name, attn=attn, batch=2, padding=True)
    outputs, report = run_compiled(job)
    assert len(report.rewritten) == len(report.sites) > 0
    assert all("padding" in site.tags["mask"] and "dense" not in site.tags["mask"] for site in report.sites)
    assert_sound(job, outputs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_packed_sequences(attn: str) -> None:
    """Two sequences in one row, told apart by positions that start again: never mistaken for plain causal."""
    model = build("llama", attn=attn)
    ids = torch.arange(5, 17)[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad(), sm12x_compile.collect() as report:
        packed = compiled(**inputs).logits
        eager = model(**inputs).logits
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
    assert len(report.rewritten) == 2
    assert all(site.tags["mask"] in ("causal+packed", "dense") for site in report.sites)
    torch.testing.assert_close(packed, eager, atol=5e-5, rtol=0)
    # What packing means: the second sequence does not see the first.
    torch.testing.assert_close(packed[:, 7:], alone, atol=5e-5, rtol=0)
