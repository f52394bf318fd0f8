"""Integer index expressions: affine in their atoms, with bounds.

`Index` is a sum of ``coefficient * atom`` and a constant. Coefficients, constants and extents are ints, or sympy
expressions where a size is symbolic; plain ints stay plain, because layers repeat and sympy is slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Union

import sympy
import torch

if TYPE_CHECKING:
    from .expr import Element

Size = Union[int, sympy.Expr]  # noqa: UP007  (a runtime alias that Python 3.10 can build)


def size_of(value: Any) -> Size:
    """The size behind an int, a `torch.SymInt`, or an fx node that holds one.

    Raises:
        TypeError: `value` is none of these.
    """
    if isinstance(value, torch.fx.Node):
        value = value.meta.get("val")
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, sympy.Expr)):
        raise TypeError(f"not a size: {value!r}")
    if isinstance(value, torch.SymInt):
        return _plain(value.node.expr)
    return _plain(value)


def _plain(value: Size) -> Size:
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, sympy.Integer) else value


def add(a: Size, b: Size) -> Size:
    return a + b if isinstance(a, int) and isinstance(b, int) else _plain(sympy.expand(a + b))


def mul(a: Size, b: Size) -> Size:
    return a * b if isinstance(a, int) and isinstance(b, int) else _plain(sympy.expand(a * b))


@lru_cache(maxsize=4096)
def divide_exactly(a: Size, k: Size) -> Size | None:
    """``a / k`` where k is known to divide a, else None."""
    if isinstance(a, int) and isinstance(k, int):
        return a // k if k and a % k == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / k)
    return _plain(sympy.expand(quotient)) if quotient.is_integer and quotient.is_polynomial() else None


@lru_cache(maxsize=4096)
def known_nonnegative(value: Size) -> bool:
    """Whether ``value >= 0`` for every admissible value of its symbols (positive ones are at least 1)."""
    if isinstance(value, int):
        return value >= 0
    for extreme in value.atoms(sympy.Function):
        if type(extreme).__name__ in ("Max", "Min"):
            return _nonnegative_around(sympy.expand(value), extreme)
    shifted = value
    for symbol in value.free_symbols:
        if symbol.is_positive:
            shifted = shifted.subs(symbol, sympy.Symbol(f"_{symbol}", integer=True, nonnegative=True) + 1)
        elif not symbol.is_nonnegative:
            return False
    coefficients = sympy.expand(shifted).as_coefficients_dict()
    return all(bool(c.is_nonnegative) and bool(m.is_nonnegative) for m, c in coefficients.items())


def _nonnegative_around(value: sympy.Expr, extreme: sympy.Expr) -> bool:
    """``rest + c * Max(a, b, ...)``: with a helpful sign one argument suffices, else all must do."""
    c = value.coeff(extreme)
    rest = value - c * extreme
    if not c.is_number or rest.has(extreme):
        return False
    helpful = (c > 0) == (type(extreme).__name__ == "Max")
    tries = (known_nonnegative(_plain(sympy.expand(rest + c * arg))) for arg in extreme.args)
    return any(tries) if helpful else all(tries)


def same_size(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or sympy.expand(a - b) == 0


_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Var:
    """An index variable, ``0 <= var < extent``. Two variables are equal only if they are the same object."""

    name: str
    extent: Size
    serial: int = field(default_factory=lambda: next(_serial))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloorDiv:
    x: Index
    k: Size

    def __repr__(self) -> str:
        return f"({self.x} div {self.k})"


@dataclass(frozen=True)
class Mod:
    x: Index
    k: Size

    def __repr__(self) -> str:
        return f"({self.x} mod {self.k})"


@dataclass(frozen=True)
class Datum:
    """An integer that only the run knows: the value of an element of an integer tensor."""

    element: Element

    def __repr__(self) -> str:
        return repr(self.element)


Atom = Union[Var, FloorDiv, Mod, Datum]  # noqa: UP007


class Index:
    """``sum(coefficient * atom) + const``; immutable, compared by value."""

    __slots__ = ("_hash", "const", "terms")

    def __init__(self, terms: Mapping[Atom, Size] | None = None, const: Size = 0) -> None:
        kept = {a: c for a, c in (terms or {}).items() if not (isinstance(c, int) and c == 0)}
        self.terms: dict[Atom, Size] = _recombined(kept) if len(kept) > 1 else kept
        self.const: Size = const
        self._hash: int | None = None

    @staticmethod
    def of(value: Index | Atom | Size) -> Index:
        if isinstance(value, Index):
            return value
        return Index({value: 1}) if isinstance(value, (Var, FloorDiv, Mod, Datum)) else Index(None, value)

    def __add__(self, other: Index | Size) -> Index:
        if not isinstance(other, Index):
            return Index(self.terms, add(self.const, other))
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            terms[atom] = add(terms[atom], c) if atom in terms else c
        return Index(terms, add(self.const, other.const))

    def __neg__(self) -> Index:
        return self * -1

    def __sub__(self, other: Index | Size) -> Index:
        return self + (-other if isinstance(other, Index) else mul(other, -1))

    def __mul__(self, k: Size) -> Index:
        return Index({a: mul(c, k) for a, c in self.terms.items()}, mul(self.const, k))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.terms == other.terms and self.const == other.const

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((frozenset(self.terms.items()), self.const))
        return self._hash

    def __repr__(self) -> str:
        parts = [repr(a) if c == 1 else f"{c}*{a!r}" for a, c in self.terms.items()]
        if self.const != 0 or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)

    @property
    def is_const(self) -> bool:
        return not self.terms

    @property
    def var(self) -> Var | None:
        """The variable that this index is, if it is exactly one."""
        if len(self.terms) == 1 and self.const == 0:
            (atom, c), = self.terms.items()  # fmt: skip
            if c == 1 and isinstance(atom, Var):
                return atom
        return None

    def vars(self) -> set[Var]:
        found: set[Var] = set()
        for atom in self.terms:
            if isinstance(atom, Var):
                found.add(atom)
            elif isinstance(atom, (FloorDiv, Mod)):
                found |= atom.x.vars()
            else:
                for ix in atom.element.index:
                    found |= ix.vars()
        return found

    def has_datum(self) -> bool:
        return any(
            isinstance(a, Datum) or (isinstance(a, (FloorDiv, Mod)) and a.x.has_datum()) for a in self.terms
        )

    def subs(self, mapping: Mapping[Var, Index]) -> Index:
        """Replace variables, simplifying divisions that the new bounds resolve."""
        if not any(v in mapping for v in self.vars()):
            return self
        result = Index(None, self.const)
        for atom, c in self.terms.items():
            if isinstance(atom, Var):
                new = mapping.get(atom, Index({atom: 1}))
            elif isinstance(atom, FloorDiv):
                new = atom.x.subs(mapping).div(atom.k)
            elif isinstance(atom, Mod):
                new = atom.x.subs(mapping).mod(atom.k)
            else:
                new = Index({Datum(atom.element.subs(mapping)): 1})
            result = result + new * c
        return result

    def bounds(self) -> tuple[Size, Size] | None:
        """Least and greatest value, or None where the run decides."""
        low = high = self.const
        for atom, c in self.terms.items():
            span = _atom_bounds(atom)
            if span is None:
                return None
            if known_nonnegative(c):
                low, high = add(low, mul(c, span[0])), add(high, mul(c, span[1]))
            elif known_nonnegative(mul(c, -1)):
                low, high = add(low, mul(c, span[1])), add(high, mul(c, span[0]))
            else:
                return None
        return low, high

    def within(self, low: Size, high: Size) -> bool:
        """Whether ``low <= self < high`` always holds."""
        span = self.bounds()
        return (
            span is not None
            and known_nonnegative(add(span[0], mul(low, -1)))
            and known_nonnegative(add(add(high, mul(span[1], -1)), -1))
        )

    def outside(self, low: Size, high: Size) -> bool:
        """Whether ``self < low`` or ``self >= high`` always holds."""
        span = self.bounds()
        return span is not None and (
            known_nonnegative(add(span[0], mul(high, -1)))
            or known_nonnegative(add(add(low, mul(span[1], -1)), -1))
        )

    def divmod(self, k: Size) -> tuple[Index, Index]:
        """``(self div k, self mod k)``, as far as bounds resolve them."""
        if k == 1:
            return self, Index()
        quotient, rest = Index(), Index()
        for atom, c in self.terms.items():
            exact = divide_exactly(c, k)
            if exact is None:
                rest = rest + Index({atom: c})
            else:
                quotient = quotient + Index({atom: exact})
        exact = divide_exactly(self.const, k)
        if exact is not None:
            quotient = quotient + exact
        elif isinstance(self.const, int) and isinstance(k, int):
            quotient, rest = quotient + self.const // k, rest + self.const % k
        else:
            rest = rest + self.const
        if rest.within(0, k):
            return quotient, rest
        return quotient + _div_atom(rest, k), _mod_atom(rest, k)

    def div(self, k: Size) -> Index:
        return self.divmod(k)[0]

    def mod(self, k: Size) -> Index:
        return self.divmod(k)[1]


def _div_atom(x: Index, k: Size) -> Index:
    if x.const == 0 and len(x.terms) == 1:
        ((atom, c),) = x.terms.items()
        if c == 1 and isinstance(atom, FloorDiv):
            return atom.x.div(mul(atom.k, k))
        if c == 1 and isinstance(atom, Mod):
            parts = divide_exactly(atom.k, k)
            if parts is not None:
                return atom.x.div(k).mod(parts)
        smaller = divide_exactly(k, c)
        if c != 1 and smaller is not None:
            return Index({atom: 1}).div(smaller)
    return Index({FloorDiv(x, k): 1})


def _mod_atom(x: Index, k: Size) -> Index:
    if x.const == 0 and len(x.terms) == 1:
        ((atom, c),) = x.terms.items()
        if c == 1 and isinstance(atom, Mod) and divide_exactly(atom.k, k) is not None:
            return atom.x.mod(k)
        smaller = divide_exactly(k, c)
        if c != 1 and smaller is not None:
            return Index({atom: 1}).mod(smaller) * c
    return Index({Mod(x, k): 1})


def _atom_bounds(atom: Atom) -> tuple[Size, Size] | None:
    if isinstance(atom, Var):
        return 0, add(atom.extent, -1)
    if isinstance(atom, Mod):
        return 0, add(atom.k, -1)
    if isinstance(atom, Datum):
        return None
    span = atom.x.bounds()
    if span is None:
        return None
    low, high = span
    if isinstance(low, int) and isinstance(high, int) and isinstance(atom.k, int):
        return low // atom.k, high // atom.k
    if known_nonnegative(low):
        blocks = divide_exactly(add(high, 1), atom.k)
        return 0, add(blocks, -1) if blocks is not None else high
    return None


def _recombined(terms: dict[Atom, Size]) -> dict[Atom, Size]:
    """``k*c * (x div k) + c * (x mod k)`` is ``c * x``: undoes a split that was merged again."""
    for atom, c in terms.items():
        if isinstance(atom, Mod):
            partner = FloorDiv(atom.x, atom.k)
            found = partner in terms and same_size(terms[partner], mul(c, atom.k))
            if found and atom.x.const == 0:
                rest = Index({a: n for a, n in terms.items() if a is not atom and a != partner})
                return (rest + atom.x * c).terms
    return terms


def flatten(index: Iterable[Index], shape: Iterable[Size]) -> Index:
    """Row-major position of `index` in a block of this shape."""
    position = Index()
    for ix, size in zip(index, shape, strict=True):
        position = position * size + ix
    return position


def unflatten(position: Index, shape: tuple[Size, ...]) -> tuple[Index, ...]:
    """Inverse of `flatten`."""
    reversed_index: list[Index] = []
    for size in reversed(shape[1:]):
        position, remainder = position.divmod(size)
        reversed_index.append(remainder)
    return (position, *reversed(reversed_index)) if shape else ()
