"""Where patterns and kernels are registered, by this package and from outside it.

A *pattern* is a function called for every node whose target is one of its anchors::

    @register_pattern("silu_mul", anchors=[torch.ops.aten.mul.Tensor])
    def silu_mul(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None: ...

It answers with a `Rewrite` (replace this node by that op), a `Refusal` (nearly: here is what failed), or None
(not my business). See `patterns/attention.py` and `examples/own_pattern_and_kernel.py`.

A *kernel* is a function with the signature of a semantic op, and says which calls it accepts::

    @register_kernel("attention", "mylib.attention", accepts=lambda call, arch: YES)
    def my_attention(q, k, v, scale, causal=False, ...): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .arch import Arch
from .ops import OPS, define_custom_op

if TYPE_CHECKING:
    from .match import GraphView, Refusal, Rewrite


@dataclass(frozen=True)
class No:
    """A kernel declines a call, in one sentence that goes into the report."""

    reason: str

    def __bool__(self) -> bool:
        return False


class _Yes:
    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return "YES"


YES = _Yes()
Verdict = _Yes | No


@dataclass(frozen=True)
class Call:
    """One call of a semantic op, as a kernel's `accepts` sees it.

    ``call.q`` is the argument named q: a fake tensor (shape, stride, dtype, device; sizes may be symbolic) or
    a plain value. ``call.hint(n)`` turns a size into an int.
    """

    op: str
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        # Not self.arguments: a copy asks for attributes before it has any.
        arguments = self.__dict__.get("arguments", {})
        if name not in arguments:
            raise AttributeError(f"{self.__dict__.get('op')} has no argument {name!r}")
        return arguments[name]

    @staticmethod
    def hint(size: Any, default: int = 4096) -> int:
        """An int for a size that may be symbolic (its hint, else `default`)."""
        if isinstance(size, torch.SymInt):
            hint = size.node.hint
            return default if hint is None else int(hint)
        return int(size)


def accepts_unless(refusal: Callable[[Call, Arch], str | None]) -> Callable[[Call, Arch], Verdict]:
    """An `accepts` from a function that says why not in one sentence, or None."""

    def accepts(call: Call, arch: Arch) -> Verdict:
        reason = refusal(call, arch)
        return No(reason) if reason else YES

    return accepts


@dataclass(frozen=True)
class Kernel:
    """A way to compute a semantic op. Kernels with higher `merit` are asked first."""

    op: str
    name: str
    accepts: Callable[[Call, Arch], Verdict]
    run: Callable[..., Any]
    inline: bool
    merit: int
    overload: torch._ops.OpOverload | None
    triton: bool = False


PatternFunction = Callable[[Node, "GraphView"], "Rewrite | Refusal | None"]


@dataclass(frozen=True)
class Pattern:
    name: str
    anchors: frozenset[Any]
    recognise: PatternFunction
    merit: int
    packed: bool = False


_patterns: dict[str, Pattern] = {}
_kernels: dict[str, list[Kernel]] = {}
_qualnames: set[str] = set()
_complete = False


def load_built_in() -> None:
    """Register the patterns and kernels of this package, unless that is done."""
    global _complete
    if not _complete:
        _complete = True
        from . import lowering, patterns  # noqa: F401


def _after_built_in(function: Callable[..., Any]) -> None:
    """See to it that what others register comes after the built-in, and so may replace it."""
    if not function.__module__.startswith(f"{__package__}."):
        load_built_in()


def register_pattern(
    name: str, *, anchors: Sequence[Any], merit: int = 100, packed: bool = False
) -> Callable[[PatternFunction], PatternFunction]:
    """Register a recogniser; a name that exists is replaced, so a notebook cell can be run twice.

    Args:
        name: what the report and the option ``patterns`` call it.
        anchors: targets (``torch.ops.aten...`` overloads) that the family cannot be written without.
        merit: patterns with higher merit see the graph first; the built-in ones have 0.
        packed: it takes weights that are stored as MXFP4: where a graph decodes such weights, the pattern finds
            ``sm12x::mxfp4_weight`` in the place of the decoding (see `patterns/dequantise.py`).
    """
    if not anchors:
        raise ValueError(f"pattern {name!r} needs at least one anchor, e.g. torch.ops.aten.softmax.int")

    def register(function: PatternFunction) -> PatternFunction:
        _after_built_in(function)
        _patterns[name] = Pattern(name, frozenset(anchors), function, merit, packed)
        return function

    return register


def register_kernel(
    op: str,
    name: str,
    *,
    accepts: Callable[[Call, Arch], Verdict],
    inline: bool = False,
    merit: int = 100,
    triton: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kernel of a semantic op; a name that exists is replaced.

    Args:
        op: name of the semantic op, e.g. ``attention``.
        name: what the report and the option ``kernels`` call it.
        accepts: answers `YES` or ``No("why")`` for a call on an `Arch`.
        inline: the function is plain PyTorch and is traced into the graph, where Inductor can fuse it;
            otherwise it becomes an opaque custom op that shares the semantic op's fake.
        merit: order of asking, highest first; the built-in ones lie between 0 and 50. 5 or less is a last resort,
            which is always right and never races.
        triton: all that the function does on a GPU is launch Triton kernels and call PyTorch, and it keeps no tensor
            of a call: then it is called with fake tensors once, and its kernels are compiled beside the others'.

    Raises:
        ValueError: there is no such semantic op, or the function's parameters are not the op's, in its order
            (an opaque kernel gets its arguments by position; it may leave out the last ones if `accepts`
            declines calls that give them).
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; semantic ops: {', '.join(sorted(OPS))}")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _after_built_in(function)
        overload = None
        if not inline:
            meaning = OPS[op]
            _check_positional(op, name, function)
            overload = define_custom_op(
                _qualname(op, name), function, meaning.fake, meaning.mutates, meaning.schema
            )
        kernel = Kernel(op, name, accepts, function, inline, merit, overload, triton)
        others = [k for k in _kernels.get(op, []) if k.name != name]
        _kernels[op] = sorted([*others, kernel], key=lambda k: -k.merit)
        return function

    return register


def patterns() -> list[Pattern]:
    """All patterns, those with the highest merit first."""
    load_built_in()
    return sorted(_patterns.values(), key=lambda p: -p.merit)


def kernels(op: str) -> list[Kernel]:
    """The kernels of an op in order of merit."""
    load_built_in()
    return list(_kernels.get(op, []))


def unregister(name: str) -> None:
    """Forget the pattern or kernel of this name."""
    load_built_in()
    _patterns.pop(name, None)
    for op, found in _kernels.items():
        _kernels[op] = [k for k in found if k.name != name]


def _check_positional(op: str, name: str, function: Callable[..., Any]) -> None:
    known = list(OPS[op].signature.parameters)
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return
        if parameter.kind is parameter.KEYWORD_ONLY or known[position : position + 1] != [parameter.name]:
            raise ValueError(
                f"kernel {name!r}: parameter {parameter.name!r} must be positional and where {op!r} has it: "
                f"{', '.join(known)}"
            )


def _qualname(op: str, name: str) -> str:
    """A name that no kernel had before: graphs compiled with a kernel that is replaced still hold its op."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    base = f"sm12x_kernels::{op}__{plain}"
    qualname = next(q for q in chain([base], (f"{base}_{n}" for n in count(2))) if q not in _qualnames)
    _qualnames.add(qualname)
    return qualname
