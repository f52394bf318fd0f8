"""Masks proved: a predicate over query s and key t becomes causal, window, chunk, length, padding, segments.

Every atom of the conjunction must be explained, or the mask it came from is passed on as a dense tensor. An
unknown mask never becomes causal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from .index_algebra import Element, FloorDiv, Index, Var, known_nonnegative, look
from .index_algebra.expr import argument, operand, shape_of
from .index_algebra.index import Datum, add, mul
from .index_algebra.predicate import (
    FALSE,
    TRUE,
    All,
    AtMostZero,
    Holds,
    IsZero,
    Predicate,
    simplify,
)
from .index_algebra.predicate import Any as AnyOf

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskTerm:
    """One mask of the user's: keep where the predicate holds, else the score becomes (or gains) `drop_value`.

    `source` is the element to materialise if the predicate cannot be explained: a float to be added, or, if it
    is boolean, True where `source_keeps`. `filled` masks replace the score, others are added to it; `as_bool`
    asks for a boolean mask even where the drop value is finite.
    """

    keep: Predicate
    drop_value: float
    source: Element
    source_keeps: bool = True
    filled: bool = False
    as_bool: bool = False


@dataclass(frozen=True)
class StructuredMask:
    """What the terms amount to. Offsets are indices over `Datum` atoms (read at run time) and constants.

    With ``p = s + offset``: ``t <= p`` if causal, ``p - window_left <= t <= p + window_right``, same `chunk`,
    ``t < kv_len``, every `padding` element as expected, equal segments.
    """

    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    chunk: int | None = None
    offset: Index = field(default_factory=Index)
    kv_len: Index | None = None
    padding: tuple[Holds, ...] = ()
    segments: tuple[Element, Element] | None = None
    dense: tuple[MaskTerm, ...] = ()

    def may_be_empty(self, s: Var | None, t: Var) -> bool:
        """Whether some query may be left with no key, for all that is known while compiling."""
        if self.padding or self.dense or self.segments or self.kv_len is not None:
            return True
        if not (self.offset.is_const and known_nonnegative(self.offset.const)):
            return True
        if self.window_left is None and self.chunk is None:
            return False
        # Queries behind the last key may have left it outside their window or chunk.
        last = add(self.offset.const, add(s.extent, -1) if s is not None else 0)
        reach = self.window_left if self.window_left is not None and self.chunk is None else 0
        return not known_nonnegative(add(add(t.extent, reach - 1), mul(last, -1)))

    def describe(self) -> str:
        if self.dense:
            kind = "dense"
        elif self.chunk is not None:
            kind = "chunked"
        elif self.window_left is not None or self.window_right is not None:
            kind = "window"
        elif self.causal:
            kind = "causal"
        else:
            kind = ""
        parts = [kind] if kind else []
        parts += ["length"] if self.kv_len is not None else []
        parts += ["padding"] if self.padding else []
        parts += ["packed"] if self.segments else []
        return "+".join(parts) or "none"


@dataclass
class _Atoms:
    """The conjunction, sorted: t <= s + upper, t >= s + lower, t < length, ..."""

    uppers: list[Index] = field(default_factory=list)
    lowers: list[Index] = field(default_factory=list)
    lengths: list[Index] = field(default_factory=list)
    chunks: list[tuple[int, Index]] = field(default_factory=list)
    padding: list[Holds] = field(default_factory=list)
    segments: list[tuple[Element, Element]] = field(default_factory=list)

    def extended(self, other: _Atoms) -> _Atoms:
        merged = _Atoms()
        for name in self.__dataclass_fields__:
            for value in [*getattr(self, name), *getattr(other, name)]:
                if value not in getattr(merged, name):
                    getattr(merged, name).append(value)
        return merged


def explain_masks(terms: Sequence[MaskTerm], s: Var | None, t: Var, batch: Iterable[Var]) -> StructuredMask:
    """Prove what can be proved of the terms; each one that cannot is left in ``dense``."""
    atoms, dense, batch = _Atoms(), [], set(batch)
    mask = StructuredMask()
    for term in terms:
        keep = simplify(term.keep)
        if keep == TRUE:
            continue
        sorted_atoms = _sort_atoms(keep, s, t, batch)
        attempt = atoms.extended(sorted_atoms) if sorted_atoms is not None else None
        solved = _solve(attempt, s) if attempt is not None else None
        if attempt is None or solved is None:
            dense.append(term)
        else:
            atoms, mask = attempt, solved
    return replace(mask, dense=tuple(dense))


def data_vars(terms: Iterable[MaskTerm]) -> set[Var]:
    """Variables that index run-time data in the masks: these are batch variables if the masks are structured."""
    found: set[Var] = set()
    for term in terms:
        for atom in _leaves(term.keep):
            if isinstance(atom, Holds):
                found |= atom.element.vars()
            elif isinstance(atom, (AtMostZero, IsZero)):
                for a in atom.index.terms:
                    if isinstance(a, Datum):
                        found |= a.element.vars()
    return found


def _leaves(p: Predicate) -> list[Predicate]:
    return [leaf for q in p.parts for leaf in _leaves(q)] if isinstance(p, (All, AnyOf)) else [p]


def _sort_atoms(keep: Predicate, s: Var | None, t: Var, batch: set[Var]) -> _Atoms | None:
    parts = keep.parts if isinstance(keep, All) else (keep,)
    found = _Atoms()
    if keep == FALSE:
        return None
    # Segments first: inside a segment, positions that restart with it differ as the indices do.
    for part in parts:
        if isinstance(part, IsZero) and part.equal:
            pair = _segments(part.index, s, t, batch)
            if pair is not None:
                found.segments.append(pair)
                continue
            chunk = _chunk(part.index, s, t, batch)
            if chunk is None:
                return None
            found.chunks.append(chunk)
        elif isinstance(part, Holds):
            if not part.element.vars() <= batch | {t} or t not in part.element.vars():
                return None
            found.padding.append(part)
        elif not isinstance(part, AtMostZero):
            return None
    for part in parts:
        if isinstance(part, AtMostZero):
            index = _restart_lemma(part.index, s, t, found.segments)
            if not _sort_bound(index, s, t, batch, found):
                return None
    return found


def _sort_bound(index: Index, s: Var | None, t: Var, batch: set[Var], found: _Atoms) -> bool:
    """``c*t + d*s + rest <= 0`` as a bound of t; False if it is none."""
    rest = Index({a: c for a, c in index.terms.items() if a is not t and a is not s}, index.const)
    ct = index.terms.get(t, 0)
    cs = index.terms.get(s, 0) if s is not None else 0
    if ct not in (1, -1):
        return False
    bound = -rest if ct == 1 else rest
    if not _readable(bound, batch):
        return False
    if s is None or cs == -ct:
        (found.uppers if ct == 1 else found.lowers).append(bound)
    elif cs == 0 and ct == 1:
        found.lengths.append(bound + 1)
    else:
        return False
    return True


def _readable(index: Index, batch: set[Var]) -> bool:
    """Whether an offset is made of constants and of integers that depend on the batch alone."""
    return all(isinstance(a, Datum) and c == 1 and a.element.vars() <= batch for a, c in index.terms.items())


def _segments(index: Index, s: Var | None, t: Var, batch: set[Var]) -> tuple[Element, Element] | None:
    if s is None or index.const != 0 or len(index.terms) != 2:
        return None
    (a, ca), (b, cb) = index.terms.items()
    if not (isinstance(a, Datum) and isinstance(b, Datum)) or {ca, cb} != {1, -1}:
        return None
    for q, k in ((a.element, b.element), (b.element, a.element)):
        if q.vars() <= batch | {s} and k.vars() <= batch | {t} and s in q.vars() and t in k.vars():
            return q, k
    return None


def _chunk(index: Index, s: Var | None, t: Var, batch: set[Var]) -> tuple[int, Index] | None:
    """``(s + off) div C == t div C`` as ``(C, off)``."""
    divisions = [(a, c) for a, c in index.terms.items() if isinstance(a, FloorDiv)]
    if s is None or len(divisions) != 2 or len(index.terms) != 2 or not isinstance(index.const, int):
        return None
    (a, ca), (b, cb) = divisions
    if a.x.var is not t:
        (a, ca), (b, cb) = (b, cb), (a, ca)
    if a.x.var is not t or a.k != b.k or not isinstance(a.k, int) or (ca, cb) not in ((1, -1), (-1, 1)):
        return None
    shift = index.const if cb == 1 else -index.const
    offset = b.x - Index.of(s) + shift * a.k
    return (a.k, offset) if _readable(offset, batch) else None


def _restart_lemma(
    index: Index, s: Var | None, t: Var, segments: list[tuple[Element, Element]]
) -> Index:
    """Where segment ids are ``cumsum(diff(pos) != 1)``, equal ids at i and j mean ``pos[i] - pos[j] = i - j``."""
    data = {a: c for a, c in index.terms.items() if isinstance(a, Datum)}
    if s is None or len(data) != 2 or not segments:
        return index
    (a, ca), (b, cb) = data.items()
    if {ca, cb} != {1, -1}:
        return index
    of_t, of_s = (a, b) if t in a.element.vars() else (b, a)
    for q, k in segments:
        if q.node is not k.node or q.index[:-1] != k.index[:-1]:
            continue
        if _positions_behind(q) == of_s.element and _positions_behind(k) == of_t.element:
            rest = Index({x: c for x, c in index.terms.items() if x not in data}, index.const)
            return rest + (k.index[-1] - q.index[-1]) * index.terms[of_t]
    return index


def _positions_behind(segment: Element) -> Element | None:
    """The position p[i] of a segment id ``cumsum(diff(p, prepend=one element) != 1, -1)[i]``, along the last dim."""
    node = segment.node
    last = len(segment.index) - 1
    if node.target is not aten.cumsum.default or argument(node, 1, "dim") not in (-1, last):
        return None
    changed = operand(node)
    if changed.target is not aten.ne.Scalar or changed.args[1] != 1:
        return None
    diff = operand(changed)
    if diff.target is not aten.diff.default or argument(diff, 1, "n", 1) != 1:
        return None
    # Without exactly one element in front, id i does not stand where position i does.
    first = argument(diff, 3, "prepend")
    if argument(diff, 2, "dim", -1) not in (-1, last) or first is None or shape_of(first)[-1] != 1:
        return None
    return look(Element(operand(diff), segment.index))


def _solve(atoms: _Atoms, s: Var | None) -> StructuredMask | None:
    """One position p for all bounds, or None where they do not share one."""
    upper = _tightest(atoms.uppers, least=True)
    lower = _tightest(atoms.lowers, least=False)
    length = _tightest(atoms.lengths, least=True)
    if any(
        found and one is None
        for found, one in ((atoms.uppers, upper), (atoms.lowers, lower), (atoms.lengths, length))
    ):
        return None
    if len(atoms.chunks) > 1 or len(atoms.segments) > 1:
        return None
    mask = StructuredMask(
        kv_len=length, padding=tuple(atoms.padding), segments=atoms.segments[0] if atoms.segments else None
    )
    if s is None and upper is not None and lower is None:
        merged = _tightest([*atoms.lengths, upper + 1], least=True)
        return None if merged is None else replace(mask, kv_len=merged)
    base = upper
    if base is None and atoms.chunks:
        base = atoms.chunks[0][1]
    if base is None and lower is not None:
        base = Index(lower.terms)
    if base is None:
        return mask
    mask = replace(mask, offset=base, causal=upper is not None)
    if lower is not None:
        left = base - lower
        if not left.is_const or not isinstance(left.const, int) or left.const < 0:
            return None
        mask = replace(mask, window_left=left.const)
    if atoms.chunks:
        chunk, offset = atoms.chunks[0]
        if offset != base:
            return None
        mask = replace(mask, chunk=chunk)
    # A symmetric window reads better (and plans better) as a window around s than as a causal one shifted.
    if mask.causal and mask.window_left is not None and base.is_const and isinstance(base.const, int):
        right = base.const
        if 0 < right <= mask.window_left and s is not None and right == mask.window_left - right:
            mask = replace(mask, causal=False, window_left=right, window_right=right, offset=Index())
    return mask


def _tightest(bounds: list[Index], *, least: bool) -> Index | None:
    """The least (greatest) of several bounds, if their order is known."""
    best: Index | None = None
    for bound in bounds:
        if best is None:
            best = bound
            continue
        gap = bound - best if least else best - bound
        span = gap.bounds() if not gap.has_datum() else None
        if span is None:
            return None
        if known_nonnegative(span[0]):
            continue
        if not known_nonnegative(mul(span[1], -1)):
            return None
        best = bound
    return best


__all__ = ["MaskTerm", "StructuredMask", "data_vars", "explain_masks"]
