"""Checks of what Dynamo traces while the data decide whether it happens at all."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .predicates import Predicate
from .provenance import _is_random, _name, _writes, base_of
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
    """The place in the graph where code under a data-dependent condition begins; -1 if the condition is certain."""
    for t in tests:
        if isinstance(t, Predicate):
            return _begin()
    return -1


def check(start: int) -> None:
    """Nothing since `mark` may have an effect that does not depend on the condition.

    Rewritten code writes under the condition; functions that it calls do not know of it.
    """
    if start >= 0:
        _check(start)


_before: dict[int, Any] = {}


@torch._dynamo.assume_constant_result
def _begin() -> int:
    for tracer in tracers():
        start = len(tracer.output.graph.nodes)
        _before[start] = _objects(tracer)
        return start
    return -1


@torch._dynamo.assume_constant_result
def _check(start: int) -> None:
    for tracer in tracers():
        before = _before.pop(start, None)
        graph = tracer.output.graph
        inside = list(islice(reversed(graph.nodes), len(graph.nodes) - start))[::-1]
        own = set(inside)
        for node in inside:
            why = _effect(node, own)
            if why:
                restart_without(f"{why} under a condition that depends on tensor values")
        if before is not None and _changed(tracer, before):
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
    if _is_random(node) and not _name(node).startswith(("empty", "new_empty")):
        return f"{_name(node)} draws random numbers"
    if not _writes(node) or not node.args:
        return None
    base = base_of(node.args[0]) if isinstance(node.args[0], Node) else node
    if base in own and base.op in ("call_function", "call_method"):
        return None
    return f"{_name(node)} writes a tensor"
