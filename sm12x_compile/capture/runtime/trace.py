"""Checks of what Dynamo traces while the data decide whether it happens at all."""

from __future__ import annotations

from functools import partial
from itertools import count, takewhile
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .failing import may_fail
from .memory import name_of, written
from .predicates import Predicate
from .provenance import _is_random, base_of
from .refusal import refuse, restart_without, tracers

# How rewritten code itself writes, always under the predicate. Nobody else writes through these overloads.
OWN_WRITES = (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor, torch.ops.aten.index_add_.default)

_GRADIENTS = "it needs gradients; the rewritten form is for inference (torch.no_grad or torch.inference_mode)"


def needs_gradients(*values: Tensor) -> None:
    """Refuse what autograd would differentiate: masked rows would take part in the backward pass."""
    if torch.is_grad_enabled():
        for value in values:
            if value.requires_grad:
                refuse(_GRADIENTS)


def mark(*tests: Any) -> int:
    """Where code under a data-dependent condition begins, for `check`; -1 if the condition is certain."""
    for t in tests:
        if isinstance(t, Predicate):
            return _begin()
    return -1


def check(begin: int) -> None:
    """Nothing since `mark` may have an effect that does not depend on the condition.

    Rewritten code writes under the condition; functions that it calls do not know of it.
    """
    if begin >= 0:
        _check(begin)


_marks = count()
_before: dict[int, tuple[Node | None, list[tuple[Any, Any]]]] = {}


@torch._dynamo.assume_constant_result
def _begin() -> int:
    for tracer in tracers():
        mark = next(_marks)
        _before[mark] = next(iter(reversed(tracer.output.graph.nodes)), None), _objects(tracer)
        return mark
    return -1


@torch._dynamo.assume_constant_result
def _check(mark: int) -> None:
    for tracer in tracers():
        last, objects = _before.pop(mark)
        inside = list(takewhile(partial(is_not, last), reversed(tracer.output.graph.nodes)))[::-1]
        own = set(inside)
        for node in inside:
            why = _effect(node, own)
            if why:
                restart_without(f"{why} under a condition that depends on tensor values")
        if _changed(tracer, objects):
            restart_without("an object is changed under a condition that depends on tensor values")
        return


def _objects(tracer: Any) -> list[tuple[Any, Any]]:
    """Every object and container of Python that exists now, with what it holds.

    An object made later is not in the list, so it may change; the list keeps what it names alive.
    """
    effects = tracer.output.side_effects
    attributes: dict[int, Any] = {}
    for owner, values in getattr(effects, "store_attr_mutations", {}).items():
        attributes[id(owner)] = values
    found: dict[int, tuple[Any, Any]] = {}
    stack: list[Any] = list(getattr(effects, "id_to_variable", {}).values())
    for frame in tracers():
        stack += [*frame.symbolic_locals.values(), *frame.stack]
    while stack:
        value = stack.pop()
        if id(value) in found or _is_our_own(value):
            continue
        held = attributes.get(id(value))
        children = list(held.values()) if held else []
        fields = vars(value)  # attributes may be computed, and realise what Dynamo has not looked at yet
        items = fields.get("items")
        if isinstance(items, dict):
            children += list(items.values())
        elif isinstance(items, list):
            children += items
        changed = getattr(fields.get("mutation_type"), "is_modified", False)
        found[id(value)] = (value, (children, changed))
        stack += children
    return list(found.values())


def _changed(tracer: Any, before: list[tuple[Any, Any]]) -> bool:
    now = {id(value): state for value, state in _objects(tracer)}
    for value, (children, modified) in before:
        new = now.get(id(value))
        if new is None:
            continue  # out of reach: nobody can see it
        if new[1] != modified or [id(c) for c in new[0]] != [id(c) for c in children]:
            return True
    return False


def _is_our_own(value: Any) -> bool:
    """Objects of this package remember things about themselves, which nobody else sees."""
    kind = type(vars(value).get("value"))
    return str(getattr(kind, "__module__", "")).startswith(__package__ or "sm12x_compile")


def _effect(node: Node, own: set[Node]) -> str | None:
    if node.target in OWN_WRITES:
        return None
    if _is_random(node) and not name_of(node).startswith(("empty", "new_empty")):
        return f"{name_of(node)} draws random numbers"
    if may_fail(node):
        return f"{name_of(node)} may fail for other values, and would run"
    for target in written(node):
        base = base_of(target)
        if base not in own or base.op not in ("call_function", "call_method"):
            return f"{name_of(node)} writes a tensor"
    return None
