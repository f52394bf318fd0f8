"""Every latent attention of the Hugging Face models that have one: site by site, and never expanded in decode.

The numbers are held to the bounds of `test_coverage`, where eager is the expanded form.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import sm12x_compile.backend
from sm12x_compile.model_zoo import PHASES, attention_implementations, family, workload
from sm12x_compile.pipeline import Transformed, transform
from sm12x_compile.report import Site

from .cases import OLD
from .test_coverage import assert_sound, run_compiled

LAYERS = {"deepseek_v2": 2, "deepseek_v3": 2, "deepseek_v32": 2, "glm4_moe_lite": 2, "kimi_linear": 1}
GRAPHS = {"prefill": ["prompt"], "decode": ["prompt", "token", "token"], "static": ["static token"]}
MASKS = {"prompt": "causal", "token": "none", "static token": "length"}
# The indexer chooses keys; that it chooses all of so few is not proved.
INDEXED = {"prompt": "dense", "token": "padding", "static token": "length+padding"}
# transformers 5.17 caches expanded keys here.
EXPANDED_CACHE = {"deepseek_v32"} if OLD else set()

ALL = [
    (model, phase, attn, precision)
    for model in LAYERS
    for phase, attn, precision in itertools.product(PHASES, attention_implementations(model), ("fp32", "bf16"))
]
# In CI one combination of attention and precision a model and phase, by turns.
CI = {
    next(c for c in ALL if c[:2] == (model, phase) and c[3] == ("fp32", "bf16")[(i + j) % 2])
    for i, model in enumerate(LAYERS)
    for j, phase in enumerate(PHASES)
} | {(model, "static", "eager", "fp32") for model in LAYERS}


def facts(site: Site) -> dict[str, Any]:
    return {"pattern": site.pattern, **{k: v for k, v in site.tags.items() if k in ("mask", "form", "latent", "rope")}}


def expected(model: str, role: str, attn: str) -> dict[str, Any]:
    mask = (INDEXED if model == "deepseek_v32" else MASKS)[role]
    if model in EXPANDED_CACHE and role != "prompt":
        return {"pattern": "attention", "mask": mask, "form": "sdpa" if attn == "sdpa" else "softmax"}
    return {"pattern": "mla", "mask": mask, "form": "expanded", "latent": 32, "rope": 8}


def check(model: str, phase: str, attn: str, precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    job = workload(model, phase, attn=attn, dtype=dtype, batch=2)  # type: ignore[arg-type]
    outputs, report = run_compiled(job)
    graphs = GRAPHS[phase]
    assert report.graphs == len(graphs) and not report.graph_breaks
    for k, role in enumerate(graphs):
        sites = [s for s in report.rewritten if s.graph == k and s.pattern in ("mla", "attention")]
        assert [facts(s) for s in sites] == [expected(model, role, attn)] * LAYERS[model], f"{role}:\n{report}"
        kernels = {s.kernel for s in sites if s.pattern == "mla"}
        assert kernels <= ({"absorbed + aten"} if "token" in role else {k for k in kernels if k.startswith("expanded")})
    misses = {s.reason for s in report.near_misses if s.pattern in ("mla", "attention")}
    assert misses == (
        {"the cache holds expanded keys and values; a cache of the latents could be absorbed"}
        if model in EXPANDED_CACHE and phase != "prefill"
        else set()
    )
    assert_sound(job, outputs)


def case_id(case: tuple[str, ...]) -> str:
    return "-".join(case)


@pytest.mark.parametrize("case", [c for c in ALL if c in CI], ids=case_id)
def test_latent_attention(case: tuple[str, str, str, str]) -> None:
    check(*case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [c for c in ALL if c not in CI], ids=case_id)
def test_latent_attention_full_grid(case: tuple[str, str, str, str]) -> None:
    check(*case)


@pytest.mark.parametrize("phase", ["decode", "static"])
def test_the_cache_is_never_expanded(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the rewritten decode graph is as large as the keys, or the values, of all tokens and heads."""
    graphs: list[GraphModule] = []

    def recorded(*args: Any) -> Transformed:
        graphs.append((made := transform(*args)).graph)
        return made

    monkeypatch.setattr(sm12x_compile.backend, "transform", recorded)
    job = workload("deepseek_v3", phase, batch=2, seq=40)  # type: ignore[arg-type]
    run_compiled(job)
    config = family("deepseek_v3").config
    per_token = config["num_attention_heads"] * min(config["qk_nope_head_dim"], config["v_head_dim"])
    for graph in graphs[1:] if phase == "decode" else graphs:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node.op == "call_function":
                rows = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape]
                of_all_tokens = rows[:1] == [2] and max(rows) >= 40  # weights have no batch of 2
                assert not (of_all_tokens and math.prod(rows) >= 2 * 40 * per_token), node.format_node()


def test_the_untouched_graph_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without the pattern the large tensors are there."""
    monkeypatch.setattr(
        "tests.hf.test_latent_attention.run_compiled",
        lambda job: job.run(
            torch.compile(
                job.model, backend=sm12x_compile.sm12x, options={"codegen": "eager", "patterns": ["attention"]}
            )
        ),
    )
    torch._dynamo.reset()
    with pytest.raises(AssertionError):
        test_the_cache_is_never_expanded("static", monkeypatch)
