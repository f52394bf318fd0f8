"""`explain` and `assert_rewritten`: compile a model once and say what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .collect import collect
from .report import Report


def explain(
    fn_or_module: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile a function or module afresh, run it once under `torch.no_grad`, and return the report.

    Args:
        fn_or_module: what to compile; an already compiled module is unwrapped.
        *args, **kwargs: its inputs.
        options: backend options; ``codegen`` defaults to ``eager`` here, because a report needs no code.
    """
    from .backend import sm12x

    target = getattr(fn_or_module, "_orig_mod", fn_or_module)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    torch._dynamo.reset()
    given = {"codegen": "eager", **(options or {})}
    compiled = torch.compile(target, backend=sm12x, options=given)
    with collect() as report, torch.no_grad():
        compiled(*args, **kwargs)
    return report


def assert_rewritten(
    model: Callable[..., Any], inputs: Any, *, options: Mapping[str, Any] | None = None, **counts: int
) -> Report:
    """Assert that so many sites of each pattern are rewritten, e.g. ``attention=32``.

    Args:
        model: a module or function.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        options: backend options.
        **counts: pattern name = number of rewritten sites.

    Raises:
        AssertionError: a count differs; the message lists the near-misses.
        ValueError: no count was given.
    """
    if not counts:
        raise ValueError("say what to expect, e.g. assert_rewritten(model, inputs, attention=32)")
    if isinstance(inputs, Mapping):
        report = explain(model, options=options, **inputs)
    else:
        report = explain(model, *(inputs if isinstance(inputs, (tuple, list)) else (inputs,)), options=options)
    wrong = {name: report.count(name) for name, count in counts.items() if report.count(name) != count}
    if wrong:
        lines = [f"{name}: expected {counts[name]} rewritten, got {got}" for name, got in wrong.items()]
        lines += [f"near miss at {s.module or '?'} ({s.source}): {s.reason}" for s in report.near_misses]
        lines += report.warnings
        raise AssertionError("\n".join(lines))
    return report
