"""The first call beside the user's own code: wrong kernels and wrong rewrites are found, and the model goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import sm12x_compile
from sm12x_compile import YES, GraphView, Refusal, Rewrite, register_kernel, register_pattern, registry
from sm12x_compile.arch import CARDS
from sm12x_compile.model_zoo import workload
from sm12x_compile.options import Options
from sm12x_compile.race.verify import Disagreement, Verification, verifies
from sm12x_compile.report import Report

aten = torch.ops.aten
OPTIONS = {"codegen": "eager", "verify": True}


class Layers(nn.Module):
    """Two attentions, a cache that is written, and a number that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, 12, 8))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.cache.index_copy_(2, at, x)
        for _ in range(2):
            x = x + torch.softmax(x @ self.cache.mT * 0.3, -1) @ self.cache
        return x + 0.1 * torch.rand_like(x)


def run(options: dict[str, Any], calls: int = 2) -> tuple[list[Tensor], Tensor, Report, list[str]]:
    """Outputs, the cache afterwards, the report and the warnings."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layers()
    inputs = [(torch.randn(1, 2, 3, 8), torch.arange(3 * k, 3 * k + 3)) for k in range(calls)]
    compiled = torch.compile(model, backend="sm12x", options=options) if options else model
    with torch.no_grad(), sm12x_compile.collect() as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [compiled(*given) for given in inputs]
    return outputs, model.cache, report, [str(w.message) for w in caught if "sm12x" in str(w.message)]


def same(found: Any, expected: Any) -> bool:
    return all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True)
    )


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_model_that_agrees_is_run_once_and_left_alone(codegen: str) -> None:
    found = run({**OPTIONS, "codegen": codegen})
    report = found[2]
    assert len(report.rewritten) == 2 and found[3] == []
    assert len(report.verified) == 1 and report.verified[0].startswith("2 site(s) agree with the model's own code")
    # Nothing was written twice. Inductor draws other numbers than eager.
    assert same(found, run({})) or (codegen == "inductor" and torch.allclose(found[1], run({})[1]))
    assert "verified: 2 site(s)" in str(report)


def attention(run: Callable[..., Tensor], inline: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float, *args: Any, **rest: Any) -> Tensor:
        return run(q, k, v, scale).transpose(1, 2).contiguous().transpose(1, 2)

    register_kernel("attention", "mine", accepts=lambda call, arch: YES, inline=inline)(function)


def slightly_wrong(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale * 1.1)


def without_the_last_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1], scale=scale)


def nan(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) * torch.nan


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("wrong", [slightly_wrong, without_the_last_key, nan])
def test_a_wrong_kernel_is_found(wrong: Callable[..., Tensor], inline: bool) -> None:
    attention(wrong, inline)
    expected = run({})
    assert not same(run({**OPTIONS, "verify": False}), expected)  # so it would go, without
    found = run(OPTIONS)
    assert same(found, expected)
    (said,) = found[3]
    assert "attention, computed by mine" in said and "kernels" in said
    assert found[2].warnings == [said]


def test_a_kernel_that_raises() -> None:
    def raising(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        raise RuntimeError("no such instruction")

    attention(raising, inline=False)
    found = run(OPTIONS)
    assert same(found, run({})) and "no such instruction" in found[3][0]


def test_a_wrong_rewrite_is_found() -> None:
    @register_pattern("careless", anchors=[aten.softmax.int])
    def careless(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
        """Takes softmax over the last dimension for softmax over the one before."""
        with graph.graph.inserting_before(anchor):
            call = graph.call(aten.softmax.int, anchor.args[0], -2)
        return Rewrite(anchor, call, call)

    try:
        found = run({**OPTIONS, "patterns": ["careless"]})
        assert same(found, run({})) and "careless" in found[3][0]
        assert not same(run({**OPTIONS, "patterns": ["careless"], "verify": False}), run({}))
    finally:
        sm12x_compile.unregister("careless")


def test_what_is_written_wrongly_is_found() -> None:
    def graph(factor: float) -> GraphModule:
        def step(x: Tensor, state: Tensor) -> Tensor:
            state.copy_(state + factor * x)
            return x

        return make_fx(step)(torch.ones(3), torch.zeros(3))

    state = torch.zeros(3)
    assert Verification(graph(1.0), graph(1.0)).run([torch.ones(3), state]) == (0, 0.0)
    with pytest.raises(Disagreement, match="what is written to state_1 is off by"):
        Verification(graph(1.0), graph(1.1)).run([torch.ones(3), state])
    assert state.count_nonzero() == 0


@pytest.mark.nightly
def test_a_kernel_that_forgets_its_state_is_found() -> None:
    """The step of a linear attention, whose state lies in the cache; a kernel that forgets to write it."""
    job = workload("qwen3_next", "static", seq=8, dtype=torch.float32, layers=4)

    def outputs(**options: Any) -> tuple[list[Tensor], Report]:
        torch._dynamo.reset()
        compiled = torch.compile(job.model, backend="sm12x", options={**OPTIONS, **options})
        with sm12x_compile.collect() as report, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return job.run(compiled), report

    right, report = outputs()
    assert report.verified and not report.warnings
    found = {site.op.split("::")[1]: site for site in report.rewritten if site.op}
    op = "gated_delta_rule_update" if "gated_delta_rule_update" in found else "gated_delta_rule"
    first = registry.kernels(op)

    def forgetful(*args: Any) -> Any:
        result = sm12x_compile.ops.OPS[op].reference(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        return (result[0], result[1] * 0.5) if isinstance(result, tuple) else result

    register_kernel(op, "mine", accepts=lambda call, arch: YES)(forgetful)
    assert registry.kernels(op)[0].name == "mine" != first[0].name
    again, report = outputs()
    assert report.warnings and not report.verified
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, right, strict=True))


def test_when_it_is_on() -> None:
    for verify, cpu, hopper, card in (("auto", False, False, True), (True, True, True, True), (False,) * 4):
        options = Options.parse({"verify": verify})
        archs = (CARDS["cpu"], CARDS["h200"], CARDS["gb10"])
        assert tuple(verifies(options, arch) for arch in archs) == (cpu, hopper, card)
    assert run({"codegen": "eager"})[2].verified == []


@pytest.mark.parametrize(
    ("name", "phase", "dtype"),
    [
        pytest.param("llama", "static", torch.bfloat16, marks=pytest.mark.nightly),
        ("qwen3_next", "prefill", torch.bfloat16),
        pytest.param("llama", "decode", torch.float16, marks=pytest.mark.nightly),
        pytest.param("gpt_oss", "prefill", torch.bfloat16, marks=pytest.mark.nightly),
        pytest.param("deepseek_v3", "static", torch.float32, marks=pytest.mark.nightly),
        pytest.param("qwen3_moe", "static", torch.float16, marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_models_that_are_right_are_not_suspected(name: str, phase: Any, dtype: torch.dtype) -> None:
    job = workload(name, phase, dtype=dtype, layers=2 if phase == "prefill" else None)
    with sm12x_compile.collect() as report:
        job.run(torch.compile(job.model, backend="sm12x", options=OPTIONS))
    assert report.warnings == [] and len(report.verified) == sum(1 for _ in {s.graph for s in report.rewritten})
    sites = sum(int(line.split()[0]) for line in report.verified)
    assert sites == len(report.rewritten)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_symbolic_sizes_and_inference_mode(mode: Any) -> None:
    def step(x: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, : x.shape[2]] = x
        return torch.softmax(x @ cache.mT * 0.3, -1) @ cache

    compiled = torch.compile(step, backend="sm12x", dynamic=True, options={**OPTIONS, "select": "race"})
    with mode(), sm12x_compile.collect() as report:
        for tokens, slots in ((5, 40), (7, 56)):
            x, cache = torch.randn(1, 2, tokens, 16), torch.randn(1, 2, slots, 16)
            expected_cache = cache.clone()
            expected = step(x, expected_cache)
            torch.testing.assert_close(compiled(x, cache), expected)
            torch.testing.assert_close(cache, expected_cache)
    assert report.warnings == [] and report.verified and report.races
