"""Masks proved: what each becomes, what stays dense, and that the structured mask is the predicate everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.index_algebra import Datum, Element, FloorDiv, Index, Mod, Var
from sm12x_compile.index_algebra.predicate import predicate_of
from sm12x_compile.masks import MaskTerm, StructuredMask, data_vars, explain_masks
from sm12x_compile.normalize import normalize
from sm12x_compile.ops.attention import allowed_keys

B, S, T = 2, 6, 6


@dataclass
class Traced:
    """Boolean masks ``[B, S, T]`` (or ``[S, T]``, or ``[B, 1, T]``) of a function, as terms over b, s and t."""

    terms: list[MaskTerm]
    b: Var
    s: Var
    t: Var
    values: dict[Node, Tensor]

    @property
    def mask(self) -> StructuredMask:
        return explain_masks(self.terms, self.s, self.t, {self.b})


def trace(function: Callable[..., Any], *inputs: Tensor, sizes: tuple[int, int, int] = (B, S, T)) -> Traced:
    """`function` gets query indices ``[S, 1]``, key indices ``[T]`` and the inputs; it gives masks, True to keep."""
    batch, queries, keys = sizes

    def masks(unused: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        found = function(torch.arange(queries)[:, None], torch.arange(keys), *data)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(m.expand(batch, queries, keys) for m in found)

    given = (torch.zeros(()), *inputs)  # normalising needs an input to find the fake mode of
    gm = normalize(make_fx(masks, pre_dispatch=True, tracing_mode="fake")(*given))
    recorder = _Recorder(gm)
    recorder.run(*given)
    b, s, t = Var("b", batch), Var("s", queries), Var("t", keys)
    terms = []
    for node in gm.graph.output_node().args[0]:
        element = Element(node, (Index.of(b), Index.of(s), Index.of(t)))
        keep = predicate_of(element)
        assert keep is not None
        terms.append(MaskTerm(keep, -math.inf, element))
    return Traced(terms, b, s, t, recorder.values)


class _Recorder(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def number(index: Index, assigned: dict[Var, int], values: dict[Node, Tensor]) -> int:
    """The integer that an index is, its run-time atoms included."""
    total = int(index.const)
    for atom, c in index.terms.items():
        if isinstance(atom, Var):
            value = assigned[atom]
        elif isinstance(atom, Datum):
            value = int(read(atom.element, assigned, values))
        else:
            inner = number(atom.x, assigned, values)
            assert isinstance(atom, (FloorDiv, Mod))
            value = inner // int(atom.k) if isinstance(atom, FloorDiv) else inner % int(atom.k)
        total += int(c) * value
    return total


def read(element: Element, assigned: dict[Var, int], values: dict[Node, Tensor]) -> Any:
    place = tuple(number(ix, assigned, values) for ix in element.index)
    assert all(0 <= i < n for i, n in zip(place, values[element.node].shape, strict=True)), element
    return values[element.node][place].item()


def allowed(traced: Traced, mask: StructuredMask) -> Tensor:
    """What ``sm12x::attention`` lets through for a structured mask, its dense rest included: ``[B, S, T]``."""
    batch, queries, keys = int(traced.b.extent), int(traced.s.extent), int(traced.t.extent)

    def of_batch(index: Index) -> Tensor:
        return torch.tensor([number(index, {traced.b: b}, traced.values) for b in range(batch)])

    def along(element: Element, var: Var) -> Tensor:
        rows = range(int(var.extent))
        return torch.tensor([[read(element, {traced.b: b, var: i}, traced.values) for i in rows] for b in range(batch)])

    keep = allowed_keys(
        queries, keys, torch.device("cpu"),
        causal=mask.causal, window_left=mask.window_left, window_right=mask.window_right, chunk=mask.chunk,
        q_offset=of_batch(mask.offset), kv_len=None if mask.kv_len is None else of_batch(mask.kv_len),
        q_segments=along(mask.segments[0], traced.s) if mask.segments else None,
        k_segments=along(mask.segments[1], traced.t) if mask.segments else None,
    )  # fmt: skip
    result = torch.ones(batch, queries, keys, dtype=torch.bool) if keep is None else keep[:, 0]
    result = result.expand(batch, queries, keys).clone()
    for pad in mask.padding:
        result &= (along(pad.element, traced.t) == pad.expected)[:, None, :]
    for term in mask.dense:
        whole = [
            read(term.source, {traced.b: b, traced.s: i, traced.t: j}, traced.values)
            for b in range(batch) for i in range(queries) for j in range(keys)
        ]  # fmt: skip
        result &= torch.tensor(whole).view(batch, queries, keys) == term.source_keeps
    return result


def proved(function: Callable[..., Any], *inputs: Tensor, sizes: tuple[int, int, int] = (B, S, T)) -> StructuredMask:
    """The mask of a function, after checking that it lets through what the function says."""
    traced = trace(function, *inputs, sizes=sizes)
    _, queries, keys = sizes
    expected = function(torch.arange(queries)[:, None], torch.arange(keys), *inputs)
    everything = torch.ones(sizes, dtype=torch.bool)
    for part in expected if isinstance(expected, tuple) else (expected,):
        everything = everything & part
    mask = traced.mask
    assert torch.equal(allowed(traced, mask), everything), mask
    return mask


def constants(mask: StructuredMask) -> dict[str, Any]:
    """The fields that were set, offsets and lengths as ints where they are constant."""
    found = {}
    for field in fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Index):
            value = value.const if value.is_const else repr(value)
        if value not in (None, False, (), 0) or (field.name in ("window_left", "window_right") and value == 0):
            found[field.name] = value
    return found


# ------------------------------------------------------------------ one kind after the other

EXACT: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "everything": (lambda i, j: j >= 0, "none", {}),
    "causal": (lambda i, j: j <= i, "causal", {"causal": True}),
    "causal, turned around": (lambda i, j: ~(i < j), "causal", {"causal": True}),
    "causal, strict": (lambda i, j: j < i, "causal", {"causal": True, "offset": -1}),
    "causal, shifted": (lambda i, j: j <= i + 2, "causal", {"causal": True, "offset": 2}),
    "causal, a difference": (lambda i, j: i - j >= -2, "causal", {"causal": True, "offset": 2}),
    "causal, the tightest": (lambda i, j: (j <= i + 2) & (j <= i) & (j < i + 2), "causal", {"causal": True}),
    "window": (lambda i, j: (j <= i) & (j > i - 3), "window", {"causal": True, "window_left": 2}),
    "window, the tightest": (
        lambda i, j: (j <= i) & (j > i - 3) & (j > i - 2), "window", {"causal": True, "window_left": 1}
    ),
    "window around s": (lambda i, j: (i - j).abs() <= 2, "window", {"window_left": 2, "window_right": 2}),
    "window around s, strict": (lambda i, j: (i - j).abs() < 2, "window", {"window_left": 1, "window_right": 1}),
    "window, lopsided": (
        lambda i, j: (j <= i + 1) & (j >= i - 2), "window", {"causal": True, "offset": 1, "window_left": 3}
    ),
    "window to the left alone": (lambda i, j: j >= i - 2, "window", {"window_left": 2}),
    "diagonal": (lambda i, j: (j <= i) & (j >= i), "window", {"causal": True, "window_left": 0}),
    "chunk": (lambda i, j: j // 4 == i // 4, "chunked", {"chunk": 4}),
    "chunk, causal": (lambda i, j: (i // 4 == j // 4) & (j <= i), "chunked", {"chunk": 4, "causal": True}),
    "chunk, shifted": (
        lambda i, j: ((i + 3) // 4 == j // 4) & (j <= i + 3), "chunked", {"chunk": 4, "causal": True, "offset": 3}
    ),
    "chunk, shifted by more": (lambda i, j: (i + 6) // 4 == j // 4, "chunked", {"chunk": 4, "offset": 6}),
    "chunk, shifted by less": (lambda i, j: j // 4 == (i - 5) // 4, "chunked", {"chunk": 4, "offset": -5}),
    "length": (lambda i, j: j < 4, "length", {"kv_len": 4}),
    "length, the tightest": (lambda i, j: (j <= 4) & (j < 3), "length", {"kv_len": 3}),
    "causal and length": (lambda i, j: (j <= i) & (j < 4), "causal+length", {"causal": True, "kv_len": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_constant_masks(name: str) -> None:
    function, kind, expected = EXACT[name]
    mask = proved(function)
    assert mask.describe() == kind
    assert constants(mask) == expected


def test_several_terms_are_one_mask() -> None:
    mask = proved(lambda i, j: (j <= i, j > i - 3, j < 5))
    assert constants(mask) == {"causal": True, "window_left": 2, "kv_len": 5}


OFFSETS = {"0-d": torch.tensor(3), "int32": torch.tensor([1, 4], dtype=torch.int32), "per batch": torch.tensor([0, 5])}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_only_the_run_knows(offset: Tensor) -> None:
    def at(o: Tensor) -> Tensor:
        return o.reshape(-1, 1, 1) if o.dim() else o

    causal = proved(lambda i, j, o: j <= i + at(o), offset)
    assert causal.describe() == "causal"
    assert [type(a) for a in causal.offset.terms] == [Datum] and causal.offset.const == 0
    window = proved(lambda i, j, o: (j <= i + at(o) + 1) & (j > i + at(o) - 2), offset)
    assert (window.causal, window.window_left, window.offset.const) == (True, 2, 1)
    length = proved(lambda i, j, o: (j < at(o)) & (j <= i), offset)
    assert length.describe() == "causal+length" and length.kv_len is not None and not length.kv_len.is_const
    chunk = proved(lambda i, j, o: ((i + at(o)) // 4 == j // 4) & (j <= i + at(o)), offset)
    assert (chunk.chunk, chunk.causal, chunk.describe()) == (4, True, "chunked")
    assert len(chunk.offset.terms) == 1 and chunk.offset.const == 0


def test_two_run_time_parts_add_up() -> None:
    mask = proved(lambda i, j, a, b: j <= i + a + b.reshape(-1, 1, 1), torch.tensor(2), torch.tensor([0, 3]))
    assert mask.describe() == "causal" and len(mask.offset.terms) == 2


def test_one_query() -> None:
    """Without a query variable a bound of the keys is a length."""
    traced = trace(lambda i, j, n: j <= n, torch.tensor(3), sizes=(1, 1, 8))
    mask = explain_masks(traced.terms, None, traced.t, {traced.b})
    assert mask.describe() == "length" and not mask.causal
    assert mask.kv_len is not None and mask.kv_len.const == 1 and len(mask.kv_len.terms) == 1
    traced = trace(lambda i, j, n: (j <= n) & (j < 3), torch.tensor(5), sizes=(1, 1, 8))
    assert explain_masks(traced.terms, None, traced.t, {traced.b}).describe() == "dense"  # which one is less?
    traced = trace(lambda i, j: (j <= i + 5) & (j < 3), sizes=(1, 1, 8))
    mask = explain_masks(traced.terms, None, traced.t, {traced.b})
    assert (mask.describe(), mask.kv_len) == ("length", Index(None, 3))
    traced = trace(lambda i, j, n: (j <= n) & (j > n - 4), torch.tensor(5), sizes=(1, 1, 8))
    mask = explain_masks(traced.terms, None, traced.t, {traced.b})
    assert (mask.describe(), mask.causal, mask.window_left) == ("window", True, 3)
    assert torch.equal(allowed(traced, mask)[0, 0], (torch.arange(8) <= 5) & (torch.arange(8) > 1))


def test_padding() -> None:
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    mask = proved(lambda i, j, p: p[:, None, :] & (j <= i), real)
    assert mask.describe() == "causal+padding" and [p.expected for p in mask.padding] == [True]
    # A mask of what to leave out, as PyTorch's key_padding_mask is.
    mask = proved(lambda i, j, p: ~p[:, None, :], ~real)
    assert mask.describe() == "padding" and [p.expected for p in mask.padding] == [False]
    mask = proved(lambda i, j, p, other: p[:, None, :] & ~other[:, None, :], real, real.flip(1))
    assert [p.expected for p in mask.padding] == [True, False]
    mask = proved(lambda i, j, p: p[None, None, :], real[0])
    assert mask.describe() == "padding"
    # What is given per query and key, or per query, is no padding of the keys.
    assert proved(lambda i, j, p: p, torch.rand(B, S, T) < 0.6).describe() == "dense"
    assert proved(lambda i, j, p: p[:, :, None], real).describe() == "dense"
    # Nor is a switch for a whole batch.
    assert proved(lambda i, j, on: on[:, None, None] & (j <= i), torch.tensor([True, False])).describe() == "dense"


# ------------------------------------------------------------------ packed sequences

RESTARTS = torch.tensor([[0, 1, 2, 0, 1, 2], [4, 0, 1, 2, 3, 0]])


def ids_of(positions: Tensor, front: int = 1) -> Tensor:
    """Segment ids as Hugging Face computes them: a new one wherever positions do not go on by one."""
    prepend = positions[:, :front] - 1 if front else None
    return (positions.diff(dim=-1, prepend=prepend) != 1).cumsum(-1)


def same(ids: Tensor, other: Tensor | None = None) -> Tensor:
    return ids[:, :, None] == (ids if other is None else other)[:, None, :]


def ordered(positions: Tensor, other: Tensor | None = None) -> Tensor:
    return (positions if other is None else other)[:, None, :] <= positions[:, :, None]


def test_segments() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0]])
    mask = proved(lambda i, j, d: same(d) & (j <= i), documents)
    assert mask.describe() == "causal+packed" and mask.segments is not None
    assert mask.segments[0].node is mask.segments[1].node
    mask = proved(lambda i, j, d, e: same(d, e), documents, documents.flip(1))
    assert mask.describe() == "packed" and mask.segments is not None
    assert mask.segments[0].node is not mask.segments[1].node
    assert proved(lambda i, j, d: same(d) & same(d // 2), documents).describe() == "dense"  # one pair is all there is
    assert proved(lambda i, j, d: ~same(d), documents).describe() == "dense"
    assert proved(lambda i, j, d: d[:, :, None] == d[:, None, :] + 1, documents).describe() == "dense"


@pytest.mark.parametrize("sign", [1, -1])
def test_positions_that_restart(sign: int) -> None:
    """Within a segment positions differ as indices do, so comparing positions is being causal."""

    def function(i: Tensor, j: Tensor, p: Tensor) -> Tensor:
        return same(ids_of(p)) & (ordered(p) if sign == 1 else (p[:, :, None] - p[:, None, :] >= 0))

    mask = proved(function, RESTARTS)
    assert mask.describe() == "causal+packed" and constants(mask)["causal"] is True and "offset" not in constants(mask)
    window = proved(
        lambda i, j, p: same(ids_of(p)) & ordered(p) & (p[:, :, None] - p[:, None, :] < 2), RESTARTS
    )
    assert (window.describe(), window.window_left) == ("window+packed", 1)


def test_what_is_prepended_does_not_matter() -> None:
    def function(i: Tensor, j: Tensor, p: Tensor) -> Tensor:
        return same((p.diff(dim=-1, prepend=p[:, -1:] * 7) != 1).cumsum(-1)) & ordered(p)

    assert proved(function, RESTARTS).describe() == "causal+packed"


# Positions in which every wrong reading of the lemma lets through, or keeps back, something else.
WILD = torch.tensor([[7, 3, 4, 0, 1, 2, 5, 6], [2, 9, 3, 4, 8, 9, 0, 1]])

NEAR_MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "steps of two": lambda p: same((p.diff(dim=-1, prepend=p[:, :1] - 1) != 2).cumsum(-1)) & ordered(p),
    "no element in front": lambda p: same(ids_of(p, 0)) & ordered(p[:, :-1]),
    "two elements in front": lambda p: same(ids_of(p, 2)[:, :8]) & ordered(p),
    "second differences": lambda p: same((p.diff(2, dim=-1, prepend=p[:, :1]) != 1).cumsum(-1)) & ordered(p[:, :-1]),
    "along the batch": lambda p: same((p.diff(dim=0, prepend=p[:1] - 1) != 1).cumsum(-1)) & ordered(p),
    "summed along the batch": lambda p: same((p.diff(dim=-1, prepend=p[:, :1] - 1) != 1).cumsum(0)) & ordered(p),
    "ids of other positions": lambda p: same(ids_of(p * 1 + p.flip(1))) & ordered(p),
    "ids of shifted positions": lambda p: same(ids_of(p[:, 2:])) & ordered(p[:, :6]),
    "ids of one row for all": lambda p: same(ids := ids_of(p), ids[:1].expand(2, -1)) & ordered(p, p[:1].expand(2, -1)),
    "positions of one row for queries": lambda p: same(ids_of(p)) & ordered(p[:1].expand(2, -1), p),
    "positions of one row for keys": lambda p: same(ids_of(p)) & ordered(p, p[:1].expand(2, -1)),
    "equal where they go on": lambda p: same((p.diff(dim=-1, prepend=p[:, :1] - 1) == 1).cumsum(-1)) & ordered(p),
    "not segments": lambda p: ~same(ids_of(p)) & ordered(p),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_of_the_lemma(name: str) -> None:
    function = NEAR_MISSES[name]
    n = function(WILD).shape[-1]
    mask = proved(lambda i, j, p: function(p), WILD, sizes=(2, n, n))
    assert mask.describe() == "dense" and not mask.causal


def test_cut_positions_keep_their_distance() -> None:
    """Ids and positions cut alike: the lemma holds, and for keys cut elsewhere the distance is the indices'."""
    mask = proved(lambda i, j, p: same(ids_of(p)[:, 2:]) & ordered(p[:, 2:]), WILD)
    assert mask.describe() == "causal+packed" and "offset" not in constants(mask)

    def last_queries(i: Tensor, j: Tensor, p: Tensor) -> Tensor:
        ids = ids_of(p)
        return same(ids[:, 2:], ids) & ordered(p[:, 2:], p)

    mask = proved(last_queries, WILD, sizes=(2, 6, 8))
    assert (mask.describe(), mask.offset) == ("causal+packed", Index(None, 2))


# ------------------------------------------------------------------ what is no structure

DENSE: dict[str, Callable[..., Any]] = {
    "or": lambda i, j: (j <= i) | (j < 2),
    "parity": lambda i, j: (i - j) % 2 == 0,
    "two chunk sizes": lambda i, j: (i // 4 == j // 4) & (i // 3 == j // 3),
    "chunk at another place than causal": lambda i, j: ((i + 1) // 4 == j // 4) & (j <= i),
    "chunk of twice the index": lambda i, j: (2 * i + 1) // 4 == j // 4,
    "twice the index": lambda i, j: j <= 2 * i,
    "twice both indices": lambda i, j: 2 * j <= 2 * i + 3,
    "twice the key": lambda i, j: 2 * j <= 5,
    "half the index": lambda i, j: j <= i // 2,
    "another chunk": lambda i, j: i // 4 != j // 4,
    "never": lambda i, j: j < 0,
    "empty window": lambda i, j: (j <= i) & (j > i),
    "one key left out": lambda i, j: j != 2,
    "anti-causal, strict": lambda i, j: j > i,
    "a bound from below": lambda i, j: j > 1,
    "a bound of the query": lambda i, j: (j >= 0) & (i < 4),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_masks(name: str) -> None:
    mask = proved(DENSE[name])
    assert mask.describe() == "dense" and len(mask.dense) == 1
    assert not mask.causal and mask.window_left is None and mask.chunk is None and mask.kv_len is None


def test_bounds_of_unknown_order_are_dense() -> None:
    a, b = torch.tensor(1), torch.tensor(3)
    for function in (
        lambda i, j, a, b: (j <= i + a) & (j <= i + b),
        lambda i, j, a, b: (j < a) & (j < b),
        lambda i, j, a, b: (j <= i + a) & (j > i + b - 4),
        lambda i, j, a, b: j <= i + 2 * a,
        lambda i, j, a, b: j <= i - a,
        lambda i, j, a, b: (j <= i) & (j < 2 * a),
    ):
        assert proved(function, a, b).describe() == "dense"
    # Apart they are two terms: the first one is proved, the second one stays.
    mask = proved(lambda i, j, a, b: (j <= i + a, j <= i + b), a, b)
    assert mask.describe() == "dense" and mask.causal and len(mask.dense) == 1


def test_one_dense_term_leaves_the_others() -> None:
    mask = proved(lambda i, j, p: (j <= i, (i - j) % 2 == 0, p[:, None, :]), torch.rand(B, T) < 0.7)
    assert mask.describe() == "dense+padding" and mask.causal and len(mask.dense) == 1


def test_offset_of_another_kind_of_variable_is_dense() -> None:
    """An offset that depends on the query, or on a variable that is no batch, cannot be read at run time."""
    per_query = torch.tensor([0, 1, 1, 2, 3, 5])
    assert proved(lambda i, j, o: j <= i + o[:, None], per_query).describe() == "dense"
    traced = trace(lambda i, j, o: j <= i + o.reshape(-1, 1, 1), torch.tensor([1, 2]))
    assert explain_masks(traced.terms, traced.s, traced.t, {traced.b}).describe() == "causal"
    assert explain_masks(traced.terms, traced.s, traced.t, ()).describe() == "dense"
    assert data_vars(traced.terms) == {traced.b}
    traced = trace(lambda i, j, o: (i + o.reshape(-1, 1, 1)) // 4 == j // 4, torch.tensor([1, 2]))
    assert explain_masks(traced.terms, traced.s, traced.t, {traced.b}).describe() == "chunked"
    assert explain_masks(traced.terms, traced.s, traced.t, ()).describe() == "dense"


def test_variables_of_run_time_data() -> None:
    real = torch.rand(B, T) < 0.5
    traced = trace(lambda i, j, p: (p[:, None, :] & (j <= i)) | (j < 1), real)
    assert data_vars(traced.terms) == {traced.b, traced.t}
    assert data_vars(trace(lambda i, j: j <= i).terms) == set()


# ------------------------------------------------------------------ queries without keys


@pytest.mark.parametrize(
    ("function", "sizes", "empty"),
    [
        (lambda i, j: j <= i, (1, 6, 6), False),
        (lambda i, j: j <= i, (1, 9, 4), False),
        (lambda i, j: j <= i - 1, (1, 6, 6), True),
        (lambda i, j: (j <= i) & (j > i - 3), (1, 6, 6), False),
        (lambda i, j: (j <= i) & (j > i - 3), (1, 8, 6), False),
        (lambda i, j: (j <= i) & (j > i - 3), (1, 9, 6), True),
        (lambda i, j: (i - j).abs() <= 2, (1, 8, 6), False),
        (lambda i, j: (i - j).abs() <= 2, (1, 9, 6), True),
        (lambda i, j: (i // 4 == j // 4) & (j <= i), (1, 6, 6), False),
        (lambda i, j: (i // 4 == j // 4) & (j <= i), (1, 9, 6), True),
        (lambda i, j: j < 3, (1, 6, 6), True),
        (lambda i, j: (i + j) % 2 == 0, (1, 6, 6), True),
    ],
)
def test_may_be_empty(function: Callable[..., Tensor], sizes: tuple[int, int, int], empty: bool) -> None:
    traced = trace(function, sizes=sizes)
    mask = proved(function, sizes=sizes)
    rows = function(torch.arange(sizes[1])[:, None], torch.arange(sizes[2])).expand(sizes[1:])
    assert mask.may_be_empty(traced.s, traced.t) == empty
    assert empty or bool(rows.any(-1).all())


# ------------------------------------------------------------------ any conjunction of them


@dataclass(frozen=True)
class Data:
    start: Tensor
    starts: Tensor
    length: Tensor
    real: Tensor
    documents: Tensor
    positions: Tensor


def _cut(t: Tensor, n: int) -> Tensor:
    return t[:, :n]


Term = Callable[[Tensor, Tensor, Data], Tensor]


KINDS = ("upper", "lower", "abs", "chunk", "length", "real", "not_real", "documents", "packed", "either", "parity",
         "anything")  # fmt: skip


@st.composite
def terms(draw: Any) -> Term:
    """A random condition on query i and key j."""
    shift, width = draw(st.integers(-3, 3)), draw(st.integers(0, 4))
    where = draw(st.sampled_from(["nowhere", "0-d", "per batch"]))
    kind = draw(st.sampled_from(KINDS))

    def p(i: Tensor, data: Data) -> Tensor:
        if where == "nowhere":
            return i + shift
        return i + shift + (data.start if where == "0-d" else data.starts.reshape(-1, 1, 1))

    def term(i: Tensor, j: Tensor, data: Data) -> Tensor:
        n, m = i.shape[0], j.shape[0]
        ids = ids_of(data.positions)
        found: dict[str, Callable[[], Tensor]] = {
            "upper": lambda: j <= p(i, data),
            "lower": lambda: j > p(i, data) - width,
            "abs": lambda: (i + shift - j).abs() <= width,
            "chunk": lambda: p(i, data) // (width + 1) == j // (width + 1),
            "length": lambda: j < (data.length + shift if where == "0-d" else width + 2),
            "real": lambda: _cut(data.real, m)[:, None, :],
            "not_real": lambda: ~_cut(data.real, m)[:, None, :],
            "documents": lambda: _cut(data.documents, n)[:, :, None] == _cut(data.documents, m)[:, None, :],
            "packed": lambda: same(_cut(ids, n), _cut(ids, m)) & ordered(
                _cut(data.positions, n), _cut(data.positions, m)
            ),
            "either": lambda: (j <= p(i, data)) | (j < width),
            "parity": lambda: (i + j) % 2 == shift % 2,
            "anything": lambda: (j >= 0) & (i + j < 40),
        }  # fmt: skip
        return found[kind]()

    return term


@st.composite
def data(draw: Any, batch: int, size: int) -> list[Tensor]:
    def integers(low: int, high: int, *shape: int) -> Tensor:
        count = math.prod(shape)
        numbers = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return torch.tensor(numbers).reshape(shape)

    positions = integers(0, 3, batch, size).cumsum(1) % 5
    return [integers(0, 4), integers(0, 4, batch), integers(0, 6), integers(0, 1, batch, size).bool(),
            integers(0, 2, batch, size), positions]  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    groups=st.lists(st.lists(terms(), min_size=1, max_size=3), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(2, 6)),
    choose=st.data(),
)
def test_random_conjunctions(groups: Sequence[Sequence[Term]], sizes: tuple[int, int, int], choose: Any) -> None:
    """However terms meet, in one mask or in several: the structured mask is the conjunction, everywhere."""
    inputs = choose.draw(data(sizes[0], 6))

    def function(i: Tensor, j: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        held = Data(*given)
        found = []
        for group in groups:
            keep = group[0](i, j, held)
            for term in group[1:]:
                keep = keep & term(i, j, held)
            found.append(keep)
        return tuple(found)

    proved(function, *inputs, sizes=sizes)
