"""Traps around the backend: dtypes, copies, export, other backends, random numbers, failures inside it, threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sm12x_compile
from sm12x_compile import registry

from .trapping import (
    SelfAttention,
    assert_same,
    attend,
    attention_count,
    causal,
    check,
    compiled,
    everything,
    heads,
)


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def registered():
    """Whatever a test registers is forgotten again."""
    patterns, kernels = dict(registry._patterns), {op: list(k) for op, k in registry._kernels.items()}
    yield
    registry._patterns.clear()
    registry._patterns.update(patterns)
    registry._kernels.clear()
    registry._kernels.update(kernels)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_floating_dtypes(dtype: torch.dtype):
    inputs = tuple(x.to(dtype) for x in heads())
    check(attend, inputs, sites=1, tolerance=8 * torch.finfo(dtype).eps)


def test_fp64_stays_fp64():
    inputs = tuple(x.double() for x in heads())
    check(attend, inputs, tolerance=1e-12)


def test_mixed_dtypes():
    q, k, v = heads()
    check(
        lambda q, k, v: attend(q, k.to(q.dtype), v.to(q.dtype)), (q, k.half(), v.bfloat16()), tolerance=1e-5
    )
    check(lambda q, k, v: attend(q.double(), k.double(), v.double()).float(), (q, k, v), tolerance=1e-6)


def test_complex_and_integer_inputs():
    def function(q, k, v):
        pair = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
        scores = (pair @ torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous()).mH).real
        return scores.softmax(-1) @ v

    check(function, heads())
    ids = torch.randint(0, 7, (2, 2, 5, 4))
    check(lambda i: attend(i.float(), (i * 2).float(), i.float()) + i, (ids,))
    check(lambda i: (i @ i.mT).float().softmax(-1) @ i.float(), (ids,))


def test_errors_of_eager_stay_errors():
    q, k, v = heads()
    for wrong in ((q, k.half(), v), (q, k, v[:, :, :3])):
        with pytest.raises(RuntimeError):
            attend(*wrong)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            compiled(attend)(*wrong)


# Copies, export, pickle


def test_copies_and_pickles():
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    expected = model(x)
    step = compiled(model)
    torch.testing.assert_close(step(x), expected)
    torch.testing.assert_close(copy.deepcopy(step)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    buffer.seek(0)
    other = compiled(SelfAttention())
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(x), expected)


def test_export_before_and_after():
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    expected = model(x)
    torch.testing.assert_close(compiled(model)(x), expected)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert not any("sm12x" in str(n.target) for n in exported.graph.nodes)
    check(exported.module(), (x,), sites=1)


def test_other_backends_are_not_touched():
    compiled(attend)(*heads())
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(attend, backend=spy)(*heads()), attend(*heads()))
    assert seen and not any("sm12x" in target for target in seen)


def test_compiled_inside_compiled():
    inner = compiled(attend)
    check(lambda q, k, v: inner(q, k, v) * 2, heads())


def test_disabled_inside():
    @torch._dynamo.disable
    def outside(q, k, v):
        return attend(q, k, v)

    check(lambda q, k, v: outside(attend(q, k, v), k, v), heads(), sites=1)


def test_arguments_and_results_of_all_kinds():
    class Block(nn.Module):
        def forward(self, batch, *, mask=None, flag=True, name="x"):
            out = attend(batch["q"], *batch["kv"], mask)
            return {"out": out, "again": [out, None, name], "shape": out.shape, "flag": flag}

    q, k, v = heads()
    model = Block()
    for kwargs in ({}, {"mask": causal(5)}, {"flag": False, "mask": None}):
        torch._dynamo.reset()
        expected, found = (f({"q": q, "kv": (k, v)}, **kwargs) for f in (model, compiled(model)))
        torch.testing.assert_close(found["out"], expected["out"])
        assert found["again"][0] is found["out"] and found["again"][1:] == [None, "x"]
        assert found["shape"] == expected["shape"] and found["flag"] == expected["flag"]


# Threads


def test_two_threads():
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                model, x = SelfAttention(), torch.randn(2, 4 + seed, 8)
                step = compiled(model)
                for _ in range(3):
                    torch.testing.assert_close(step(x), model(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# Random numbers


def test_dropout_in_training_follows_the_generator():
    class Dropped(nn.Module):
        def forward(self, q, k, v):
            weights = F.dropout((q @ k.mT).softmax(-1), 0.5, training=self.training)
            return weights @ v

    model = Dropped().train()
    torch._dynamo.reset()
    expected = everything(model, [heads(), heads()], model)
    with sm12x_compile.collect() as report:
        assert_same(everything(compiled(model), [heads(), heads()], model), expected)
    assert attention_count(report) == 0


def test_sdpa_dropout_is_left():
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), heads(), sites=0)


def test_random_ops_around_an_attention():
    def function(q, k, v):
        noise = torch.rand(q.shape[2], k.shape[2])
        out = attend(q + torch.randn_like(q), k, v, noise < 0.9)
        return out + torch.rand_like(out)

    check(function, heads(), heads(seed=1))


# Failures inside


def raising(*args, **kwargs):
    raise ZeroDivisionError("injected")


def said(report: sm12x_compile.Report, *words: str) -> bool:
    """Whether a warning or a site's reason holds all the words."""
    sentences = [*report.warnings, *(f"{s.pattern}: {s.reason}" for s in report.sites if s.reason)]
    return any(all(word in sentence for word in words) for sentence in sentences)


@pytest.mark.parametrize("stage", ["normalize", "recognise", "lower", "clean"])
def test_stage_that_raises(stage: str, monkeypatch: pytest.MonkeyPatch):
    """The graph is left as Dynamo gave it, the numbers are right, and the report says why."""
    monkeypatch.setattr(f"sm12x_compile.pipeline.{stage}", raising)

    def function(q, k, v, cache):
        cache[:, :, :1] = k[:, :, :1]
        return attend(q, cache, v)

    q, k, v = heads()
    report = check(function, (q, k, v, torch.zeros(2, 2, 5, 4)), sites=0)
    assert report.sites == [] and said(report, "left as it is", "injected"), report.warnings
    monkeypatch.undo()
    check(function, (q, k, v, torch.zeros(2, 2, 5, 4)), sites=1)


def test_matcher_that_raises_in_the_middle(monkeypatch: pytest.MonkeyPatch):
    """What a pattern had added to the graph before it failed is taken out again."""
    original, calls = sm12x_compile.GraphView.arrange, []

    def arrange(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raising()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(sm12x_compile.GraphView, "arrange", arrange)
    report = check(lambda q, k, v: attend(attend(q, k, v), k, v), heads(), sites=1)
    assert len(calls) > 2 and said(report, "injected"), str(report)


@pytest.mark.usefixtures("registered")
def test_built_in_pattern_that_raises():
    sm12x_compile.register_pattern("attention", anchors=[torch.ops.aten.softmax.int], merit=0)(raising)
    assert said(check(attend, heads(), sites=0), "attention", "injected")


@pytest.mark.usefixtures("registered")
def test_outside_pattern_that_raises():
    # The broken pattern is reported; the built-in one still runs.
    sm12x_compile.register_pattern("broken", anchors=[torch.ops.aten.softmax.int])(raising)
    assert said(check(attend, heads(), sites=1), "broken", "injected")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("answer", [42, "yes", torch.ones(1)], ids=["int", "str", "tensor"])
def test_outside_pattern_that_answers_nonsense(answer: object):
    def nonsense(anchor, graph):
        return answer

    sm12x_compile.register_pattern("nonsense", anchors=[torch.ops.aten.softmax.int])(nonsense)
    assert said(check(attend, heads(), sites=1), "nonsense")


@pytest.mark.usefixtures("registered")
def test_outside_pattern_that_leaves_litter():
    # Nodes that a pattern adds and then does not use must not stay, nor reads that forbid other patterns.
    def litter(anchor, graph):
        with graph.graph.inserting_before(anchor):
            graph.call(torch.ops.aten.add.Tensor, anchor.args[0], 1.0)
        return sm12x_compile.Refusal("only looking around here", anchor)

    sm12x_compile.register_pattern("litter", anchors=[torch.ops.aten.softmax.int])(litter)
    assert said(check(attend, heads(), sites=1), "litter", "only looking")


@pytest.mark.usefixtures("registered")
def test_outside_kernel_whose_accepts_raises():
    @sm12x_compile.register_kernel("attention", "tests.broken", accepts=raising)
    def broken(*args, **kwargs):
        raise AssertionError("must not run")

    (site,) = check(attend, heads(), sites=1).rewritten
    assert site.kernel != "tests.broken"
    assert any(name == "tests.broken" and "injected" in why for name, why in site.refused), site.refused


@pytest.mark.usefixtures("registered")
def test_outside_kernel_that_declines():
    no = registry.No("only on Sundays")

    @sm12x_compile.register_kernel("attention", "tests.sunday", accepts=lambda call, arch: no)
    def sunday(*args, **kwargs):
        raise AssertionError("must not run")

    (site,) = check(attend, heads(), sites=1).rewritten
    assert ("tests.sunday", "only on Sundays") in site.refused


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_mode(mode: str):
    step = torch.compile(attend, backend=sm12x_compile.sm12x, mode=mode)
    torch.testing.assert_close(step(*heads()), attend(*heads()))


def test_unknown_option_is_an_error_that_lists_the_known():
    step = torch.compile(attend, backend=sm12x_compile.sm12x, options={"codgen": "eager"})
    with pytest.raises(Exception, match=r"did you mean 'codegen'.*known options"):
        step(*heads())
