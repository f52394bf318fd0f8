"""Pointwise functions of one or two numbers, tabulated instead of matched.

``0.5 * g * (1 + erf(g / sqrt(2)))``, ``g / (1 + exp(-g))``, ``F.glu`` of parts in another order: there is no end of
spellings, but a function of one number is known by its values. What an expert computes between its matrices is read
as a formula over the results of the projections and evaluated in fp64. Only operators that are analytic take part,
and ReLU of such a result as it is, so two formulas that agree on an interval agree everywhere; far from zero fp32
is asked as well, where a spelling may overflow that the definition does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sm12x_compile.index_algebra import Apply, Element, Expr, Number, Var
from sm12x_compile.index_algebra.expr import argument, operand
from sm12x_compile.ops.moe import activate

from .routed import FLOATS, Reader

aten = torch.ops.aten

Evaluate = Callable[[Sequence[Tensor]], Tensor]
_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "exp": torch.exp,
    "tanh": torch.tanh,
}  # fmt: skip
_FUNCTIONS: dict[object, Callable[[Tensor], Tensor]] = {
    aten.silu.default: F.silu, aten.sigmoid.default: torch.sigmoid, aten.erf.default: torch.erf,
    aten.square.default: torch.square, aten.reciprocal.default: torch.reciprocal,
}  # fmt: skip
_CLOSE, _FAR_CLOSE = 1e-6, 1e-3  # authors write constants with seven digits or more
_FAR = (20.0, 90.0, 1e4, 1e6)


class NotTabulated(Exception):
    """It is no such function; the message says what it is instead, `leaves` what it is computed from."""

    def __init__(self, message: str, leaves: Sequence[Expr]) -> None:
        super().__init__(message)
        self.leaves = tuple(leaves)


@dataclass(frozen=True)
class Formula:
    """A function of `leaves`, the results of projections; `numbers` are the constants in it."""

    leaves: tuple[Expr, ...]
    numbers: tuple[float, ...]
    evaluate: Evaluate


def read_formula(reader: Reader, factors: Sequence[Expr], inner: Var) -> Formula:
    """The product of `factors` as a formula over what runs over `inner`.

    Raises:
        NotTabulated: it has more than two leaves, or a part that is no function of them.
    """
    reading = _Reading(reader, inner)
    parts = [reading.read(f) for f in factors]
    if len(reading.leaves) > 2:
        raise NotTabulated(f"a function of {len(reading.leaves)} values, where gate and up are known", reading.leaves)

    def product(values: Sequence[Tensor]) -> Tensor:
        result = torch.ones_like(values[0])
        for part in parts:
            result = result * part(values)
        return result

    return Formula(tuple(reading.leaves), tuple(dict.fromkeys(reading.numbers)), product)


def factor_between(formula: Formula, activation: str, alpha: float, *, swapped: bool) -> float | None:
    """The constant by which a formula is ``activation(gate) * up`` (of `ops.moe`); None if it is not."""
    count = len(formula.leaves)

    def both(dtype: torch.dtype, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.flatten().to(dtype) for x in torch.broadcast_tensors(gates[:, None], ups))
        values = [gate] if count == 1 else [up, gate] if swapped else [gate, up]
        joined = gate.double() if count == 1 else torch.cat([gate, up]).double()
        known = activate(joined, activation, count == 2, False, alpha, None)
        return formula.evaluate(values).double(), known

    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        ups = torch.tensor([1.0] if count == 1 else [-1.7, 0.9, 3.1], dtype=torch.float64)
        found, known = both(torch.float64, torch.linspace(-12, 12, 481, dtype=torch.float64), ups)
        factor = float((found * known).sum() / (known * known).sum())
        if not math.isfinite(factor) or factor == 0.0:
            return None
        factor = 1.0 if math.isclose(factor, 1.0, rel_tol=_CLOSE) else factor
        if not torch.allclose(found, factor * known, rtol=_CLOSE, atol=_CLOSE * abs(factor)):
            return None
        far = torch.tensor([s * v for v in _FAR for s in (-1.0, 1.0)], dtype=torch.float64)
        found, known = both(torch.float32, far, ups)
        return factor if torch.allclose(found, factor * known, rtol=_FAR_CLOSE, atol=_FAR_CLOSE) else None


def settled(reader: Reader, expr: Expr) -> Expr:
    """An expression without moves, casts and guards on top."""
    while True:
        made = reader.meaning(expr) if isinstance(expr, Element) else expr
        if isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
            expr = made.args[0]
        elif (guarded := reader.behind_guard(made)) is not None:
            expr = guarded
        else:
            return reader.resolve(expr) if isinstance(expr, Element) else expr


class _Reading:
    """Reads expressions down to the leaves, which it numbers."""

    def __init__(self, reader: Reader, inner: Var) -> None:
        self.reader, self.inner = reader, inner
        self.leaves: list[Expr] = []
        self.numbers: list[float] = []
        self._settled: list[Expr] = []

    def read(self, expr: Expr) -> Evaluate:
        expr = settled(self.reader, expr)
        made = self.reader.meaning(expr) if isinstance(expr, Element) else expr
        if isinstance(made, Number):
            number = float(made.value)
            self.numbers.append(number)
            return lambda values: torch.full_like(values[0], number)
        if not self.reader.depends(expr, self.inner):
            raise NotTabulated("a function of something else than the first matrix's result, too", self.leaves)
        if isinstance(made, Apply) and not self._is_projection(made):
            function = self._operator(made)
            if function is not None:
                return function
        if isinstance(expr, Element):
            named = self._named(expr)
            if named is not None:
                return named
        return self._leaf(expr)

    def _operator(self, made: Apply) -> Evaluate | None:
        if made.op == "pow":
            power = self._number(made.args[1])
            if power is None or power != int(power) or not 1 <= power <= 8:
                return None
            base, exponent = self.read(made.args[0]), int(power)
            return lambda values: base(values) ** exponent
        operator = _OPERATORS.get(made.op)
        if operator is None:
            return None
        args = [self.read(a) for a in made.args]
        return lambda values: operator(*(a(values) for a in args))

    def _named(self, element: Element) -> Evaluate | None:
        node = element.node
        if node.op != "call_function" or not node.args:
            return None
        target = node.target
        if target is aten.relu.default or (target in _LOWER_CLAMPS and _lower_limit(node) == (0, None)):
            # Of a leaf alone: anywhere else its kink may lie where no sample does.
            return _after(F.relu, self._leaf(settled(self.reader, Element(operand(node), element.index))))
        function = _FUNCTIONS.get(target)
        if target is aten.gelu.default:
            tanh = argument(node, 1, "approximate", "none") == "tanh"
            function = _gelu_tanh if tanh else F.gelu
        return None if function is None else _after(function, self.read(Element(operand(node), element.index)))

    def _leaf(self, expr: Expr) -> Evaluate:
        if expr not in self._settled:
            self._settled.append(expr)
            self.leaves.append(expr)
        number = self._settled.index(expr)
        return lambda values: values[number]

    def _is_projection(self, made: Apply) -> bool:
        """A sum of which no side is a pointwise function: a matrix's result and its bias."""
        if made.op != "add":
            return False
        for arg in made.args:
            expr = settled(self.reader, arg)
            inside = self.reader.meaning(expr) if isinstance(expr, Element) else expr
            if isinstance(inside, (Apply, Number)):
                return False
            if isinstance(expr, Element) and self._is_function(expr):
                return False
        return True

    def _is_function(self, element: Element) -> bool:
        return element.node.target in _FUNCTIONS or element.node.target in (aten.gelu.default, aten.relu.default)

    def _number(self, expr: Expr) -> float | None:
        made = self.reader.meaning(expr) if isinstance(expr, Element) else expr
        return float(made.value) if isinstance(made, Number) else None


_LOWER_CLAMPS = {aten.clamp.default, aten.clamp_min.default}


def _lower_limit(node: torch.fx.Node) -> tuple[object, object]:
    low = argument(node, 1, "min")
    return low, argument(node, 2, "max") if node.target is aten.clamp.default else None


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _after(function: Callable[[Tensor], Tensor], inside: Evaluate) -> Evaluate:
    return lambda values: function(inside(values))
