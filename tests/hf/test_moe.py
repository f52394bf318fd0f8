"""Every mixture of experts of the Hugging Face models that have one: site by site, with its routing.

Under ``batched_mm`` the weights are gathered, under ``grouped_mm`` (the default) rows are sorted; in fp32 the latter
is an opaque op. The numbers are held to the bounds of `test_coverage`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sm12x_compile.model_zoo import PHASES, workload
from sm12x_compile.report import Report, Site

from .test_coverage import assert_sound, run_compiled

# Layers with experts, and how they are chosen; the router of phimoe (two masked softmaxes) stays as it is.
_SOFTMAX = {"score": "softmax", "top_k": 4, "experts": 4}
_GROUPS = {"top_k": 2, "experts": 4, "groups": 2, "topk_group": 1, "score": "sigmoid"}
_GROUPS |= {"renormalise": True, "correction_bias": True}
ROUTING: dict[str, tuple[int, dict[str, Any] | None]] = {
    "mixtral": (2, {**_SOFTMAX, "renormalise": True}),
    "qwen3_moe": (2, {**_SOFTMAX, "renormalise": True}),
    "deepseek_v2": (1, {"score": "softmax", "top_k": 2, "experts": 4}),
    "deepseek_v3": (1, {**_GROUPS, "scaling": 2.5}),
    "glm4_moe": (1, _GROUPS),
    "gpt_oss": (2, {**_SOFTMAX, "renormalise": True}),
    "qwen3_next": (2, {**_SOFTMAX, "renormalise": True}),
    "qwen3_5_moe": (2, {**_SOFTMAX, "renormalise": True}),
    "olmoe": (2, _SOFTMAX),
    "phimoe": (2, None),
}
SMALL: dict[str, dict[str, Any]] = {
    name: dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    for name in ("qwen3_next", "qwen3_5_moe")
}
# The eager loop over the experts that were hit is data-dependent Python: traced over all experts, then rolled up again.
FORMS = {None: "grouped", "grouped_mm": "grouped", "batched_mm": "gathered", "eager": "loop"}
_GPT_OSS = {
    "activation": "swiglu_oai", "layout": "ekn", "gate_and_up": "interleaved", "bias": True, "limit": 7.0,
    "alpha": 1.702,
}  # fmt: skip

ALL = list(itertools.product(ROUTING, PHASES, FORMS, ("fp32", "bf16")))
# In CI every model in both forms, phases and precisions by turns; `test_two_of_eight` decodes with a growing cache.
CI = {
    (model, ("prefill", "static")[(i + j) % 2], experts, ("fp32", "bf16")[(i // 2 + j) % 2])
    for i, model in enumerate(ROUTING)
    for j, experts in enumerate(("batched_mm", "grouped_mm"))
} | {
    ("mixtral", "prefill", None, "fp32"), ("gpt_oss", "static", None, "bf16"), ("gpt_oss", "prefill", "eager", "fp32"),
    ("deepseek_v3", "static", "eager", "fp32"), ("mixtral", "static", "eager", "bf16"),
}  # fmt: skip


def expected(model: str, experts: str | None) -> dict[str, Any]:
    routing = ROUTING[model][1] or {"top_k": 2, "experts": 4}
    tags = {"experts": routing["experts"], "top_k": routing["top_k"], "activation": "silu", "layout": "enk"}
    return tags | {"form": FORMS[experts]} | (_GPT_OSS if model == "gpt_oss" else {})


def sites_of(report: Report, pattern: str, graph: int) -> list[Site]:
    return [s for s in report.sites if s.pattern == pattern and s.graph == graph]


def check(model: str, phase: str, experts: str | None, precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    settings = dict(experts=experts, dtype=dtype, batch=2, **SMALL.get(model, {}))
    job = workload(model, phase, **settings)  # type: ignore[arg-type]
    outputs, report = run_compiled(job)
    assert not report.graph_breaks
    layers, routing = ROUTING[model]
    for graph in range(report.graphs):
        found = sites_of(report, "moe", graph)
        assert [(s.status, s.tags) for s in found] == [("rewritten", expected(model, experts))] * layers, f"{report}"
        routed = sites_of(report, "moe_route", graph)
        wanted = [("rewritten", routing)] * layers if routing is not None else []
        assert [(s.status, s.tags) for s in routed] == wanted, f"{report}"
    assert_sound(job, outputs)


def case_id(case: tuple[str | None, ...]) -> str:
    return "-".join(str(part or "default") for part in case)


@pytest.mark.parametrize("case", [c for c in ALL if c in CI], ids=case_id)
def test_experts(case: tuple[str, str, str | None, str]) -> None:
    check(*case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [c for c in ALL if c not in CI], ids=case_id)
def test_experts_full_grid(case: tuple[str, str, str | None, str]) -> None:
    check(*case)


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm", "eager"])
def test_two_of_eight(experts: str) -> None:
    """Fewer choices than experts, so that a wrong expert, weight or order would show."""
    many = dict(num_experts=8, num_experts_per_tok=2)
    job = workload("qwen3_moe", "decode", experts=experts, batch=2, **many)
    outputs, report = run_compiled(job)
    assert report.count("moe") == report.count("moe_route") == 2 * report.graphs
    assert_sound(job, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.nightly)], ids=str)
def test_many_experts_in_a_loop(dtype: torch.dtype) -> None:
    """However long the loop is, it is one op: read in part only, the rest would be computed for every token."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    import sm12x_compile

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=32, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).eval().requires_grad_(False)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    block, x = block.to(dtype), torch.randn(1, 9, 8).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad(), sm12x_compile.collect() as report:
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(compiled(x), block(x), rtol=bound, atol=bound)
    assert [s.tags["experts"] for s in report.rewritten if s.pattern == "moe"] == [32], f"{report}"


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_absent_experts(experts: str) -> None:
    """A shard of expert parallelism: ids of experts that live elsewhere are E, and contribute nothing."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import sm12x_compile

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=4, experts_implementation=experts)
    config._experts_implementation = experts
    shard = Qwen3MoeExperts(config).eval()
    shard._is_expert_parallel = True
    for weight in shard.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, ids, p = torch.randn(7, 16), torch.rand(7, 8).topk(3).indices.clamp(max=4), torch.rand(7, 3)
    p = p.masked_fill(ids == 4, 0.0)
    torch._dynamo.reset()
    compiled = torch.compile(shard, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad(), sm12x_compile.collect() as report:
        torch.testing.assert_close(compiled(x, ids, p), shard(x, ids, p), rtol=1e-5, atol=1e-6)
    assert report.count("moe") == 1, f"{report}"
