"""Run a region beside the op's reference: does it compute the gated delta rule, and with which tags?

The region was found by structure (`delta_region.py`), its operands by shape (`delta_operands.py`); what is left are
the norm of q and k, the scale, and whether it is the delta rule at all. Its nodes run in fp64 on fresh random
operands, several draws. They are smooth in the operands, so agreement is no accident (`sm12x_compile/smooth.py`).
Layers repeat: a certificate is kept by the structure of the region.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from sm12x_compile.index_algebra import size_of
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.ops import gated_delta_rule as op
from sm12x_compile.smooth import NotSmooth, bench, close

from .delta_operands import Operand, Reading, readings
from .delta_region import Region, op_name, shape

TOLERANCE = 1e-7
MOST_ELEMENTS = 200_000_000  # of all values of a run
_EPS = (1e-6, 1e-5, 1e-12)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Uncertain(Exception):
    """The region is not the gated delta rule, or an experiment cannot tell; the message says why."""


@dataclass(frozen=True)
class Certificate:
    """What the experiments found: the reading (by position among the region's nodes) and the op's attributes."""

    operands: tuple[tuple[str, int, str], ...]
    output: tuple[int, str]
    transposed: bool
    factor: bool
    tokens: int
    scale: float
    qk_l2norm: str
    eps: float


_known: dict[Any, Certificate | str] = {}


def certify(region: Region) -> tuple[Reading, Certificate]:
    """The reading of a region that holds, and its attributes.

    Raises:
        Uncertain: none holds.
    """
    nodes = (*region.leaves, region.state, *region.nodes)
    place = {node: k for k, node in enumerate(nodes)}
    key = _structure(region, place)
    if key not in _known:
        try:
            _known[key] = _Experiment(region, place).run()
        except (Uncertain, NotSmooth) as reason:
            _known[key] = str(reason)
    found = _known[key]
    if isinstance(found, str):
        raise Uncertain(found)
    operands = {role: Operand(nodes[k], layout) for role, k, layout in found.operands}
    output = Operand(nodes[found.output[0]], found.output[1])
    return Reading(operands, output, found.transposed, found.factor, found.tokens), found


def _structure(region: Region, place: dict[Node, int]) -> Any:
    """Equal for regions that compute the same."""

    def described(x: Any) -> Any:
        return f"%{place[x]}" if x in place else f"outer {x.meta.get('val')}"

    text = []
    for node in region.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), described)
        text.append(f"{node.target} {args}")
    for node in (*region.leaves, region.state):
        value = node.meta.get("val")
        text.append(f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value))
    ends = [place[n] for n in (*region.outputs, *([region.final] if region.final is not None else [])) if n in place]
    return hash("\n".join(text)), len(text), tuple(ends), region.final is None, region.state.op == "placeholder"


class _Experiment:
    def __init__(self, region: Region, place: dict[Node, int]) -> None:
        self.region, self.place = region, place
        self.zeros = op_name(region.state) in ("zeros", "zeros_like", "new_zeros", "full")
        self.seed = 0
        self.sizes = _trials(region)
        self.size = self.sizes[0]
        tensors = (n for n in region.nodes if isinstance(n.meta.get("val"), Tensor))
        elements = sum(prod(map(self._number, shape_of(n))) for n in tensors)
        if elements > MOST_ELEMENTS:
            raise Uncertain(f"the recurrence holds {elements:.1e} values, too many to try it out")
        numbers = [a for n in region.nodes for a in n.args if isinstance(a, float) and 0 < a < 1e-2]
        self.eps = tuple(dict.fromkeys([*numbers, *_EPS]))

    def run(self) -> Certificate:
        reason = "no operands of a gated delta rule stand around this recurrence"
        for reading in readings(self.region):
            try:
                return self._try(reading)
            except Uncertain as failure:
                reason = str(failure)
        raise Uncertain(reason)

    def _try(self, reading: Reading) -> Certificate:
        first = self._draw(reading, max(self.eps) ** 0.5)
        found = self._evaluate(reading, first)
        uses = {op_name(n) for n in self.region.nodes}
        for norm, eps in [("none", 0.0), *(("sqrt", e) for e in self.eps)]:
            scale = self._scale(reading, first, found, norm, eps)
            if scale is None:
                continue
            for length in (0.4, 1.0, *([eps**0.5] if norm != "none" else [])):
                values = self._draw(reading, length)
                if not self._agrees(reading, values, self._evaluate(reading, values), scale, norm, eps):
                    raise Uncertain("on some operands the recurrence is not the gated delta rule")
            for size in (*self.sizes[1:], *self.sizes[:1]) if len(self.sizes) > 1 else ():
                self.size = size
                values = self._draw(reading, 1.0)
                if not self._agrees(reading, values, self._evaluate(reading, values), scale, norm, eps):
                    raise Uncertain("with another batch the recurrence is not the gated delta rule")
            if norm != "none":
                norm = "rsqrt" if "rsqrt" in uses else "sqrt"
            K = self._key_dim(reading)
            plain = [c for c in (1.0, K**-0.5) if abs(c / scale - 1) < 1e-6]
            operands = tuple((r, self.place[o.node], o.layout) for r, o in reading.operands.items())
            output = (self.place[reading.output.node], reading.output.layout)
            return Certificate(
                operands, output, reading.transposed, reading.factor, reading.tokens, plain[0] if plain else scale,
                norm, eps,
            )  # fmt: skip
        raise Uncertain("this recurrence with a decayed state is not the gated delta rule")

    # ------------------------------------------------------------ one draw

    def _key_dim(self, reading: Reading) -> int:
        return int(shape_of(reading.operands["k"].node)[-1])

    def _draw(self, reading: Reading, length: float) -> dict[Node, Tensor]:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for role, operand in reading.operands.items():
            size = self._shape(operand.node)
            normal = torch.randn(size, generator=generator, dtype=torch.float64)
            uniform = torch.rand(size, generator=generator, dtype=torch.float64)
            decay = -0.3 * uniform
            values[operand.node] = {
                "q": length * normal, "k": min(length, 0.5) * normal, "v": normal,
                "g": decay.exp() if reading.factor else decay, "beta": uniform,
            }[role]  # fmt: skip
        state = torch.randn(self._shape(self.region.state), generator=generator, dtype=torch.float64)
        values[self.region.state] = torch.zeros_like(state) if self.zeros else state
        return values

    def _evaluate(self, reading: Reading, values: dict[Node, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The region's output and final state, in fp64."""
        env: dict[Node, Any] = dict(values)
        ends = [reading.output.node, *([self.region.final] if self.region.final is not None else [])]
        needed = self._needed(ends, values)
        with bench(list(values.values()), widen=True):
            for node in self.region.nodes:
                if node not in needed or node in env:
                    continue
                given = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(env, n))
                args, kwargs = tree_map_only(torch.SymInt, self._number, given)
                kwargs = {k: torch.float64 if v in _FLOATS else v for k, v in kwargs.items() if k != "device"}
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[ends[0]], env[ends[1]] if len(ends) > 1 else None

    def _value(self, env: dict[Node, Any], node: Node) -> Any:
        if node in env:
            return env[node]
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._number(value)
        raise Uncertain(f"the recurrence reads {node.name} beside its operands")

    def _number(self, size: Any) -> int:
        size = size_of(size) if isinstance(size, torch.SymInt) else size
        return int(size if isinstance(size, int) else size.xreplace(self.size))

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(map(self._number, shape_of(node)))

    def _needed(self, ends: list[Node], values: dict[Node, Tensor]) -> set[Node]:
        inside, found = set(self.region.nodes), set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node in found or node in values or node not in inside:
                continue
            found.add(node)
            waiting += node.all_input_nodes
        return found

    # ------------------------------------------------------------ against the reference

    def _reference(
        self, reading: Reading, values: dict[Node, Tensor], scale: float, norm: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (to_op(values[o.node], o.layout) for o in map(reading.operands.get, _ORDER) if o)
        g = g.log() if reading.factor else g
        state = values[self.region.state]
        state = state.mT if reading.transposed else state
        start = None if self.zeros else state.reshape(-1, *state.shape[-3:])
        with torch.no_grad():
            try:
                o, final = op.reference(q, k, v, g, beta, scale, start, qk_l2norm=norm, eps=eps)
            except (RuntimeError, ValueError) as error:
                raise Uncertain(f"the operands do not fit together ({error})") from None
        final = final.reshape(state.shape)
        return from_op(o, reading.output.layout), final.mT if reading.transposed else final

    def _scale(
        self, reading: Reading, values: dict[Node, Tensor], found: tuple[Tensor, Tensor | None], norm: str, eps: float
    ) -> float | None:
        """The number that the output is of the op's with scale 1, if it is; the state must agree."""
        o, final = self._reference(reading, values, 1.0, norm, eps)
        if found[0].shape != o.shape or (found[1] is not None and not close(found[1], final, TOLERANCE)):
            return None
        square = float((o * o).sum())
        scale = float((found[0] * o).sum()) / square if square else 0.0
        return scale if scale and close(found[0], scale * o, TOLERANCE) else None

    def _agrees(
        self, reading: Reading, values: dict[Node, Tensor], found: tuple[Tensor, Tensor | None], scale: float,
        norm: str, eps: float,
    ) -> bool:  # fmt: skip
        o, final = self._reference(reading, values, scale, norm, eps)
        return close(found[0], o, TOLERANCE) and (found[1] is None or close(found[1], final, TOLERANCE))


_ORDER = ("q", "k", "v", "g", "beta")


def _trials(region: Region) -> list[dict[sympy.Symbol, int]]:
    """Numbers for the symbolic sizes of a region: those that it was traced with, and others.

    Raises:
        Uncertain: something else than the batch is symbolic.
    """
    batch, *rest = shape_of(region.state)
    if not isinstance(batch, int) and all(isinstance(n, int) for n in rest) and isinstance(batch, sympy.Symbol):
        symbols = {batch}
        traced = region.state.meta["val"].shape[0].node.hint
    else:
        symbols, traced = set(), 0
    for node in (*region.leaves, *region.nodes):
        value = node.meta.get("val")
        sizes = [size_of(value)] if isinstance(value, torch.SymInt) else shape(node) or ()
        if any(not isinstance(n, int) and n.free_symbols - symbols for n in sizes):
            raise Uncertain(
                "a size inside the recurrence is symbolic, and only its batch may be: tokens, heads and head dims "
                "must be known, as they are without dynamic=True or with torch._dynamo.mark_static"
            )
    if not symbols:
        return [{}]
    if not isinstance(traced, int):
        raise Uncertain("the batch of the recurrence is known at run time alone, so that it cannot be tried out")
    return [{batch: traced}, {batch: traced + 1}]


def to_op(x: Any, layout: str) -> Any:
    """From a layout to ``[B, T, H, ...]``."""
    x = x if "b" in layout else x.unsqueeze(0)
    return x.transpose(1, 2) if "ht" in layout else x if "t" in layout else x.unsqueeze(1)


def from_op(x: Any, layout: str) -> Any:
    """From ``[B, T, H, ...]`` to a layout."""
    x = x.transpose(1, 2) if "ht" in layout else x if "t" in layout else x.squeeze(1)
    return x if "b" in layout else x.squeeze(0)
