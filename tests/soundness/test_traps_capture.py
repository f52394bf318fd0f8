"""Traps of what is captured: higher-order ops, autocast, gradients, graph breaks, dynamic shapes, export."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sm12x_compile

from .trapping import SelfAttention, attend, attention_count, causal, check, compiled, heads


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest):
    torch._dynamo.reset()
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield
    torch._dynamo.reset()


# Higher-order operators


def test_cond():
    def function(flag, q, k, v):
        out = attend(q, k, v)
        return torch.cond(flag, lambda a: attend(a, k, v), lambda a: a * 2.0, (out,))

    check(function, (torch.tensor(True), *heads()), (torch.tensor(False), *heads()))


def test_cond_only():
    def function(flag, q, k, v):
        return torch.cond(
            flag.sum() > 1, lambda *a: attend(*a), lambda *a: attend(a[0], a[2], a[1]), (q, k, v)
        )

    check(function, (torch.tensor([2]), *heads()), (torch.tensor([0]), *heads()))


@pytest.mark.parametrize("name", ["inference", "gradient"])
def test_checkpoint(name: str):
    model, x = SelfAttention(), torch.randn(2, 5, 8)

    def function(x):
        return checkpoint(model, x, use_reentrant=False).sum()

    expected, found = function(x), compiled(function)(x)
    torch.testing.assert_close(found, expected)
    if name == "gradient":
        (wanted,) = torch.autograd.grad(expected, [model.qkv.weight])
        (given,) = torch.autograd.grad(found, [model.qkv.weight])
        torch.testing.assert_close(given, wanted)


def test_vmap_then_an_ordinary_graph():
    def function(q, k, v):
        return torch.vmap(lambda a, b, c: attend(a, b, c))(q, k, v)

    check(function, heads())
    # A failed retrace must not leave a functorch level behind.
    assert torch._C._functorch.maybe_current_level() is None
    check(attend, heads(), sites=1)


def test_vmap_over_a_mask_function():
    def function(q, k, v):
        n = torch.arange(q.shape[2])
        mask = torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(n, n)
        return attend(q, k, v, mask)

    check(function, heads())
    check(attend, heads(), sites=1)


def test_functional_call_and_grad_inside():
    def function(q, k, v):
        slope = torch.func.grad(lambda a: attend(a, k, v).sum())(q)
        return attend(q, k, v) + slope

    check(function, heads(), tolerance=1e-4)


def test_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def function(q, k, v):
        return flex.flex_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf"))
        )

    inputs = heads(B=1, H=2, S=16, D=16)
    try:
        torch.compile(function, backend="eager")(*inputs)
    except Exception as error:
        pytest.skip(f"flex_attention does not run here: {error}")
    torch._dynamo.reset()
    check(function, inputs, tolerance=1e-4)
    check(attend, heads(), sites=1)


def test_map_and_attention_side_by_side():
    def function(q, k, v):
        return attend(q, k, v) + torch.stack([attend(x[None], k[:1], v[:1])[0] for x in q])

    check(function, heads(), sites=3)


# Autocast


def autocast_bound(function, inputs, context) -> float:
    """How far eager under autocast lies from fp32: ours may lie twice as far, and one bf16 ulp more."""
    plain = function(*inputs).float()
    with context():
        cast = function(*inputs).float()
    return 2 * float((cast - plain).abs().max()) + torch.finfo(torch.bfloat16).eps * float(plain.abs().max())


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def check_autocast(function, inputs, context=bf16) -> sm12x_compile.Report:
    with context():
        expected = function(*inputs)
        with sm12x_compile.collect() as report:
            found = compiled(function)(*inputs)
    assert found.dtype == expected.dtype
    error = float((found.float() - function(*inputs).float()).abs().max())
    assert error <= autocast_bound(function, inputs, context)
    return report


def test_autocast_ambient():
    check_autocast(attend, heads())
    check_autocast(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads())
    model = SelfAttention()
    check_autocast(lambda x: model(x), (torch.randn(2, 5, 8),))


def test_autocast_inside():
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(q, k, v)
        return attend(out.float(), k, v)

    check(function, heads(), tolerance=2e-2)


def test_autocast_nested_and_switched_off():
    def function(q, k, v):
        with torch.autocast("cpu", enabled=False):
            scores = q.float() @ k.float().mT
        return scores.softmax(-1) @ v

    check_autocast(function, heads())
    check_autocast(lambda q, k, v: function(q.bfloat16(), k, v), heads())


def test_autocast_then_none():
    # The two calls are two compiles; neither may serve the other.
    step = compiled(attend)
    with bf16():
        assert step(*heads()).dtype == attend(*heads()).dtype == torch.bfloat16
    torch.testing.assert_close(step(*heads()), attend(*heads()))


# Gradients


def test_gradient_of_a_model_is_left_alone_and_said(caplog: pytest.LogCaptureFixture):
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    with caplog.at_level(logging.WARNING, "sm12x_compile"), sm12x_compile.collect() as report:
        compiled(model)(x).sum().backward()
    given = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad)
    assert attention_count(report) == 0
    assert any("grad" in w for w in report.warnings), report.warnings
    assert all(s.status == "left" for s in report.sites), str(report)


def test_gradient_warning_comes_once():
    with sm12x_compile.collect() as report:
        for _ in range(2):
            torch._dynamo.reset()
            compiled(SelfAttention())(torch.randn(2, 5, 8))
    assert sum("grad" in w for w in report.warnings) == 1, report.warnings


def test_gradient_of_the_inputs():
    inputs = tuple(x.requires_grad_() for x in heads())
    wanted = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    given = torch.autograd.grad(compiled(attend)(*inputs).square().sum(), inputs)
    torch.testing.assert_close(given, wanted)


def test_gradient_mode_without_anything_that_needs_one():
    check(attend, heads(), sites=1)


def test_gradient_after_inference():
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    step = compiled(model)
    with torch.no_grad(), sm12x_compile.collect() as report:
        torch.testing.assert_close(step(x), model(x))
    assert attention_count(report) == 1
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    given = torch.autograd.grad(step(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(given, wanted)
    with torch.no_grad():
        assert not step(x).requires_grad


def test_gradient_switched_off_inside():
    model = SelfAttention()

    def function(x):
        with torch.no_grad():
            first = model(x)
        return model(first)

    x = torch.randn(2, 5, 8)
    wanted = torch.autograd.grad(function(x).sum(), list(model.parameters()))
    given = torch.autograd.grad(compiled(function)(x).sum(), list(model.parameters()))
    torch.testing.assert_close(given, wanted)


def test_grad_switched_on_inside():
    model = SelfAttention()

    def function(x):
        with torch.enable_grad():
            return model(x)

    x = torch.randn(2, 5, 8)
    wanted, given = function(x), compiled(function)(x)
    torch.testing.assert_close(given, wanted)
    assert given.requires_grad == wanted.requires_grad
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(given.sum(), [model.qkv.weight])
        (wanted_slope,) = torch.autograd.grad(wanted.sum(), [model.qkv.weight])
    torch.testing.assert_close(slope, wanted_slope)


def test_detached_values_gradient():
    def function(q, k, v):
        return attend(q.detach(), k, v.detach())

    q, k, v = (x.requires_grad_() for x in heads())
    (wanted,) = torch.autograd.grad(function(q, k, v).sum(), [k])
    (given,) = torch.autograd.grad(compiled(function)(q, k, v).sum(), [k])
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_inference_mode(codegen: str):
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    with torch.inference_mode(), sm12x_compile.collect() as report:
        torch.testing.assert_close(compiled(model, codegen=codegen)(x), model(x))
    assert attention_count(report) == 1


def test_inference_tensors_then_plain_ones():
    with torch.inference_mode():
        made = heads()
    step = compiled(attend)
    with torch.inference_mode():
        torch.testing.assert_close(step(*made), attend(*made))
    torch.testing.assert_close(step(*made), attend(*made))
    torch.testing.assert_close(step(*heads()), attend(*heads()))


# Several graphs


def test_graph_break_in_the_middle():
    def function(q, k, v):
        out = attend(q, k, v)
        torch._dynamo.graph_break()
        return attend(out, k, v)

    report = check(function, heads(), sites=2)
    assert report.graphs == 2
    assert sorted(s.graph for s in report.rewritten) == [0, 1]
    assert report.graph_breaks


def test_graph_break_between_scores_and_values():
    def function(q, k, v):
        p = (q @ k.mT).softmax(-1)
        torch._dynamo.graph_break()
        return p @ v

    check(function, heads(), sites=0)


def test_data_dependent_output():
    def function(q, k, v):
        out = attend(q, k, v)
        if out.sum().item() > 0:
            out = out + 1
        return out[out > 0.5], out.argmax()

    check(function, heads(), heads(seed=1))


# Shapes


def self_causal(q, k, v):
    return attend(q, k, v, causal(q.shape[2]))


@pytest.mark.parametrize("function", [attend, self_causal])
def test_automatic_dynamic_shapes(function):
    report = check(function, *(heads(S=n) for n in (5, 6, 7, 9, 64, 3)))
    assert report.graphs <= 2
    assert attention_count(report) == report.graphs


@pytest.mark.parametrize("function", [attend, self_causal])
def test_full_graph_dynamic(function):
    # Every size is symbolic, head_dim and so the scale as well: that may be refused.
    check(function, *(heads(S=n) for n in (5, 8, 3, 17)), fullgraph=True, dynamic=True)
    check(function, heads(), heads(B=3, H=5, S=7, D=6), fullgraph=True, dynamic=True)


def test_full_graph_dynamic_layer():
    model, calls = SelfAttention(), [(torch.randn(b, n, 8),) for b, n in ((2, 5), (3, 8), (4, 3))]
    report = check(model, *calls, fullgraph=True, dynamic=True)
    assert attention_count(report) == report.graphs == 1


def test_dynamic_lengths_that_become_one():
    check(self_causal, *(heads(S=n) for n in (4, 6, 1, 2)))


def test_dynamic_batch_heads_and_lengths():
    shapes = ((2, 2, 5, 4), (3, 2, 5, 4), (3, 4, 5, 4), (1, 4, 7, 4), (4, 3, 7, 8))
    check(self_causal, *(heads(B=b, H=h, S=s, D=d) for b, h, s, d in shapes))


def test_marked_dynamic():
    q, k, v = heads(S=6)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    step = compiled(self_causal)
    with sm12x_compile.collect() as report:
        for inputs in ((q, k, v), heads(S=9), heads(S=12)):
            torch.testing.assert_close(step(*inputs), self_causal(*inputs))
    assert attention_count(report) == report.graphs == 1


def test_dynamic_keys_under_a_fixed_number_of_queries():
    def bottom_right(q, k, v):
        n, m = q.shape[2], k.shape[2]
        return attend(q, k, v, torch.ones(n, m, dtype=torch.bool).tril(m - n))

    def top_left(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q = heads(S=3)[0]
    for function in (bottom_right, top_left):
        check(function, *((q, *heads(S=n)[1:]) for n in (5, 6, 9, 2)))


def test_groups_that_are_dynamic():
    def function(q, k, v):
        groups = q.shape[1] // k.shape[1]
        return attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

    check(function, *((heads(H=h)[0], *heads(H=2)[1:]) for h in (2, 4, 6, 8)))
