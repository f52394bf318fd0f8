"""Every linear attention and its convolution, site by site: captured, and by the patterns alone.

The prompt comes in one piece, then in a second piece with a state, then token by token with either cache. Bounds, with
`truth` the same weights in fp64: our error is at most twice that of eager in norm, four times at its largest (which
varies more), plus 2e-6. The linear layers amplify rounding (their norms divide by small numbers), so a bound on the
distance to eager would say little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor

import sm12x_compile
from sm12x_compile.model_zoo import VOCAB, build
from sm12x_compile.report import Report

Cache = Literal["none", "dynamic", "static"]
# Linear layers, the tags of their recurrence, and value heads a head of q and k.
MODELS: dict[str, tuple[int, dict[str, Any], int]] = {
    "qwen3_next": (3, {"decay": "head", "qk_l2norm": "rsqrt", "scale": 0.25}, 2),
    "qwen3_5": (3, {"decay": "head", "qk_l2norm": "rsqrt", "scale": 0.25}, 2),
    "qwen3_5_moe": (3, {"decay": "head", "qk_l2norm": "rsqrt", "scale": 0.25}, 2),
    "olmo_hybrid": (3, {"decay": "head", "qk_l2norm": "rsqrt", "scale": 0.25}, 1),
    "kimi_linear": (1, {"decay": "channel", "qk_l2norm": "sqrt", "scale": 0.25}, 1),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pieces(length: int, cache: Cache) -> list[tuple[int, int]]:
    """Bounds of the calls: a prompt, a second piece with a state, three tokens."""
    if cache == "none":
        return [(0, length)]
    return [(0, length), (length, length + 13), *((length + 13 + k, length + 14 + k) for k in range(3))]


def run(model: Any, forward: Callable[..., Any], cache: Cache, length: int) -> list[Tensor]:
    ids = torch.randint(5, VOCAB, (2, length + 16), generator=torch.Generator().manual_seed(length))
    outputs, held = [], new_cache(model, cache, length + 16)
    with torch.no_grad():
        for k, (begin, end) in enumerate(pieces(length, cache)):
            # As `generate` does: with a StaticCache the prompt runs in plain eager mode.
            call = model if cache == "static" and k == 0 else forward
            more = {"use_cache": False} if held is None else {"past_key_values": held, "use_cache": True}
            outputs.append(call(input_ids=ids[:, begin:end], **more).logits)
    return outputs


def new_cache(model: Any, cache: Cache, length: int) -> Any:
    if cache == "none":
        return None
    if cache == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def compiled(name: str, cache: Cache, length: int, dtype: torch.dtype = torch.float32, **options: Any) -> Report:
    """Compile, run all calls, compare with eager, and hand back the report."""
    model = build(name, dtype=dtype)
    forward = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager", **options})
    with sm12x_compile.collect() as report:
        ours = run(model, forward, cache, length)
    plain = run(model, model, cache, length)
    wide = copy.deepcopy(model)
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # grouped_mm has no fp64
    wide = wide.double()
    truth = run(wide, wide, cache, length)
    for mine, theirs, exact in zip(ours, plain, truth, strict=True):
        for norm, factor in ((2.0, 2.0), (float("inf"), 4.0)):
            error, bound, size = (torch.linalg.vector_norm(x, norm) for x in (mine - exact, theirs - exact, exact))
            assert error <= factor * bound + 2e-6 * size, f"{name}, {cache}:\n{report}"
    assert not report.graph_breaks
    return report


def expected(name: str, state: str) -> list[dict[str, Any]]:
    layers, tags, groups = MODELS[name]
    conv = {"pattern": "causal_conv1d", "window": 4, "activation": "silu"}
    conv |= {} if state == "zeros" else {"state": state}
    rule = {"pattern": "gated_delta_rule", **tags, "state": state}
    rule |= {"groups": groups} if groups > 1 else {}
    return [conv] * layers + [rule] * layers


def found(report: Report, graph: int) -> list[dict[str, Any]]:
    sites = [s for s in report.rewritten if s.graph == graph and s.pattern in ("causal_conv1d", "gated_delta_rule")]
    assert all(s.module for s in sites)
    return [{"pattern": s.pattern, **s.tags} for s in sites]


def check(name: str, cache: Cache, length: int, dtype: torch.dtype = torch.float32, **options: Any) -> Report:
    report = compiled(name, cache, length, dtype, **options)
    states = {"none": ["zeros"], "dynamic": ["zeros", "given", "in place"], "static": ["given", "in place"]}[cache]
    assert report.graphs == len(states), report
    for graph, state in enumerate(states):
        assert found(report, graph) == expected(name, state), f"graph {graph}:\n{report}"
    missed = {s.reason for s in report.near_misses if s.pattern in ("causal_conv1d", "gated_delta_rule")}
    assert not missed
    return report


OF_BOTH_DECAYS = ["qwen3_5", pytest.param("kimi_linear", marks=pytest.mark.nightly)]
ALL = [(name, cache) for name in MODELS for cache in ("none", "dynamic", "static")]
CI = [("qwen3_next", "dynamic"), ("qwen3_5", "static"), ("olmo_hybrid", "dynamic"), ("kimi_linear", "dynamic"),
      ("kimi_linear", "static"), ("qwen3_5_moe", "none")]  # fmt: skip


@pytest.mark.parametrize(("name", "cache"), CI)
def test_captured(name: str, cache: Cache):
    report = check(name, cache, 70)
    assert len(report.captures) == report.count("gated_delta_rule")


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "cache"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [2, 64, 100])
def test_captured_full_grid(name: str, cache: Cache, dtype: torch.dtype, length: int):
    check(name, cache, length, dtype)


@pytest.mark.parametrize(
    ("name", "length"), [("qwen3_5", 64), ("olmo_hybrid", 100), ("kimi_linear", 100), ("qwen3_5", 256)]
)
def test_patterns_alone(name: str, length: int):
    """With sizes that are known: what Dynamo makes symbolic after a change of length is refused without capture."""
    report = check(name, "static" if length == 100 else "none", length, capture=False)
    assert not report.captures


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "cache"), [case for case in ALL if case[1] != "dynamic"])
@pytest.mark.parametrize("length", [64, 100, 256, 512])
def test_patterns_alone_full_grid(name: str, cache: Cache, length: int):
    check(name, cache, length, capture=False)


@pytest.mark.parametrize("name", OF_BOTH_DECAYS)
def test_an_empty_static_cache_is_filled_in_a_compiled_graph(name: str):
    model = build(name)
    forward = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    ids, logits = torch.randint(5, VOCAB, (2, 73)), []
    with torch.no_grad(), sm12x_compile.collect() as report:
        for call in (forward, model):
            held = new_cache(model, "static", 80)
            pieces = (ids[:, :70], *(ids[:, k : k + 1] for k in range(70, 73)))
            logits.append([call(input_ids=x, past_key_values=held, use_cache=True).logits for x in pieces])
    for ours, eager in zip(*logits, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))
    assert [found(report, graph) for graph in range(report.graphs)] == [
        expected(name, "zeros"), expected(name, "in place")
    ]  # fmt: skip


def test_another_backend_in_the_same_process_sees_the_loops():
    """The control: without us the prompt is an unrolled loop."""
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model = build("qwen3_5")
    run(model, torch.compile(model, backend=backend), "none", 200)
    assert any("solve_triangular" in str(n.target) for gm in graphs for n in gm.graph.nodes)


def nodes_of_a_prompt(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Nodes of Dynamo's graph for a prompt."""
    torch._dynamo.reset()
    counts: list[int] = []
    compile_graph = sm12x_compile.backend._compile

    def counted(gm: Any, *rest: Any) -> Any:
        counts.append(len(gm.graph.nodes))
        return compile_graph(gm, *rest)

    monkeypatch.setattr(sm12x_compile.backend, "_compile", counted)
    model = build(name)
    run(model, torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"}), "none", length)
    monkeypatch.undo()
    (count,) = counts
    return count


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
def test_the_trace_does_not_grow_with_the_length(name: str, monkeypatch: pytest.MonkeyPatch):
    assert nodes_of_a_prompt(name, 70, monkeypatch) == nodes_of_a_prompt(name, 700, monkeypatch)


@pytest.mark.parametrize("name", OF_BOTH_DECAYS)
def test_two_graphs_for_all_lengths(name: str):
    model = build(name)
    forward = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        for length in (100, 129, 500, 1000, 64 * 20, 3000):
            ours, eager = run(model, forward, "none", length)[0], run(model, model, "none", length)[0]
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))
    assert report.graphs <= 2, report
    assert report.count("gated_delta_rule") == report.count("causal_conv1d") == MODELS[name][0] * report.graphs


@pytest.mark.parametrize("name", OF_BOTH_DECAYS)
def test_no_recompile_over_fifty_tokens(name: str):
    model = build(name)
    forward = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    token = torch.randint(5, VOCAB, (1, 1))
    with torch.no_grad(), sm12x_compile.collect() as report:
        model(input_ids=torch.randint(5, VOCAB, (1, 9)), past_key_values=cache, use_cache=True)
        for _ in range(50):
            forward(input_ids=token, past_key_values=cache, use_cache=True)
    assert report.graphs == 1 and not report.recompiles
