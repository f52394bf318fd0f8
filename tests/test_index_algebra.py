"""The index algebra against torch, element by element.

Random chains of layout ops and contractions are traced into the normal form; the expression that the algebra
gives for an element of the result is then evaluated on the chain's inputs and must equal what torch computed.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.index_algebra import (
    Apply,
    Cases,
    Datum,
    Element,
    Expr,
    FloorDiv,
    Index,
    Mod,
    Number,
    Position,
    Reduce,
    Var,
    look,
    step,
)
from sm12x_compile.index_algebra.predicate import All, AtMostZero, Holds, IsZero, predicate_of
from sm12x_compile.normalize import normalize

Assignment = dict[Var, int]


def at(index: Index, assigned: Assignment, values: dict[Node, torch.Tensor]) -> int:
    """The integer that an index is."""
    total = int(index.const)
    for atom, c in index.terms.items():
        if isinstance(atom, Var):
            value = assigned[atom]
        elif isinstance(atom, Datum):
            value = int(evaluate(atom.element, assigned, values))
        else:
            inner = at(atom.x, assigned, values)
            value = inner // int(atom.k) if isinstance(atom, FloorDiv) else inner % int(atom.k)
            assert isinstance(atom, (FloorDiv, Mod))
        total += int(c) * value
    return total


_FUNCTIONS: dict[str, Any] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "ne": operator.ne,
    "where": lambda c, a, b: a if c else b, "cast": lambda x: x,
}  # fmt: skip


def evaluate(expr: Expr, assigned: Assignment, values: dict[Node, torch.Tensor]) -> Any:
    """The number that an expression is, given the values of the placeholders."""
    if isinstance(expr, Number):
        return expr.value
    if isinstance(expr, Position):
        return at(expr.index, assigned, values)
    if isinstance(expr, Apply):
        return _FUNCTIONS[expr.op](*(evaluate(a, assigned, values) for a in expr.args))
    if isinstance(expr, Reduce):
        terms = [evaluate(expr.body, {**assigned, expr.var: i}, values) for i in range(int(expr.var.extent))]
        return sum(terms) if expr.kind == "sum" else max(terms)
    if isinstance(expr, Cases):
        position = at(expr.index, assigned, values)
        for low, high, piece in expr.pieces:
            if int(low) <= position < int(high):
                return evaluate(piece, assigned, values)
        raise AssertionError(f"{position} lies in no piece of {expr}")
    if expr.node in values:
        index = tuple(at(ix, assigned, values) for ix in expr.index)
        shape = values[expr.node].shape
        assert all(0 <= i < s for i, s in zip(index, shape, strict=True)), f"{expr} leaves {tuple(shape)}"
        return values[expr.node][index].item()
    inner = step(expr)
    assert inner is not None, f"the algebra does not know {expr.node.target}"
    return evaluate(inner, assigned, values)


def trace(function: Any, inputs: list[torch.Tensor]) -> tuple[GraphModule, dict[Node, torch.Tensor]]:
    gm = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in gm.graph.find_nodes(op="get_attr"):  # tensors written into the code
        values[node] = getattr(gm, node.target)
    return gm, values


def check(function: Any, inputs: list[torch.Tensor]) -> None:
    """Every element of the result (a sample if there are many), by the algebra and by torch."""
    expected = function(*inputs)
    gm, values = trace(function, inputs)
    (result,) = gm.graph.output_node().all_input_nodes
    variables = [Var(f"i{k}", s) for k, s in enumerate(expected.shape)]
    element = Element(result, tuple(Index.of(v) for v in variables))
    places = list(itertools.product(*map(range, expected.shape)))
    for place in places[:: max(1, len(places) // 40)]:
        found = evaluate(element, dict(zip(variables, place, strict=True)), values)
        assert found == pytest.approx(expected[place].item(), abs=1e-9), (place, gm.graph)
    if places:
        seen = look(element)  # the shortcut must agree with the single steps
        found = evaluate(seen, dict(zip(variables, places[-1], strict=True)), values)
        assert found == pytest.approx(expected[places[-1]].item(), abs=1e-9)


# ------------------------------------------------------------------ random chains


def _factor_pairs(n: int) -> list[tuple[int, int]]:
    return [(a, n // a) for a in range(1, n + 1) if n % a == 0]


@st.composite
def layout_op(draw: Any, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """A random layout op on a tensor of this shape, with the shape of its result."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1))
    size = shape[dim]
    kind = draw(st.sampled_from(
        [
        "transpose", "permute", "reshape", "split_dim", "merge", "slice", "select",
        "unsqueeze", "expand", "flip", "repeat", "interleave", "cat", "stack",
        "chunk", "unbind", "pad", "slice_scatter", "select_scatter", "index", "squeeze",
        "index_select",
    ]
    ))  # fmt: skip
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return (lambda x: x.transpose(dim, other)), tuple(torch.empty(shape).transpose(dim, other).shape)
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return (lambda x: x.permute(order)), tuple(shape[o] for o in order)
    if kind == "reshape":
        new: list[int] = []
        left = torch.Size(shape).numel()
        while left > 1 and len(new) < 3:
            a, left = draw(st.sampled_from(_factor_pairs(left)))
            new.append(a)
        new.append(left)
        return (lambda x: x.reshape(new)), tuple(new)
    if kind == "split_dim":
        a, b = draw(st.sampled_from(_factor_pairs(size)))
        return (lambda x: x.unflatten(dim, (a, b))), (*shape[:dim], a, b, *shape[dim + 1 :])
    if kind == "merge" and dim + 1 < rank:
        merged = size * shape[dim + 1]
        return (lambda x: x.flatten(dim, dim + 1)), (*shape[:dim], merged, *shape[dim + 2 :])
    if kind == "slice":
        start = draw(st.integers(-size, size - 1))
        stride = draw(st.integers(1, 3))
        cut = torch.empty(shape)[(slice(None),) * dim + (slice(start, None, stride),)].shape
        return (lambda x: x[(slice(None),) * dim + (slice(start, None, stride),)]), tuple(cut)
    if kind == "select" and rank > 1:
        place = draw(st.integers(-size, size - 1))
        return (lambda x: x.select(dim, place)), shape[:dim] + shape[dim + 1 :]
    if kind == "unsqueeze" and rank < 5:
        return (lambda x: x.unsqueeze(dim)), (*shape[:dim], 1, *shape[dim:])
    if kind == "squeeze" and rank > 1:
        return (lambda x: x.squeeze(dim)), tuple(torch.empty(shape).squeeze(dim).shape)
    if kind == "expand" and rank < 5:
        n = draw(st.integers(1, 3))
        return (lambda x: x.unsqueeze(dim).expand(*shape[:dim], n, *shape[dim:])), (*shape[:dim], n, *shape[dim:])
    if kind == "flip":
        return (lambda x: x.flip(dim)), shape
    if kind == "repeat":
        times = [1] * rank
        times[dim] = draw(st.integers(1, 3))
        return (lambda x: x.repeat(times)), tuple(s * t for s, t in zip(shape, times, strict=True))
    if kind == "interleave":
        n = draw(st.integers(1, 3))
        return (lambda x: x.repeat_interleave(n, dim)), (*shape[:dim], size * n, *shape[dim + 1 :])
    if kind == "cat":
        return (lambda x: torch.cat([x, x * 2, x.flip(dim)], dim)), (*shape[:dim], size * 3, *shape[dim + 1 :])
    if kind == "stack" and rank < 5:
        return (lambda x: torch.stack([x, x + 1], dim)), (*shape[:dim], 2, *shape[dim:])
    if kind == "chunk":
        which = draw(st.integers(0, len(torch.empty(shape).chunk(2, dim)) - 1))
        return (lambda x: x.chunk(2, dim)[which]), tuple(torch.empty(shape).chunk(2, dim)[which].shape)
    if kind == "unbind" and rank > 1:
        which = draw(st.integers(0, size - 1))
        return (lambda x: x.unbind(dim)[which]), shape[:dim] + shape[dim + 1 :]
    if kind == "pad":
        low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        pads = [0, 0] * (rank - 1 - dim) + [low, high]
        return (
            (lambda x: torch.nn.functional.pad(x, pads, value=0.5)),
            (*shape[:dim], size + low + high, *shape[dim + 1 :]),
        )
    if kind == "slice_scatter":
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start, size))

        def scatter(x: torch.Tensor) -> torch.Tensor:
            return torch.slice_scatter(x, x.narrow(dim, start, stop - start) * 3, dim, start, stop)

        return scatter, shape
    if kind == "select_scatter" and rank > 1:
        place = draw(st.integers(0, size - 1))
        return (lambda x: torch.select_scatter(x, x.select(dim, 0) + 1, dim, place)), shape
    if kind == "index":
        picks = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
        return (
            (lambda x: x[(slice(None),) * dim + (torch.tensor(picks),)]),
            (*shape[:dim], len(picks), *shape[dim + 1 :]),
        )
    if kind == "index_select":
        return (lambda x: x.index_select(dim, torch.arange(size - 1, -1, -1))), shape
    return (lambda x: x.clone()), shape


@st.composite
def chain(draw: Any) -> tuple[Any, list[torch.Tensor]]:
    """Layout ops, a contraction of two such chains, layout ops again."""
    seed = draw(st.integers(0, 2**16))
    ops: list[list[Any]] = [[], [], []]
    shapes = [tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))) for _ in range(2)]
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(seed + k), dtype=torch.float64)
              for k, s in enumerate(shapes)]  # fmt: skip
    for k in range(2):
        for _ in range(draw(st.integers(0, 3))):
            if torch.Size(shapes[k]).numel() > 200:
                break
            op, shapes[k] = draw(layout_op(shapes[k]))
            ops[k].append(op)
    how = draw(st.sampled_from(["left", "matmul", "linear", "einsum", "bmm", "mulsum"]))
    join, shape = _contraction(how, *shapes)
    for _ in range(draw(st.integers(0, 2))):
        if torch.Size(shape).numel() > 400 or not shape:
            break
        op, shape = draw(layout_op(shape))
        ops[2].append(op)

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for op in ops[0]:
            x = op(x)
        for op in ops[1]:
            y = op(y)
        z = join(x, y)
        for op in ops[2]:
            z = op(z)
        return z.clone()

    return run, inputs


def _contraction(how: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """A contraction that fits any two shapes: the second is flattened and cut to what the first needs."""
    inner = a[-1]
    if how == "left" or torch.Size(b).numel() == 0 or torch.Size(a).numel() == 0:
        return (lambda x, y: x.clone()), a

    def matrix(y: torch.Tensor, columns: int) -> torch.Tensor:
        return y.reshape(-1)[:1].expand(inner * columns).reshape(inner, columns) * torch.arange(1, columns + 1)

    if how == "matmul":
        return (lambda x, y: x @ matrix(y, 2)), (*a[:-1], 2)
    if how == "linear":
        return (lambda x, y: torch.nn.functional.linear(x, matrix(y, 3).T)), (*a[:-1], 3)
    if how == "einsum":
        return (lambda x, y: torch.einsum("...l,lo->...o", x, matrix(y, 2))), (*a[:-1], 2)
    if how == "bmm" and len(a) == 3:
        return (lambda x, y: torch.bmm(x, matrix(y, 2).expand(a[0], inner, 2))), (a[0], a[1], 2)
    return (lambda x, y: (x.unsqueeze(-1) * matrix(y, 2)).sum(-2)), (*a[:-1], 2)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chain())
def test_random_chains(case: tuple[Any, list[torch.Tensor]]) -> None:
    function, inputs = case
    check(function, inputs)


@pytest.mark.nightly
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(chain())
def test_random_chains_at_length(case: tuple[Any, list[torch.Tensor]]) -> None:
    function, inputs = case
    check(function, inputs)


# ------------------------------------------------------------------ contractions and reductions by name


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
        lambda x, y: torch.einsum("bhqd,bhkd->qkbh", x, y),
        lambda x, y: torch.einsum("...qd,...kd", x, y),
        lambda x, y: torch.einsum("bhqd->qb", x),
        lambda x, y: torch.einsum("aaqd,aakd->kq", x[:, :2], y[:, :2]),
        lambda x, y: x @ y.mT,
        lambda x, y: x[0, 0, 0] @ y[0, 0].mT,
        lambda x, y: x[0] @ y[0, 0, 1],
        lambda x, y: torch.baddbmm(x[0] @ y[0].mT, x[0], y[0].mT, beta=0.5, alpha=2.0),
        lambda x, y: torch.addmm(x[0, 0] @ y[0, 0].mT, x[0, 0], y[0, 0].mT, beta=0.0),
        lambda x, y: torch.inner(x[0], y[0, 0]),
        lambda x, y: torch.tensordot(x, y, dims=([2], [2])),
        lambda x, y: torch.nn.functional.linear(x, y[0, 0], y[0, 0, :, 0]),
        lambda x, y: (x[:, :, :, None] * y[:, :, None]).sum(-1),
        lambda x, y: x.sum((0, 2), keepdim=True),
        lambda x, y: x.amax(-1, keepdim=True) - y.max(dim=1, keepdim=True).values,
        lambda x, y: torch.sub(x, y, alpha=2),
    ],
)
def test_contractions(function: Any) -> None:
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    check(function, [x, y])


# ------------------------------------------------------------------ predicates


def holds(p: Any, assigned: Assignment, values: dict[Node, torch.Tensor]) -> bool:
    if isinstance(p, AtMostZero):
        return at(p.index, assigned, values) <= 0
    if isinstance(p, IsZero):
        return (at(p.index, assigned, values) == 0) == p.equal
    if isinstance(p, Holds):
        return bool(evaluate(p.element, assigned, values)) == p.expected
    parts = [holds(q, assigned, values) for q in p.parts]
    return all(parts) if isinstance(p, All) else any(parts)


MASKS = {
    "tril": lambda m: torch.ones(6, 6, dtype=torch.bool).tril(),
    "tril of floats": lambda m: torch.tril(torch.ones(6, 6)) == 0,
    "triu": lambda m: torch.ones(6, 6).triu(2).bool(),
    "less or equal": lambda m: torch.arange(6)[None] <= torch.arange(6)[:, None],
    "window": lambda m: (torch.arange(6)[None] > torch.arange(6)[:, None] - 3)
    & (torch.arange(6)[None] <= torch.arange(6)[:, None]),
    "not": lambda m: ~(torch.arange(6)[None] > torch.arange(6)[:, None]),
    "chunks": lambda m: torch.arange(6)[None] // 2 == torch.arange(6)[:, None] // 2,
    "distance": lambda m: (torch.arange(6)[None] - torch.arange(6)[:, None]).abs() <= 2,
    "or": lambda m: (torch.arange(6)[None] < 2) | (torch.arange(6)[None] <= torch.arange(6)[:, None]),
    "padding": lambda m: (m[None] != 0) & (torch.arange(6)[None] <= torch.arange(6)[:, None]),
    "added offset": lambda m: torch.arange(6)[None] <= torch.arange(6)[:, None] + m[2],
    "twice": lambda m: (torch.where(torch.ones(6, 6).tril().bool(), 0.0, -1e9) * 2) == 0,
    "one minus": lambda m: (1.0 - torch.ones(6, 6).tril()) > 0.5,
    "segments": lambda m: m[:, None] == m[None],
}


@pytest.mark.parametrize("name", MASKS)
def test_predicates(name: str) -> None:
    data = torch.tensor([0, 1, 1, 0, 2, 2])
    expected = MASKS[name](data)
    gm, values = trace(lambda m: MASKS[name](m).clone(), [data])
    (result,) = gm.graph.output_node().all_input_nodes
    s, t = Var("s", 6), Var("t", 6)
    predicate = predicate_of(Element(result, (Index.of(s), Index.of(t))))
    assert predicate is not None
    for i, j in itertools.product(range(6), range(6)):
        assert holds(predicate, {s: i, t: j}, values) == bool(expected[i, j]), (i, j, predicate)
    opaque = [p for p in getattr(predicate, "parts", (predicate,)) if isinstance(p, Holds)]
    assert len(opaque) == (1 if name == "padding" else 0), predicate


# ------------------------------------------------------------------ indices


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_index_arithmetic(data: Any) -> None:
    """Sums, products, quotients and remainders of indices are what integers give, and lie within their bounds."""
    variables = [Var(n, data.draw(st.integers(1, 6))) for n in "abc"]
    index = Index()
    for v in variables:
        index = index + Index.of(v) * data.draw(st.integers(0, 12))
    index = index + data.draw(st.integers(0, 9))
    for _ in range(data.draw(st.integers(0, 3))):
        how = data.draw(st.sampled_from(["div", "mod", "mul", "add", "split"]))
        k = data.draw(st.integers(1, 7))
        if how == "split":  # x = k * (x div k) + x mod k
            q, r = index.divmod(k)
            index = q * k + r
        else:
            index = {"div": index.div, "mod": index.mod, "mul": index.__mul__, "add": index.__add__}[how](k)
    values: dict[Var, int] = {v: data.draw(st.integers(0, int(v.extent) - 1)) for v in variables}
    bounds = index.bounds()
    assert bounds is not None
    result = at(index, values, {})
    assert bounds[0] <= result <= bounds[1]
    half = {v: Index.of(Var("hi", (int(v.extent) + 1) // 2)) * 2 + Index.of(Var("lo", 2)) for v in variables[:1]}
    substituted = index.subs(half)
    (hi, lo) = (a for a in next(iter(half.values())).terms)
    v = variables[0]
    inner = {**values, hi: values[v] // 2, lo: values[v] % 2}
    assert at(substituted, inner, {}) == result


def test_split_and_merge_is_nothing() -> None:
    x = Var("x", 24)
    q, r = Index.of(x).divmod(4)
    assert q * 4 + r == Index.of(x)
    assert repr(Index.of(x).div(4)) == "(x div 4)"


def test_repeat_kv_is_gone() -> None:
    """The example of the package's docstring."""

    def repeat(cache: torch.Tensor) -> torch.Tensor:
        return cache[:, :, None].expand(2, 2, 4, 5, 3).reshape(2, 8, 5, 3).transpose(2, 3)

    gm, _ = trace(repeat, [torch.randn(2, 2, 5, 3)])
    (result,) = gm.graph.output_node().all_input_nodes
    b, h, d, t = Var("b", 2), Var("h", 8), Var("d", 3), Var("t", 5)
    found = look(Element(result, tuple(map(Index.of, (b, h, d, t)))))
    assert found.node.op == "placeholder"
    assert repr(found.index) == "(b, (h div 4), t, d)"
