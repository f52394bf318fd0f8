"""Calls of captured functions: what stands in Dynamo's graph for them, and the way back.

A captured call is one node of Dynamo's graph, whose target is `captured_call`. Retracing it into the normal form
gives the semantic op. A graph that our backend declines gets the original function back (`expand`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .experiment import Refused, find_binding
from .fingerprint import Meaning
from .library import FEATURE, Binding, kinds_of
from .pure_code import Opaque

RESULTS = ("both", "o, None", "o")


@dataclass(frozen=True)
class Plan:
    """A function under one kind of call: how it binds to the op, and how to call the original instead."""

    original: Callable[..., Any]
    binding: Binding
    parameters: tuple[str, ...]
    plain: dict[str, Any]

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.binding.call(torch.ops.sm12x.gated_delta_rule, tensors)

    def run_original(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """The user's code, with its result in the form of the op's."""
        queue = iter(tensors)
        arguments = {n: self.plain[n] if n in self.plain else next(queue) for n in self.parameters}
        result = self.original(**arguments)
        return (result, None) if isinstance(result, Tensor) else result

    def __str__(self) -> str:
        code = self.original.__code__
        return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}) -> sm12x::{FEATURE}"


@dataclass(frozen=True)
class Candidate:
    """A function that may be captured: its meaning, and an unsubstituted copy."""

    meaning: Meaning
    original: Callable[..., Any]


candidates: list[Candidate] = []
_plans: list[Plan] = []
_plan_of: dict[Any, int] = {}
_bindings: dict[Any, Binding | str] = {}
refusals: dict[str, str] = {}


@torch._dynamo.assume_constant_result
def plan_for(candidate: int, described: tuple[tuple[str, Any], ...]) -> int:
    """Number of the plan for a call, a constant of the trace; -1 if the original must run.

    Args:
        candidate: index of the function in `candidates`.
        described: every parameter by name, with ``("tensor", rank, dtype)`` or its plain value.
    """
    key = (candidate, repr(described))
    if key not in _plan_of:
        _plan_of[key] = _make_plan(candidates[candidate], dict(described))
    return _plan_of[key]


def _make_plan(candidate: Candidate, described: dict[str, Any]) -> int:
    meaning = candidate.meaning
    kinds = kinds_of(described)
    key = (meaning.fingerprint, repr(list(described.values())))
    if key not in _bindings:
        try:
            _bindings[key] = find_binding(meaning, kinds)
        except (Refused, Opaque) as reason:
            _bindings[key] = str(reason)
        except Exception as error:  # the user's model must not fail because of an experiment
            _bindings[key] = f"the experiment failed: {type(error).__name__}: {error}"
    found = _bindings[key]
    if isinstance(found, str):
        refusals[meaning.function.__qualname__] = found
        return -1
    plain = {n: k.value for n, k in kinds.items() if not k.is_tensor}
    _plans.append(Plan(candidate.original, found, tuple(kinds), plain))
    return len(_plans) - 1


@torch._dynamo.assume_constant_result
def fact(plan: int, name: str) -> int:
    """One number of a plan, as a constant of the trace."""
    binding = _plans[plan].binding
    if name in ("q", "v"):
        return binding.roles.index(name)
    if name == "result":
        return RESULTS.index(binding.result)
    if name in ("time", "heads"):
        return 2 - (binding.heads_first == (name == "heads"))
    return int(getattr(binding, name))


@torch._dynamo.allow_in_graph
def captured_call(plan: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in Dynamo's graph for a captured call."""
    return _plans[plan].run(tensors)


def captured_nodes(gm: GraphModule) -> list[tuple[Node, Plan]]:
    """The captured calls in a graph of Dynamo's."""
    nodes = gm.graph.find_nodes(op="call_function", target=captured_call)
    return [(node, _plans[node.args[0]]) for node in nodes]  # type: ignore[index]


def expand(gm: GraphModule) -> None:
    """Put the original functions back into a graph that will not be lowered by us."""
    found = captured_nodes(gm)
    for node, plan in found:
        node.target = _named(plan)
        node.args = node.args[1:]
    if found:
        gm.recompile()


def _named(plan: Plan) -> Callable[..., Any]:
    original = partial(plan.run_original)
    original.__name__ = "original"  # type: ignore[attr-defined]  # torch.fx prints targets by name
    original.__module__ = __name__
    return original


def parameters_of(function: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any], bool] | None:
    """Names, defaults, and whether further keywords are taken; None where arguments cannot be told by name."""
    names, defaults, more = [], {}, False
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL):
            return None
        if p.kind is p.VAR_KEYWORD:
            more = True
            continue
        names.append(p.name)
        if p.default is not p.empty:
            defaults[p.name] = p.default
    return tuple(names), defaults, more


def forget() -> None:
    """Forget all candidates; graphs that hold a plan keep working."""
    candidates.clear()
    _plan_of.clear()
