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
        before = _before.get(start)
        graph = tracer.output.graph
        inside = list(islice(reversed(graph.nodes), len(graph.nodes) - start))[::-1]
        own = set(inside)
        for node in inside:
            why = _effect(node, own)
            if why:
                restart_without(f"{why} under a condition that depends on tensor values")
        if before is not None and _objects(tracer) != before:
            restart_without("an object is changed under a condition that depends on tensor values")
        return


def _objects(tracer: Any) -> Any:
    """Attributes of objects that exist outside of the trace, as far as they have been set."""
    effects = tracer.output.side_effects
    mutations = getattr(effects, "store_attr_mutations", {})
    new = torch._dynamo.variables.base.AttributeMutationNew
    return {
        (id(owner), name): id(value)
        for owner, values in mutations.items()
        if not isinstance(owner.mutation_type, new)
        for name, value in values.items()
    }


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
