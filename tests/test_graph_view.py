"""Replacing a node by one in other strides: the same values, the same strides for the user, the same random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.graph_view import GraphView
from sm12x_compile.normalize import normalize
from sm12x_compile.pipeline import clean

aten = torch.ops.aten


@torch.library.custom_op("sm12x_tests::first_in_memory", mutates_args=())
def first_in_memory(x: Tensor) -> Tensor:
    """An op of another library, which reads memory in its order."""
    return x.as_strided((7,), (1,)).clone()


@first_in_memory.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(7)


SHAPE = (2, 3, 4, 5)


def x_of(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def replaced(
    function: Callable[[Tensor], Any], x: Tensor, order: tuple[int, ...] = (0, 2, 1, 3)
) -> tuple[GraphModule, list[Node]]:
    """`function` applied to ``sin(x)``, and the sine replaced by one whose memory has the dimensions in `order`.

    Returns:
        The graph, and the nodes that replacing has added.
    """
    gm = normalize(make_fx(lambda x: function(x.sin()), pre_dispatch=True, tracing_mode="fake")(x))
    (old,) = (n for n in gm.graph.nodes if n.target is aten.sin.default)
    view = GraphView(gm)
    back = [order.index(k) for k in range(len(order))]
    with gm.graph.inserting_before(old):
        moved = view.call(aten.permute.default, old.args[0], list(order))
        dense = view.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
        new = view.call(aten.sin.default, view.call(aten.permute.default, dense, back))
    before = set(gm.graph.nodes)
    view.replace(old, new)
    assert not old.users
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, [n for n in gm.graph.nodes if n not in before]


class _Checked(Interpreter):
    """Runs a graph and compares what every node gives with the fake value that it has."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            for value, real in zip(outputs(n.meta["val"]), outputs(result), strict=True):
                assert (tuple(value.shape), value.dtype) == (tuple(real.shape), real.dtype), n
                assert strides(value) == strides(real), n
        return result


def strides(x: Tensor) -> list[int]:
    """Strides that matter."""
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


def outputs(result: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


def sharing(tensors: list[Tensor]) -> list[list[bool]]:
    memory = [x.untyped_storage().data_ptr() for x in tensors]
    return [[a == b for a in memory] for b in memory]


def check(
    function: Callable[[Tensor], Any], shape: tuple[int, ...] = SHAPE, order: tuple[int, ...] = (0, 2, 1, 3),
    memory: tuple[int, ...] = (0, 1, 2, 3),
) -> list[Node]:  # fmt: skip
    """Values, strides, shared memory and random numbers are as they were; returns the nodes that were added.

    `memory` is the order of dimensions in memory before, `order` afterwards.
    """
    x = x_of(tuple(shape[k] for k in memory)).permute([memory.index(k) for k in range(4)])
    gm, added = replaced(function, x, order)
    torch.manual_seed(3)
    expected = outputs(function(x.sin()))
    torch.manual_seed(3)
    found = outputs(_Checked(gm).run(x))
    torch.testing.assert_close(found, expected)
    assert [strides(a) for a in found] == [strides(a) for a in expected]
    assert sharing(found) == sharing(expected)
    return added


def targets(nodes: list[Node]) -> list[object]:
    return [n.target for n in nodes]


COPY = [aten.permute.default, aten.clone.default, aten.permute.default]


def test_a_result_that_is_returned_keeps_its_strides() -> None:
    assert targets(check(lambda y: y)) == COPY
    assert targets(check(lambda y: y.exp())) == COPY  # what follows takes its strides
    assert targets(check(lambda y: (y.transpose(1, 2), y.exp()))) == COPY
    assert targets(check(lambda y: y, order=(0, 1, 2, 3), memory=(0, 3, 1, 2))) == COPY


def test_a_reader_with_strides_of_its_own_needs_no_copy() -> None:
    assert check(lambda y: y @ torch.ones(5, 6)) == []
    assert check(lambda y: y.clone(memory_format=torch.contiguous_format)) == []


def test_the_same_strides_need_no_copy() -> None:
    assert check(lambda y: (y, y.exp()), order=(0, 1, 2, 3)) == []
    # Dimensions of size 1 have no strides that matter.
    assert check(lambda y: (y, y.exp()), shape=(2, 1, 4, 5)) == []
    assert check(lambda y: (y, y.exp()), shape=(2, 3, 1, 5)) == []


def test_a_view_that_no_longer_fits_becomes_a_reshape() -> None:
    x = x_of()
    gm, added = replaced(lambda y: y.view(2, 3, 20) @ torch.ones(20, 2), x)
    assert added == [] and aten.view.default not in targets(list(gm.graph.nodes))
    assert aten.reshape.default in targets(list(gm.graph.nodes))
    torch.testing.assert_close(_Checked(gm).run(x), x.sin().view(2, 3, 20) @ torch.ones(20, 2))
    # One that does fit stays a view.
    gm, added = replaced(lambda y: y.view(2, 3, 4, 5, 1).squeeze(-1) @ torch.ones(5, 2), x)
    assert added == [] and aten.view.default in targets(list(gm.graph.nodes))


def test_views_of_the_result_that_are_returned_share_memory_as_before() -> None:
    check(lambda y: (y, y.transpose(1, 2), y[:, :1]))
    check(lambda y: (y.view(6, 20), y.view(6, 20)[0]))
    check(lambda y: (y.flatten(1, 2), y))
    check(lambda y: (y.transpose(1, 2).reshape(2, 4, 15), y))
    check(lambda y: (y.exp().view(24, 5), y.view(24, 5)))
    check(lambda y: y.split(2, dim=1))
    check(lambda y: (y.unbind(1)[2], *y.exp().chunk(2, dim=2)))


def test_the_strides_of_pieces() -> None:
    gm, added = replaced(lambda y: y.split(2, dim=2)[1] @ torch.ones(5, 2), x_of())
    assert added == []
    torch.testing.assert_close(_Checked(gm).run(x_of()), x_of().sin()[:, :, 2:] @ torch.ones(5, 2))


def test_readers_that_look_at_strides() -> None:
    """What reads memory as it lies, and ops of other libraries, which may have been promised their strides."""
    assert targets(check(lambda y: y.as_strided((3, 3), (5, 1)) @ torch.ones(3, 2))) == COPY
    assert targets(check(lambda y: torch.ops.sm12x_tests.first_in_memory(y) + 1.0)) == COPY
    assert targets(check(lambda y: torch.ops.sm12x_tests.first_in_memory(y.exp()) + 1.0)) == COPY


def test_the_order_of_random_numbers() -> None:
    """Numbers are drawn in the order of memory, so what they are drawn for keeps its strides."""
    check(lambda y: torch.rand_like(y) @ torch.ones(5, 2))
    check(lambda y: torch.rand_like(y.exp()) @ torch.ones(5, 2))
    check(lambda y: torch.nn.functional.dropout(y, 0.5, training=True) @ torch.ones(5, 2))
    check(lambda y: torch.bernoulli(y.abs().view(6, 20)) @ torch.ones(20, 2))
    check(lambda y: (torch.randn(3), torch.rand_like(y), y.view(-1), torch.randn(2)))


def test_writes_to_inputs_are_no_readers_of_strides() -> None:
    def function(x: Tensor, buffer: Tensor) -> Tensor:
        buffer.copy_(x.sin())
        return buffer * 2

    inputs = x_of(), torch.zeros(SHAPE)
    gm = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))
    (old,) = (n for n in gm.graph.nodes if n.target is aten.sin.default)
    view = GraphView(gm)
    with gm.graph.inserting_before(old):
        moved = view.call(aten.permute.default, old.args[0], [0, 2, 1, 3])
        dense = view.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
        new = view.call(aten.sin.default, view.call(aten.permute.default, dense, [0, 2, 1, 3]))
    view.replace(old, new)
    gm.graph.lint()
    gm.recompile()
    ours, theirs = torch.zeros(SHAPE), torch.zeros(SHAPE)
    torch.testing.assert_close(gm(x_of(), ours), function(x_of(), theirs))
    torch.testing.assert_close(ours, theirs)


def test_the_new_value_may_read_the_old_ones_place() -> None:
    """A value that is computed from the node itself is no reader to be redirected."""
    gm = normalize(make_fx(lambda x: x.sin().exp(), pre_dispatch=True, tracing_mode="fake")(x_of()))
    (old,) = (n for n in gm.graph.nodes if n.target is aten.sin.default)
    view = GraphView(gm)
    with gm.graph.inserting_after(old):
        new = view.call(aten.neg.default, old)
    view.replace(old, new)
    gm.recompile()
    torch.testing.assert_close(gm(x_of()), (-x_of().sin()).exp())


def test_calls_hold_their_fake_value() -> None:
    gm = normalize(make_fx(lambda x: x.sin(), pre_dispatch=True, tracing_mode="fake")(x_of()))
    view = GraphView(gm)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        node = view.call(aten.sum.dim_IntList, x, [1], keepdim=True)
    assert tuple(node.meta["val"].shape) == (2, 1, 4, 5)
    assert node.meta["val"].fake_mode is x.meta["val"].fake_mode


# ------------------------------------------------------------------ any readers

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda y: y.transpose(0, -1),
    "narrow": lambda y: y[..., 1:] if y.shape[-1] > 1 else y,
    "merge": lambda y: y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y,
    "split": lambda y: y.unflatten(0, (-1, 1)),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "exp": lambda y: y.exp(),
    "add": lambda y: y + y.sum(),
    "float64": lambda y: y.double(),
    "rand": lambda y: y + torch.rand_like(y),
    "contiguous": lambda y: y.contiguous(),
    "sum": lambda y: y.sum(0, keepdim=True),
    "flatten": lambda y: y.reshape(-1),
    "cat": lambda y: torch.cat([y, y], 0),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    chains=st.lists(st.lists(st.sampled_from(sorted(STEPS)), max_size=4), min_size=1, max_size=3),
    order=st.permutations(range(4)),
    memory=st.permutations(range(4)),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    returned=st.booleans(),
)
def test_random_readers(chains: Any, order: Any, memory: Any, shape: tuple[int, ...], returned: bool) -> None:
    def function(y: Tensor) -> list[Tensor]:
        found = [y] if returned else []
        for chain in chains:
            z = y
            for step in chain:
                z = STEPS[step](z)
                if len(chain) > 2 and step == "exp":
                    found.append(z)
            found.append(z)
        return found

    check(function, shape, tuple(order), tuple(memory))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    check(lambda y: (y, y.exp(), y.transpose(0, 1)), shape)
