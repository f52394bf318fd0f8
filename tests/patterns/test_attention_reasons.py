"""Every sentence with which the attention pattern refuses, reached by ordinary code; and the numbers stay eager's."""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sm12x_compile
from sm12x_compile import patterns

INF = math.inf


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = randn(2, 2, 5, 4), randn(2, 2, 7, 4, seed=1), randn(2, 2, 7, 4, seed=2)
SQUARE = randn(2, 2, 5, 4, seed=3)
FAR = randn(5, 7, seed=4) > 0
BIAS = randn(5, 7, seed=5)
SINKS = randn(2, seed=6)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def finish(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def exponentials(q: Tensor, k: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-1, keepdim=True)).exp()


def normalised(denominator: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A softmax by hand over a denominator of one's own."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = exponentials(q, k)
        return (e / denominator(e)) @ v

    return function


def column(z: Tensor, s: Tensor) -> Tensor:
    """A logit a head as one more column of the scores."""
    return z[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)


def column_not_shifted(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s - s.amax(-1, keepdim=True), column(z, s)], -1).softmax(-1)[..., :-1] @ v


def column_shifted_then_scaled_otherwise(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True)
    return torch.cat([(s - top) * 2.0, column(z, s) - top], -1).softmax(-1)[..., :-1] @ v


def two_columns(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    s = torch.cat([scores(q, k), column(z, scores(q, k))], -1)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return (e / (e.sum(-1, keepdim=True) + (column(z, s) - top).exp()))[..., :-1] @ v


def column_of_numbers(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s, column(1 - z, s)], -1).softmax(-1)[..., :-1] @ v


def column_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s, torch.zeros(2, 2, 5, 1)], -1).softmax(-1)[..., :-1] @ v


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores(q, k).softmax(-1)
    return p @ v, p


def broken_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    torch._dynamo.graph_break()
    return p @ v


def mean_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return finish(s + s.mean(-1, keepdim=True), v)


def least_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A maximum over several keys at each position."""
    many = torch.stack([k, k * 0.5], 3)
    return finish(torch.einsum("bhsd,bhtjd->bhstj", q, many).amax(-1), v)


SDPA = F.scaled_dot_product_attention
NO_VIEW = "no view expresses an operand: "
CASES: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
    # problem.py
    ("dropout is active; call model.eval()", lambda q, k, v: SDPA(q, k, v, dropout_p=0.5), (Q, K, V)),
    ("q, k and v have different ranks", lambda q, k, v: SDPA(q[0], k, v), (Q, K, V)),
    ("the scale is not a positive constant", lambda q, k, v: SDPA(q, k, v, scale=-0.5), (Q, K, V)),
    ("the extra column of the softmax is shifted differently from the scores", column_not_shifted, (Q, K, V, SINKS)),
    ("the extra column of the softmax is shifted differently from the scores", column_shifted_then_scaled_otherwise,
     (Q, K, V, SINKS)),
    ("a constant is added to the scores and not to the extra column of the softmax",
     lambda q, k, v, z: torch.cat([scores(q, k) + 2.0, column(z, scores(q, k))], -1).softmax(-1)[..., :-1] @ v,
     (Q, K, V, SINKS)),
    ("the softmax has several columns without values", two_columns, (Q, K, V, SINKS)),
    ("an operand is empty", lambda q, k, v: finish(scores(q, k), v), (Q[:0], K[:0], V[:0])),
    # emit.py and the layout of operands
    (NO_VIEW + "q, k and v have different dtypes", lambda q, k, v: finish(scores(q, k).double(), v),
     (Q, K, V.double())),
    (NO_VIEW + "a bias of the scores is not floating point", lambda q, k, v, b: finish(scores(q, k) + b, v),
     (Q, K, V, torch.arange(7))),
    (NO_VIEW + "index -1*l + 6 overlaps", lambda q, k, v: finish(scores(q, k.flip(2)), v), (Q, K, V)),
    (NO_VIEW + "zeros[o0, o1, o2, 0] depends on more than [o0, o1]", column_of_zeros, (Q, K, V)),
    # empty_rows.py
    ("the softmax does not subtract each query's maximum: a masked query would be NaN",
     lambda q, k, v, m: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)(scores(q, k).masked_fill(m, -INF).exp()),
     (Q, K, V, FAR)),
    ("masks of different kinds meet; a query with no key would get something else",
     lambda q, k, v, m, n: finish(scores(q, k).masked_fill(m, -1e5).masked_fill(n, -1e9), v), (Q, K, V, FAR, FAR[0])),
    # roles.py
    ("the values do not run along the keys", lambda q, k, v: finish(scores(q, k), v[:, :, :1].expand(2, 2, 7, 4)),
     (Q, K, V)),
    ("q and k share no feature dimension",
     lambda q, k, v: finish(q[..., 0].unsqueeze(-1) @ k[..., 0].unsqueeze(-2), v), (Q, K, V)),
    # scores.py
    ("the extra column of the softmax is no tensor", column_of_numbers, (Q, K, V, SINKS)),
    ("the scores come from cumsum.default, not from a product of q and k",
     lambda q, k, v: finish(scores(q, k).cumsum(-1), v), (Q, K, V)),
    ("part of the scores comes from elsewhere",
     lambda q, k, v: finish(F.pad(scores(q, k[:, :, :5]), (1, 1)), v), (Q, K, V)),
    ("the scores are cast to torch.float32", lambda q, k, v: finish(scores(q, k).int().float(), v), (Q, K, V)),
    ("the scores are negated", lambda q, k, v: finish(-scores(q, k), v), (Q, K, V)),
    ("the scores are multiplied by a tensor", lambda q, k, v, t: finish(scores(q, k) * t, v), (Q, K, V, BIAS)),
    ("the scores are divided by a tensor", lambda q, k, v, t: finish(scores(q, k) / t, v), (Q, K, V, BIAS)),
    ("tanh of the scores is no softcap", lambda q, k, v: finish(torch.tanh(scores(q, k)) * -3.0, v), (Q, K, V)),
    ("tanh of the scores is no softcap", lambda q, k, v: finish((torch.tanh(scores(q, k)) * 2.0).tanh(), v), (Q, K, V)),
    ("abs of the scores is not understood", lambda q, k, v: finish(scores(q, k).abs(), v), (Q, K, V)),
    ("an infinite constant is subtracted from the scores", lambda q, k, v: finish(scores(q, k) - INF, v), (Q, K, V)),
    ("something is added to the scores inside the softcap",
     lambda q, k, v, b: finish(torch.tanh(scores(q, k) + b) * 3.0, v), (Q, K, V, BIAS)),
    ("what is added to the scores depends on the scores", mean_added, (Q, K, V)),
    ("an infinite constant is added to the scores",
     lambda q, k, v: finish(scores(q, k) + torch.full((7,), -INF), v), (Q, K, V)),
    ("what is added to the scores is no tensor of its own",
     lambda q, k, v, b: finish(torch.baddbmm(b[None].expand(2, 5, 7), q[0], k[0].mT, beta=2.0), v[0]), (Q, K, V, BIAS)),
    ("the scores are masked inside the softcap",
     lambda q, k, v, m: finish(torch.tanh(scores(q, k).masked_fill(m, -1e9)) * 3.0, v), (Q, K, V, FAR)),
    ("the mask of the scores is constant",
     lambda q, k, v: finish(scores(q, k).masked_fill(torch.ones(7, dtype=torch.bool), -1e9), v), (Q, K, V)),
    ("masked scores are set to -5, which is not low enough to be a mask",
     lambda q, k, v, m: finish(scores(q, k).masked_fill(m, -5.0), v), (Q, K, V, FAR)),
    ("a bias is added to scores that were masked with a finite value",
     lambda q, k, v, m, b: finish(scores(q, k).masked_fill(m, -1e5) + b, v), (Q, K, V, FAR, BIAS)),
    ("the scores are chosen between two tensors",
     lambda q, k, v, m: finish(torch.where(m, scores(q, k), scores(q, k) * 0.5), v), (Q, K, V, FAR)),
    ("the scores are a maximum, not a sum", least_positions, (Q, K, V)),
    ("the scores are a sum of something else than products",
     lambda q, k, v: finish(scores(q, k).relu().sum(1), v[:, 0]), (Q, K, V)),
    ("the scores are a sum of something else than products",
     lambda q, k, v: finish(scores(q, k).abs().sum(1), v[:, 0]), (Q, K, V)),
    ("an operand of the scores is no tensor", lambda q, k, v: finish((scores(q, k) * 2.0).sum(1), v[:, 0]), (Q, K, V)),
    ("q and k cannot be told apart: exactly one must run along the keys",
     lambda k, v: torch.einsum("bhtd,bhtd->bht", k, k).softmax(-1)[:, :, None] @ v, (K, V)),
    ("the scores are scaled by -0.5", lambda q, k, v: finish(scores(q, k) * -0.5, v), (Q, K, V)),
    # softmax.py
    ("the weights do not meet the values in a plain product",
     lambda q, k, v, b: F.linear(scores(q, k).softmax(-1), v[0, 0].mT, b), (Q, K, V, randn(4))),
    ("there is only one key", lambda q, k, v: finish(scores(q, k[:, :, :1]), v[:, :, :1]), (Q, K, V)),
    ("the weights are summed over several dimensions at once",
     lambda q, k, v: torch.einsum("bhst,bhtd->bsd", scores(q, k).softmax(-1), v), (Q, K, V)),
    ("the softmax does not reach the product unchanged",
     lambda q, k, v: torch.cat([scores(q, k).softmax(-1)] * 2, -1) @ torch.cat([v, v * 2], 2), (Q, K, V)),
    ("the values are no tensor", lambda q, k, v: (scores(q, k).softmax(-1) * 2.0).sum(-1), (Q, K, V)),
    ("the weights are not summed along the softmax dimension", lambda q, k: scores(q, k).softmax(-2) @ k, (Q, SQUARE)),
    ("the weights are not summed along the softmax dimension",
     lambda q, k, v: scores(q, k).softmax(-1).flip(-1) @ v, (Q, K, V)),
    ("the weights are summed along two dimensions",
     lambda q, k: torch.einsum("bhtt,bhtd->bhd", scores(q, k).softmax(-1), k), (Q, SQUARE)),
    ("part of the weights is dropped before they meet the values",
     lambda q, k, v: scores(q, k).softmax(-1)[..., :5] @ v[:, :, :5], (Q, K, V)),
    ("the attention weights are also read elsewhere (matmul_1, output)", returned, (Q, K, V)),
    ("the attention weights leave the graph: returned, or a graph break follows",
     lambda q, k: scores(q, k).softmax(-1), (Q, K)),
    ("the attention weights leave the graph: returned, or a graph break follows", broken_between, (Q, K, V)),
    ("dropout is active; call model.eval()",
     lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5, training=True) @ v, (Q, K, V)),
    ("sqrt.default stands between softmax and values", lambda q, k, v: scores(q, k).softmax(-1).sqrt() @ v, (Q, K, V)),
    ("the denominator is not the sum of the weights", normalised(lambda e: 1 + e.sum(-1, keepdim=True)), (Q, K, V)),
    ("the denominator is not the sum of the weights",
     normalised(lambda e: e.sum(-1, keepdim=True).clamp(min=1e-6)), (Q, K, V)),
    ("the denominator has a term that is no exponential",
     lambda q, k, v, z: (lambda e: (e / (e.sum(-1, keepdim=True) + z)) @ v)(exponentials(q, k)),
     (Q, K, V, BIAS[:, :1].abs())),
    ("the denominator sums something else than the weights",
     lambda q, k, v: (exponentials(q, k) / exponentials(q, k * 2).sum(-1, keepdim=True)) @ v, (Q, K, V)),
    ("the denominator sums something else than the weights",
     normalised(lambda e: e.sum((-1, -2), keepdim=True)), (Q, K, V)),
    ("weights and denominator belong to different rows",
     normalised(lambda e: e.sum(-1, keepdim=True).flip(2)), (Q, K, V)),
]  # fmt: skip


def explained(function: Callable[..., Any], inputs: tuple[Any, ...], **given: Any) -> sm12x_compile.Report:
    """The report, after comparing what compiled code gives with eager."""
    torch.manual_seed(0)
    expected = function(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    step = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, **given)
    with sm12x_compile.collect() as report:
        found = step(*copy.deepcopy(inputs))
    torch.testing.assert_close(found, expected, equal_nan=True)
    return report


@pytest.mark.parametrize(("sentence", "function", "inputs"), CASES, ids=[f"{k}: {c[0]}" for k, c in enumerate(CASES)])
def test_refused(sentence: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    report = explained(function, inputs)
    assert [s.reason for s in report.sites if s.status == "near-miss"] == [sentence]
    assert report.count("attention") == 0 and report.warnings == []
    (site,) = report.near_misses
    assert site.source.startswith(__file__), site.source


def test_the_head_dim_is_symbolic() -> None:
    report = explained(SDPA, (Q, K, V), dynamic=True)
    assert [s.reason for s in report.near_misses] == ["the head dim is symbolic"]


def test_a_sink_that_is_rounded_to_an_integer() -> None:
    """Casts of a sink are read through only where they keep the number."""

    def function(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        s = scores(q, k)
        return torch.cat([s, column(z.int().float(), s)], -1).softmax(-1)[..., :-1] @ v

    report = explained(function, (Q, K, V, 3 * SINKS))
    assert report.count("attention") == 1 and report.sites[0].tags["sinks"]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: q.softmax(-1),
        lambda q, k, v: q.exp() @ k.mT,
        lambda q, k, v: (q.softmax(-1) * 2).sum(),
        lambda q, k, v: q.exp() / (1 + q.exp()),
        lambda q, k, v: F.cross_entropy(q.flatten(0, 2), torch.zeros(20, dtype=torch.long)),
        lambda q, k, v: q.softmax(-1).topk(2).values,
    ],
)
def test_what_is_no_attention_is_no_near_miss(function: Callable[..., Any]) -> None:
    """Routers, losses and gates have softmaxes too; a report that lists them all is not read."""
    assert explained(function, (Q, K, V)).sites == []


# ------------------------------------------------------------------ nothing left out

# Guards: no graph that PyTorch lets run is known to reach them.
GUARDS = {
    "the query heads are no multiple of the KV heads",
    "the mask is no boolean tensor",
    "the mask of the scores is no boolean tensor",
    "an index of the product runs through the values",
    "an index of the result is used twice",
    "an operand has an index that the result does not have",
    "the weights are shifted along the keys",
    "the denominator is summed along several dimensions",
    "{} is not a floating point dtype",
    "the result is not laid out by its indices",
    "result index {} is not dense",
}


def sentences(source: str) -> Iterator[str]:
    """The first argument of every `Refusal(...)` and `CannotArrange(...)`, its parts in braces replaced by {}."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        text = node.args[0]
        if node.func.id in ("Refusal", "CannotArrange"):
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)


def test_every_sentence_is_here() -> None:
    """A new refusal needs a case that reaches it; one that is gone needs none."""
    folder = Path(patterns.__file__).parent
    files = ("attention.py", "problem.py", "emit.py", "empty_rows.py", "roles.py", "scores.py", "softmax.py")
    written = {s for name in files for s in sentences((folder / name).read_text())} - {NO_VIEW + "{}"}
    reached = [c[0].removeprefix(NO_VIEW) for c in CASES] + ["the head dim is symbolic"]

    def is_reached(sentence: str) -> bool:
        pattern = ".+".join(map(re.escape, sentence.split("{}")))
        return any(re.fullmatch(pattern, r) for r in reached)

    assert len(written) > 40
    assert {s for s in written if not is_reached(s)} == GUARDS
