"""Laying tensors out again from an index map: right on real data, by views alone, and refused in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sm12x_compile.arrange import CannotArrange
from sm12x_compile.graph_view import GraphView
from sm12x_compile.index_algebra import Datum, Element, Index, Mod, Size, Var, size_of

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int,
         aten.unsqueeze.default, aten.expand.default}  # fmt: skip


@dataclass
class Arranged:
    gm: GraphModule
    node: Node
    added: list[Node]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.gm(*inputs)

    @property
    def ops(self) -> list[object]:
        return [n.target for n in self.added]


def graph_of(
    *inputs: Tensor, function: Callable[..., Any] = lambda *x: x[0], dynamic: Sequence[int] = ()
) -> GraphModule:
    """The traced function; sizes in `dynamic` (dimensions of every input) are symbols."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:

        def fake(x: Tensor) -> Tensor:
            kinds = [DimDynamic.DYNAMIC if k in dynamic else DimDynamic.STATIC for k in range(x.dim())]
            context: Any = StatelessSymbolicContext(kinds)
            return mode.from_tensor(x, symbolic_context=context)

        return make_fx(function, pre_dispatch=True)(*map(fake, inputs))


def arranged(
    gm: GraphModule, element: Element, groups: Sequence[Sequence[Var]], *, expand: bool = True
) -> Arranged:
    """The graph with the element laid out again as its only output."""
    view, before = GraphView(gm), set(gm.graph.nodes)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        node = view.arrange(element, groups, expand=expand)
    added = [n for n in gm.graph.nodes if n not in before]
    output.args = (node,)
    gm.graph.lint()
    gm.recompile()
    return Arranged(gm, node, added)


def first_input(gm: GraphModule) -> Node:
    return gm.graph.find_nodes(op="placeholder")[0]


def at(index: Index, assigned: dict[Var, int]) -> int:
    return int(index.const) + sum(int(c) * assigned[v] for v, c in index.terms.items())


def expected(x: Tensor, index: Sequence[Index], groups: Sequence[Sequence[Var]]) -> Tensor:
    """The definition: dim k of the result runs over the variables of groups[k], row-major."""
    order = [v for group in groups for v in group]
    places = itertools.product(*(range(int(v.extent)) for v in order))
    elements = [x[tuple(at(ix, dict(zip(order, place, strict=True))) for ix in index)] for place in places]
    shape = [math.prod(int(v.extent) for v in group) for group in groups]
    return torch.stack(elements).reshape(shape) if elements else x.new_empty(shape)


def check(
    x: Tensor, index: Sequence[Index], groups: Sequence[Sequence[Var]], *, expand: bool = True
) -> Arranged:
    gm = graph_of(x)
    result = arranged(gm, Element(first_input(gm), tuple(index)), groups, expand=expand)
    found, wanted = result(x), expected(x, index, groups)
    if not expand:
        wanted_shape = [
            1 if group and not {v for v in group if any(v in ix.vars() for ix in index)} else math.prod(
                int(v.extent) for v in group
            )
            for group in groups
        ]  # fmt: skip
        assert list(found.shape) == wanted_shape
        found = found.expand(wanted.shape)
    assert torch.equal(found, wanted)
    assert set(result.ops) <= VIEWS, result.ops
    value, real = result.node.meta["val"], result(x)
    assert value.shape == real.shape
    assert all(a == b for n, a, b in zip(real.shape, value.stride(), real.stride(), strict=True) if n > 1)
    return result


# ------------------------------------------------------------------ random layouts


@dataclass
class Piece:
    """A variable in a dimension: it starts at `start` of `room` places."""

    var: Var
    start: int
    room: int


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], list[Index], list[list[Var]]]:
    """A source shape, the index of an element of it, and the groups it is to be laid out in."""
    count = draw(st.integers(1, 5))
    variables = [Var(f"v{k}", draw(st.integers(2, 3))) for k in range(count)]
    absent = set(draw(st.lists(st.sampled_from(variables), max_size=2, unique=True)))
    present = draw(st.permutations([v for v in variables if v not in absent]))
    shape: list[int] = []
    index: list[Index] = []
    while present or draw(st.integers(0, 3)) == 0:
        taken, present = present[: (n := draw(st.integers(0, 3)))], present[n:]
        pieces = []
        for v in taken:
            room = int(v.extent) + draw(st.integers(0, 2))
            pieces.append(Piece(v, draw(st.integers(0, room - int(v.extent))), room))
        stride, position = 1, Index()
        for piece in reversed(pieces):
            position = position + (Index.of(piece.var) + piece.start) * stride
            stride *= piece.room
        spare = draw(st.integers(0, 2))  # a tail behind the last whole block
        shape.append(stride + spare)
        index.append(position if pieces else Index(None, draw(st.integers(0, stride + spare - 1))))
    groups: list[list[Var]] = [[]]
    for v in draw(st.permutations(variables)):
        while draw(st.integers(0, 2)) == 0 and len(groups) < 7:
            groups.append([])
        groups[-1].append(v)
    return tuple(shape), index, groups


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(layout=layouts(), strides=st.randoms(use_true_random=False), expand=st.booleans())
def test_random_layouts(layout: Any, strides: Any, expand: bool) -> None:
    """Fused, sliced and permuted dimensions, broadcast variables, empty groups; a source of any strides."""
    shape, index, groups = layout
    order = list(range(len(shape)))
    strides.shuffle(order)
    x = torch.arange(float(math.prod(shape))).reshape([shape[o] for o in order])
    check(x.permute([order.index(k) for k in range(len(shape))]), index, groups, expand=expand)


# ------------------------------------------------------------------ what it costs


def test_in_place_already_costs_nothing() -> None:
    b, s, d = Var("b", 2), Var("s", 3), Var("d", 4)
    ix = [Index.of(v) for v in (b, s, d)]
    x = torch.randn(2, 3, 4)
    assert check(x, ix, [[b], [s], [d]]).added == []
    x = torch.randn(2, 1, 3, 1, 4)
    ones = [ix[0], Index(), ix[1], Index(), ix[2]]
    assert check(x, ones, [[b], [], [s], [], [d]]).added == []
    assert check(x, ones, [[b], [], [s], [], [d]], expand=False).added == []


def test_dimensions_of_size_one_need_no_copy() -> None:
    b, s, d = Var("b", 2), Var("s", 3), Var("d", 4)
    ix = [Index.of(v) for v in (b, s, d)]
    one = [ix[0], Index(), ix[1], ix[2]]
    assert check(torch.randn(2, 1, 3, 4), one, [[b], [s], [d]]).ops == [aten.select.int]
    assert check(torch.randn(2, 1, 3, 4), one, [[b], [s], [], [d]]).ops == [aten.permute.default]
    assert check(torch.randn(2, 3, 4), ix, [[b], [], [s], [d]]).ops == [aten.unsqueeze.default]
    assert check(torch.randn(2, 5, 3, 4), [ix[0], Index(None, 2), ix[1], ix[2]], [[b], [], [s], [d]]).ops == [
        aten.slice.Tensor
    ]


def test_each_step_is_one_view() -> None:
    b, h, s, d = Var("b", 2), Var("h", 3), Var("s", 5), Var("d", 4)
    B, H, S, D = (Index.of(v) for v in (b, h, s, d))
    assert check(torch.randn(2, 5, 3, 4), [B, S, H, D], [[b], [h], [s], [d]]).ops == [aten.permute.default]
    fused = check(torch.randn(2, 5, 36), [B, S, H * 12 + D + 4], [[b], [h], [s], [d]])  # k of a fused qkv
    assert fused.ops == [aten.view.default, aten.slice.Tensor, aten.permute.default]
    x = torch.randn(2, 5, 36)
    assert fused(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert check(torch.randn(2, 8, 4), [B, S + 3, D], [[b], [s], [d]]).ops == [aten.slice.Tensor]
    merged = check(torch.randn(2, 3, 5, 4), [B, H, S, D], [[b, h], [s], [d]])
    assert merged.ops == [aten.reshape.default]
    grown = check(torch.randn(2, 4), [B, D], [[b], [h], [d]])
    assert grown.ops == [aten.unsqueeze.default, aten.expand.default] and grown.node.meta["val"].stride()[1] == 0
    left = check(torch.randn(2, 4), [B, D], [[b], [h], [d]], expand=False)
    assert left.ops == [aten.unsqueeze.default] and tuple(left.node.meta["val"].shape) == (2, 1, 4)


def test_broadcast_in_a_part_of_a_group_is_expanded_anyway() -> None:
    b, h, d = Var("b", 2), Var("h", 3), Var("d", 4)
    result = check(torch.randn(2, 4), [Index.of(b), Index.of(d)], [[b, h], [d]], expand=False)
    assert tuple(result.node.meta["val"].shape) == (6, 4)


# ------------------------------------------------------------------ symbolic sizes


def test_symbolic_sizes() -> None:
    """One graph, laid out once, right for other lengths."""
    gm = graph_of(torch.randn(3, 7, 24), dynamic=(0, 1))
    node = first_input(gm)
    sizes = [size_of(s) for s in node.meta["val"].shape]
    assert not isinstance(sizes[1], int)
    b, s, h, d = Var("b", sizes[0]), Var("s", sizes[1]), Var("h", 2), Var("d", 4)
    element = Element(node, (Index.of(b), Index.of(s), Index.of(h) * 12 + Index.of(d) + 8))
    result = arranged(gm, element, [[b, h], [s], [d]])
    for x in (torch.randn(3, 7, 24), torch.randn(2, 5, 24), torch.randn(4, 9, 24)):
        wanted = x.unflatten(2, (2, 12))[..., 8:].transpose(1, 2).flatten(0, 1)
        assert torch.equal(result(x), wanted)


def test_symbolic_strides() -> None:
    """Tokens in one dimension, ``S*b + s``, with S known to the run only."""
    gm = graph_of(torch.randn(3, 7, 4), function=lambda x: x.reshape(x.shape[0] * x.shape[1], 4), dynamic=(0, 1))
    source = first_input(gm)
    batch, length = (size_of(s) for s in source.meta["val"].shape[:2])
    (tokens,) = gm.graph.output_node().all_input_nodes
    b, s, d = Var("b", batch), Var("s", length), Var("d", 4)
    element = Element(tokens, (Index.of(b) * length + Index.of(s), Index.of(d)))
    result = arranged(gm, element, [[s], [b], [d]])
    for x in (torch.randn(3, 7, 4), torch.randn(2, 5, 4)):
        assert torch.equal(result(x), x.transpose(0, 1))


def test_sizes_are_computed_from_the_inputs() -> None:
    gm = graph_of(torch.randn(3, 7), dynamic=(0, 1))
    view = GraphView(gm)
    batch, length = (size_of(s) for s in first_input(gm).meta["val"].shape)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        nodes = [view.size(batch * length - 1), view.size(length), view.size(2 * batch + 3)]
        assert view.size(5) == 5
        with pytest.raises(CannotArrange, match=r"^no input of the graph tells the size u9$"):
            view.size(sympy.Symbol("u9", integer=True))
    output.args = (nodes,)
    gm.recompile()
    assert gm(torch.randn(4, 6)) == [23, 6, 11]
    assert all(isinstance(n.meta["val"], torch.SymInt) for n in nodes)


# ------------------------------------------------------------------ what views cannot do


def refusal(x: Tensor, make: Callable[..., tuple[Sequence[Index], Sequence[Sequence[Var]]]], *extents: Size) -> str:
    gm = graph_of(x)
    variables = [Var(name, n) for name, n in zip("ijkl", extents, strict=False)]
    index, groups = make(*variables)
    with pytest.raises(CannotArrange) as error:
        arranged(gm, Element(first_input(gm), tuple(index)), groups)
    return str(error.value)


def test_refusals() -> None:
    x = torch.randn(4, 6)

    def of(v: Var) -> Index:
        return Index.of(v)

    assert refusal(x, lambda i, j: ([of(i), of(j)], [[i]]), 4, 6) == "arg0_1[i, j] depends on more than [i]"
    assert refusal(x, lambda i: ([of(i), of(i)], [[i]]), 4) == "arg0_1[i, i] uses an index twice"
    assert refusal(x, lambda i, j: ([of(i), of(j).div(2)], [[i], [j]]), 4, 12) == "index (j div 2) is not affine"
    assert refusal(x, lambda i, j: ([of(i), Index({Mod(of(j), 6): 1})], [[i], [j]]), 4, 12) == (
        "index (j mod 6) is not affine"
    )
    assert refusal(x, lambda i, j: ([Index(), of(i) + of(j)], [[i], [j]]), 3, 4) == "index i + j overlaps"
    assert refusal(x, lambda i, j: ([Index(), of(i) * 2 + of(j)], [[i], [j]]), 2, 3) == "index 2*i + j overlaps"
    assert refusal(x, lambda i, j: ([Index(), of(i) * 2 + of(j) + 1], [[i], [j]]), 2, 2) == "index 2*i + j + 1 overlaps"
    assert refusal(x, lambda i: ([Index(), of(i) * -1 + 5], [[i]]), 6) == "index -1*i + 5 overlaps"
    assert refusal(x, lambda i, j: ([Index(), of(i) * 4 + of(j)], [[i], [j]]), 2, 2) == (
        "index 4*i + j leaves its dimension"
    )


def test_data_is_no_layout() -> None:
    gm = graph_of(torch.randn(4, 6), torch.tensor([3, 1]))
    x, picks = gm.graph.find_nodes(op="placeholder")
    i, j = Var("i", 2), Var("j", 6)
    element = Element(x, (Index.of(Datum(Element(picks, (Index.of(i),)))), Index.of(j)))
    with pytest.raises(CannotArrange, match="is not affine"):
        arranged(gm, element, [[i], [j]])
