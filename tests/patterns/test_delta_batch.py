"""The gated delta rule with a batch that the compiler keeps open, and sizes that must be known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import sm12x_compile
from tests.handwritten.cases import Case, Draw, calls, make
from tests.handwritten.delta_forms import DELTA_FORMS
from tests.handwritten.delta_rules import DELTA_RULES

OPEN = (
    "one_step_that_returns_its_state", "loop_over_tokens_stacked", "loop_with_norms_and_einsum",
    "chunks_with_a_triangular_solve", "channels_loop_over_tokens", "householder", "factors_from_a_sigmoid",
)  # fmt: skip
CASES = [case for case in (*DELTA_RULES, *DELTA_FORMS) if case.name in OPEN]


def compiled(function: Any) -> Any:
    options = {"codegen": "eager", "capture": False}
    return torch.compile(function, backend=sm12x_compile.sm12x, options=options, fullgraph=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_graph_for_every_batch(case: Case) -> None:
    function, inputs = make(case, torch.float32)
    forward = compiled(function)
    with torch.no_grad(), sm12x_compile.collect() as report:
        for seed, B in enumerate((3, 5, 2)):
            arguments = calls(inputs, Draw(torch.float32, seed, B=B))[0]
            for x in arguments:
                torch._dynamo.mark_dynamic(x, 0)
            for ours, eager in zip(tree_leaves(forward(*arguments)), tree_leaves(function(*arguments)), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert report.graphs == 1 and report.count("gated_delta_rule") == 1 and not report.near_misses, report


class Buffered(nn.Module):
    """A decoding step on a cache that the caller hands in."""

    def forward(self, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        decayed = state * g.exp()[..., None, None]
        error = (v - (decayed * k[..., None]).sum(2)) * beta[..., None]
        new = decayed + k[..., None] * error[:, :, None]
        state.copy_(new)
        return (new * q[..., None]).sum(2)


def step(B: int, H: int) -> list[torch.Tensor]:
    q, k = torch.randn(2, B, H, 4).unbind(0)
    return [q, k, torch.randn(B, H, 6), -torch.rand(B, H), torch.rand(B, H), torch.randn(B, H, 4, 6)]


def test_a_state_in_place_with_an_open_batch() -> None:
    forward = compiled(Buffered())
    with torch.no_grad(), sm12x_compile.collect() as report:
        for B in (3, 5):
            arguments = step(B, 3)
            theirs = copy.deepcopy(arguments)
            for x in arguments:
                torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(forward(*arguments), Buffered()(*theirs), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(arguments[-1], theirs[-1], rtol=1e-4, atol=1e-4)
    (site,) = report.rewritten
    assert report.graphs == 1 and site.tags["state"] == "in place"


def test_open_heads_are_refused_in_words() -> None:
    forward = compiled(Buffered())
    arguments = step(2, 3)
    for x in arguments:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad(), sm12x_compile.collect() as report:
        forward(*arguments)
    assert not report.rewritten
    assert any("mark_static" in (s.reason or "") for s in report.near_misses), report
