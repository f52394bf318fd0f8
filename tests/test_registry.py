"""Registering patterns and kernels from outside: order, replacement, what a kernel is asked, error texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sm12x_compile import registry
from sm12x_compile.arch import CARDS
from sm12x_compile.ops import OPS
from sm12x_compile.registry import YES, Call, No, register_kernel, register_pattern, unregister

RELU = torch.ops.aten.relu.default
Q = torch.zeros(1, 2, 3, 4)


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty registry, and the real one back afterwards."""
    monkeypatch.setattr(registry, "_patterns", {})
    monkeypatch.setattr(registry, "_kernels", {})
    yield


def yes(call: Call, arch: Any) -> Any:
    return YES


def pattern_names() -> list[str]:
    return [p.name for p in registry.patterns()]


def kernel_names(op: str = "attention") -> list[str]:
    return [k.name for k in registry.kernels(op)]


def test_a_pattern_is_registered_and_replaced() -> None:
    @register_pattern("mine", anchors=[RELU])
    def first(anchor: Any, graph: Any) -> None:
        return None

    assert callable(first)
    (pattern,) = registry.patterns()
    assert (pattern.name, pattern.anchors, pattern.merit) == ("mine", frozenset([RELU]), 100)
    assert pattern.recognise is first

    @register_pattern("mine", anchors=[RELU, torch.ops.aten.silu.default], merit=3)
    def second(anchor: Any, graph: Any) -> None:
        return None

    (pattern,) = registry.patterns()
    assert pattern.recognise is second and len(pattern.anchors) == 2 and pattern.merit == 3


def test_patterns_come_by_merit() -> None:
    for name, merit in (("low", 0), ("high", 200), ("first", 100), ("second", 100)):
        register_pattern(name, anchors=[RELU], merit=merit)(lambda anchor, graph: None)
    assert pattern_names() == ["high", "first", "second", "low"]


def test_a_pattern_needs_an_anchor() -> None:
    with pytest.raises(
        ValueError, match=r"pattern 'mine' needs at least one anchor, e\.g\. torch\.ops\.aten"
    ):
        register_pattern("mine", anchors=[])
    assert pattern_names() == []


def test_an_opaque_kernel_is_a_custom_op_with_the_ops_fake() -> None:
    @register_kernel("attention", "mine.add-one", accepts=yes)
    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
        return v + (2 if causal else 1)

    (found,) = registry.kernels("attention")
    assert (found.op, found.name, found.inline, found.merit) == ("attention", "mine.add-one", False, 100)
    assert found.run is kernel and found.accepts is yes and found.overload is not None
    assert found.overload._schema.name.startswith("sm12x_kernels::attention__mine_add_one")
    assert torch.equal(found.overload(Q, Q, Q, 1.0), Q + 1)
    assert torch.equal(found.overload(Q, Q, Q, 1.0, causal=True), Q + 2)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        q, v = mode.from_tensor(Q), mode.from_tensor(torch.zeros(1, 1, 5, 6))
        fake = found.overload(q, v[..., :4], v, 1.0, out_dtype=torch.bfloat16)
    assert (tuple(fake.shape), fake.dtype) == ((1, 2, 3, 6), torch.bfloat16)


def test_an_opaque_kernel_may_write_what_its_op_writes() -> None:
    @register_kernel("causal_conv1d_update", "mine.conv", accepts=yes)
    def kernel(x: Tensor, w: Tensor, state_pool: Tensor, slots: Tensor, *rest: Any) -> Tensor:
        state_pool.add_(1)
        return x * 2

    (found,) = registry.kernels("causal_conv1d_update")
    assert found.overload is not None
    assert [a.name for a in found.overload._schema.arguments if a.alias_info and a.alias_info.is_write] == [
        "state_pool"
    ]
    pool = torch.zeros(2, 3, 4)
    found.overload(torch.zeros(1, 3, 1), torch.zeros(3, 4), pool, torch.tensor([0]))
    assert (pool == 1).all()


def test_an_inline_kernel_is_traced_as_it_is() -> None:
    @register_kernel("attention", "mine.inline", accepts=yes, inline=True, merit=7)
    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, **rest: Any) -> Tensor:
        return v

    (found,) = registry.kernels("attention")
    assert (found.inline, found.overload, found.run, found.merit) == (True, None, kernel, 7)


def test_kernels_come_by_merit_and_are_replaced() -> None:
    for name, merit in (("low", 0), ("high", 200), ("first", 100), ("second", 100)):
        register_kernel("attention", name, accepts=yes, inline=True, merit=merit)(lambda q, k, v, scale: v)
    assert kernel_names() == ["high", "first", "second", "low"]
    register_kernel("attention", "low", accepts=yes, inline=True, merit=300)(lambda q, k, v, scale: v)
    assert kernel_names() == ["low", "high", "first", "second"]
    assert kernel_names("mla") == []
    registry.kernels("attention").clear()  # a copy
    assert len(kernel_names()) == 4


def test_a_replaced_kernel_still_serves_graphs_compiled_with_it() -> None:
    register_kernel("attention", "mine", accepts=yes)(lambda q, k, v, scale: v + 1)
    old = registry.kernels("attention")[0].overload
    register_kernel("attention", "mine", accepts=yes)(lambda q, k, v, scale: v + 2)
    new = registry.kernels("attention")[0].overload
    assert old is not None and new is not None
    assert torch.equal(new(Q, Q, Q, 1.0), Q + 2) and torch.equal(old(Q, Q, Q, 1.0), Q + 1)


def test_names_that_look_alike_are_different_kernels() -> None:
    register_kernel("attention", "my.kernel", accepts=yes)(lambda q, k, v, scale: v + 1)
    register_kernel("attention", "my_kernel", accepts=yes)(lambda q, k, v, scale: v + 2)
    one, two = (k.overload for k in registry.kernels("attention"))
    assert one is not None and two is not None
    assert torch.equal(one(Q, Q, Q, 1.0), Q + 1) and torch.equal(two(Q, Q, Q, 1.0), Q + 2)


def test_an_unknown_op_lists_the_known() -> None:
    with pytest.raises(ValueError) as error:
        register_kernel("atention", "mine", accepts=yes)
    assert str(error.value) == f"unknown op 'atention'; semantic ops: {', '.join(sorted(OPS))}"


def test_an_opaque_kernel_takes_the_ops_parameters_in_its_order() -> None:
    """The dispatcher passes them by position: another order would be silently wrong."""

    def swapped(q: Any, v: Any, k: Any, scale: Any) -> Any:
        return v

    def keyword(q: Any, k: Any, v: Any, scale: Any, *, causal: bool = False) -> Any:
        return v

    def extra(q: Any, k: Any, v: Any, scale: Any, window: int = 0) -> Any:
        return v

    for function, name in ((swapped, "v"), (keyword, "causal"), (extra, "window")):
        with pytest.raises(
            ValueError, match=f"kernel 'mine': parameter '{name}' must be positional and where"
        ):
            register_kernel("attention", "mine", accepts=yes)(function)
        register_kernel("attention", "mine", accepts=yes, inline=True)(function)  # these are called by name
    register_kernel("attention", "mine", accepts=yes)(lambda q, k, v, *rest: v)
    assert kernel_names() == ["mine"]


def test_unregister() -> None:
    register_pattern("both", anchors=[RELU])(lambda anchor, graph: None)
    register_pattern("other", anchors=[RELU])(lambda anchor, graph: None)
    for op in ("attention", "mla"):
        register_kernel(op, "both", accepts=yes, inline=True)(lambda **kwargs: None)
    register_kernel("attention", "other", accepts=yes, inline=True)(lambda **kwargs: None)
    unregister("both")
    unregister("never registered")
    assert (pattern_names(), kernel_names(), kernel_names("mla")) == (["other"], ["other"], [])


def test_a_call_shows_its_arguments_by_name() -> None:
    call = Call("attention", {"q": Q, "causal": True})
    assert call.q is Q and call.causal is True
    with pytest.raises(AttributeError, match="attention has no argument 'window'"):
        _ = call.window
    assert not hasattr(call, "window") and copy.copy(call).q is Q


def test_hints_of_sizes() -> None:
    env = ShapeEnv()
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    size = FakeTensorMode(shape_env=env).from_tensor(torch.zeros(37), symbolic_context=context).shape[0]
    assert isinstance(size, torch.SymInt)
    assert Call.hint(size) == 37 and type(Call.hint(size)) is int
    assert Call.hint(5) == 5
    unbacked = env.create_unbacked_symint()
    assert Call.hint(unbacked) == 4096 and Call.hint(unbacked, 7) == 7


def test_verdicts() -> None:
    assert YES and repr(YES) == "YES"
    no = No("needs 131072 B of shared memory, the device gives 101376 B")
    assert not no and no.reason.startswith("needs")
    assert no == No(no.reason)


def test_a_kernel_decides_by_the_arch() -> None:
    def accepts(call: Call, arch: Any) -> Any:
        return YES if arch.wgmma else No(f"{arch.name} has no wgmma")

    register_kernel("attention", "mine", accepts=accepts, inline=True)(lambda **kwargs: None)
    (kernel,) = registry.kernels("attention")
    call = Call("attention", {"q": Q})
    assert kernel.accepts(call, CARDS["h200"]) is YES
    assert kernel.accepts(call, CARDS["rtx5090"]) == No("rtx5090 has no wgmma")
