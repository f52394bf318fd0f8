"""One graph a phase for mixtures of experts, whatever experts they run: counted by the backend, not by Dynamo.

Dynamo's own counter misses a kind of break. Expected graphs: 1 for a prompt; 3 with a cache that grows (prompt,
first token, every further token); 1 with a static cache, even where a sliding layer comes to be full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sm12x_compile

from .experts import DENSE, FAMILIES, Phase, build, build_switch, calls, switch_calls, with_random_weights

IMPLEMENTATIONS = (None, "eager")
PHASES: tuple[Phase, ...] = ("prompt", "dynamic", "static")
GRAPHS = {"prompt": 1, "dynamic": 3, "static": 1}
CASES = [
    (name, experts, phase)
    for name in FAMILIES for experts in IMPLEMENTATIONS for phase in PHASES if not (experts and name in DENSE)
]  # fmt: skip
# Families whose experts are written in different ways; one phase each.
CI = [
    ("mixtral", "eager", "prompt"), ("gpt_oss", "eager", "static"), ("longcat_flash", None, "prompt"),
    ("deepseek_v3", "eager", "prompt"), ("qwen3_moe", "eager", "dynamic"), ("phimoe", "eager", "prompt"),
    ("granitemoe", None, "prompt"), ("hunyuan_v1_moe", "eager", "prompt"),
]  # fmt: skip


def check(model: Any, phase: Phase, run: Callable[[Any, Phase, Any], Iterator[Tensor]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad():
        with sm12x_compile.collect() as report:
            got = list(run(model, phase, compiled))
        wanted = list(run(model, phase, model))
    assert report.graphs == GRAPHS[phase], (report.recompiles, report.graph_breaks)
    assert not report.graph_breaks
    assert not any("left as it is" in line for line in report.code_rewrites)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "experts", "phase"), CI, ids=lambda v: str(v))
def test_graphs(name: str, experts: str | None, phase: Phase) -> None:
    check(build(name, experts), phase, calls)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "experts", "phase"), [c for c in CASES if c not in CI], ids=lambda v: str(v)
)
def test_graphs_of_all(name: str, experts: str | None, phase: Phase) -> None:
    check(build(name, experts), phase, calls)


@pytest.mark.parametrize("name", ["mixtral", "longcat_flash"])
def test_a_full_graph_can_be_demanded(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, "eager" if name == "mixtral" else None)
    options = {"codegen": "eager"}
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options=options, fullgraph=True)
    with torch.no_grad():
        (got,), (wanted,) = (list(calls(model, "prompt", f)) for f in (compiled, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phase", ["static", *(pytest.param(p, marks=pytest.mark.nightly) for p in PHASES[:2])])
def test_graphs_of_an_encoder_and_a_decoder(phase: Phase) -> None:
    check(build_switch(), phase, switch_calls)


def state(cache: Any) -> list[tuple[int, Tensor, Tensor]]:
    """What a static cache holds: for each layer its length, keys and values."""
    return [(layer.get_seq_length(), layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("gemma3_text", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_64_steps_across_the_window(name: str, codegen: str) -> None:
    """A static cache from before its sliding layers are full (8 positions) to long after: one graph, eager's state."""
    model = build(name, None)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": codegen})

    def steps(forward: Any) -> Iterator[tuple[Tensor, list[tuple[int, Tensor, Tensor]]]]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=72)
        logits = model(torch.tensor([[7, 11, 13], [5, 17, 19]]), past_key_values=cache).logits[:, -1:]
        for _ in range(64):
            logits = forward(logits.argmax(-1), past_key_values=cache).logits
            yield logits, state(cache)

    with torch.no_grad(), sm12x_compile.collect() as report:
        for (got, ours), (wanted, theirs) in zip(steps(compiled), steps(model), strict=True):
            assert torch.equal(got.argmax(-1), wanted.argmax(-1))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert report.graphs == 1, report.recompiles
    assert not any("left as it is" in line for line in report.code_rewrites)
    assert len(report.rewritten) == len(report.sites) > 0


def build_compressing(experts: str | None) -> Any:
    """A family whose cache closes a window every 4 or 8 tokens: the lengths of its buffers are its state."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    config = transformers.AutoConfig.for_model(
        "deepseek_v4", vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=8, o_groups=2,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
        max_position_embeddings=256, sliding_window=8, layer_types=list(rates), compress_rates=rates, index_topk=8,
        index_head_dim=16, index_n_heads=2, hc_mult=2, num_hash_layers=1, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return with_random_weights(config, experts)


@pytest.mark.nightly
@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
def test_a_prompt_of_a_compressing_cache(experts: str | None) -> None:
    check(build_compressing(experts), "prompt", calls)


@pytest.mark.nightly
def test_a_compressing_cache_is_beyond_the_limit() -> None:
    """Each length of its buffers is a computation of its own (empty, one, open, closing; of two rates; with no entry
    yet, one, many), which are more than Dynamo's limit: a loud word, and eager's results."""
    model = build_compressing(None)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(1))

    def steps(forward: Any) -> Iterator[Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        yield forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        for k in range(9):
            yield forward(input_ids=ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), pytest.warns(UserWarning, match="EAGER MODE"), sm12x_compile.collect() as report:
        for got, wanted in zip(steps(compiled), steps(model), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert report.graphs == torch._dynamo.config.recompile_limit
    assert any("buffer_kv" in line for line in report.warnings)
