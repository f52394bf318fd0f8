"""Conditions that only the data decide, while both outcomes are computed.

A *certain* condition is None: code runs under it as written. A `Predicate` is a conjunction of 0-d bool tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .counted import condition
from .provenance import implies_hit, now, same_value
from .refusal import refuse


class Condition:
    """One 0-d bool tensor, and what is known about it.

    Attributes:
        value: the condition.
        nonempty: the condition is ``nonempty.any()``, if not None.
        hits, index: the condition is ``hits[index]``, if not None: the item of a loop over ``hits.nonzero()``.
        fact: the number of a condition on a count (`counted`), negative for its opposite; 0 if it is none.
    """

    def __init__(
        self, value: Tensor, nonempty: Tensor | None = None, hits: Tensor | None = None, index: int = 0, fact: int = 0
    ) -> None:
        self.value = value
        self.nonempty = nonempty
        self.hits = hits
        self.index = index
        self.fact = fact
        self.start = now()

    def follows_from_a_hit_in(self, mask: Tensor) -> bool:
        """Whether any True in `mask` makes the condition true."""
        if self.nonempty is not None:
            return same_value(self.nonempty, mask, self.start)
        if self.hits is not None:
            return implies_hit(mask, self.hits, self.index)
        return False


class Predicate:
    """All of `conditions`; `opposite` is what it was made from by negation, if it was."""

    def __init__(self, conditions: tuple[Condition, ...], opposite: Predicate | None = None) -> None:
        self.conditions = conditions
        self.opposite = opposite

    def tensor(self) -> Tensor:
        out = self.conditions[0].value
        for other in self.conditions[1:]:
            out = out & other.value
        return out

    def __bool__(self) -> bool:
        refuse("a condition that depends on tensor values decides what Python does here")


def of_tensor(value: Tensor) -> Predicate:
    """The truth of a tensor as it is now: the author may write it afterwards."""
    if value.numel() != 1:
        refuse("a tensor of several elements is used as a condition")
    value = value.reshape(())
    return Predicate((Condition(value.clone() if value.dtype == torch.bool else value != 0),))


def any_of(mask: Tensor) -> Predicate:
    """The condition ``mask.any()``."""
    if mask.dtype != torch.bool:
        mask = mask != 0
    return Predicate((Condition(mask.any(), nonempty=mask),))


def test(x: Any, under: Predicate | None = None) -> Any:
    """What an ``if`` under a condition would do with `x`: True or False if Python knows, else a `Predicate`."""
    if isinstance(x, bool):
        found = condition(x, () if under is None else tuple([c.fact for c in under.conditions if c.fact]))
        if isinstance(found, tuple):
            return Predicate((Condition(found[0], fact=found[1]),))
        return x if found is None else found
    return truth(x)


def truth(x: Any) -> Any:
    """What `test` says of anything but a count."""
    if isinstance(x, Predicate):
        return x
    if isinstance(x, Tensor):
        return of_tensor(x)
    if hasattr(x, "_as_condition"):
        return x._as_condition()
    return bool(x)


def is_data(t: Any) -> bool:
    return isinstance(t, Predicate)


def may(t: Any) -> bool:
    """Whether the branch behind a `test` can run."""
    return True if isinstance(t, Predicate) else t


def may_not(t: Any) -> bool:
    return True if isinstance(t, Predicate) else not t


def certainly(x: Any) -> bool:
    """The truth of `x`, which must not depend on data."""
    t = truth(x)
    if isinstance(t, Predicate):
        refuse("a condition that depends on tensor values decides what Python does here")
    return t


def not_(t: Any) -> Any:
    if isinstance(t, Predicate):
        if t.opposite is not None:
            return t.opposite
        fact = -t.conditions[0].fact if len(t.conditions) == 1 else 0
        return Predicate((Condition(~t.tensor(), fact=fact),), t)
    return not t


def and_(a: Any, b: Any) -> Any:
    if not isinstance(a, Predicate):
        return b if a else False
    if not isinstance(b, Predicate):
        return a if b else False
    return Predicate(a.conditions + b.conditions)


def or_(a: Any, b: Any) -> Any:
    if not isinstance(a, Predicate):
        return True if a else b
    if not isinstance(b, Predicate):
        return True if b else a
    return Predicate((Condition(a.tensor() | b.tensor()),))


def under(outer: Predicate | None, t: Any) -> Predicate | None:
    """The predicate of a branch: that of the code around it, and the branch's own test."""
    if not isinstance(t, Predicate):
        return outer
    return t if outer is None else Predicate(outer.conditions + t.conditions)


def narrowed(mask: Tensor, under: Predicate | None) -> Tensor:
    """`mask`, and the predicate where a hit in the mask does not imply it."""
    if under is not None:
        for condition in under.conditions:
            if not condition.follows_from_a_hit_in(mask):
                mask = mask & condition.value
    return mask
