"""Is the frame that Dynamo traces right now compiled by our backend?

A substitution acts on the whole process, but other backends, training and ``capture=False`` must see the original.
So what is substituted begins, as code that Dynamo traces, with ::

    if compiling_for_us("gated_delta_rule"):
        ...the captured form...
    return original(...)

`compiling_for_us` runs while Dynamo traces, never in the compiled code: its answer is a constant of the trace, the
branch that is not taken leaves no node, and Dynamo compiles a frame anew for another backend or other options
anyway. Outside of tracing the answer is False.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sm12x_compile.options import OptionError, Options

logger = logging.getLogger("sm12x_compile")
_LONGEST_CHAIN = 16


@torch._dynamo.assume_constant_result
def compiling_for_us(feature: str = "") -> bool:
    """Whether the code being traced is compiled by ``backend="sm12x"`` with capture on.

    Args:
        feature: name of the pattern that the substitution serves; the option ``patterns`` can leave it out.
            Empty for substitutions that serve none.
    """
    options = current_options()
    if options is None or not options.capture:
        return False
    return not feature or options.wants_pattern(feature)


def current_options() -> Options | None:
    """The options of the backend call that the current trace will end in; None if the backend is not ours."""
    for function, keywords in _chain(_current_compiler()):
        if function is _our_backend():
            try:
                return Options.parse(keywords.get("options"))
            except OptionError:
                return None  # the backend itself will raise it
    return None


def _our_backend() -> Callable[..., Any]:
    from sm12x_compile.backend import sm12x  # it imports this package

    return sm12x


def _current_compiler() -> Any:
    """The backend of the trace in progress, as Dynamo holds it; None outside of tracing.

    `current_tx` and `compiler_fn` are private: where a torch version has neither, nothing is captured.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.compiler_fn
    except (ImportError, AttributeError):
        return None


def _chain(function: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """A backend and what it wraps, outermost first, with the keyword arguments given so far."""
    keywords: dict[str, Any] = {}
    for _ in range(_LONGEST_CHAIN):
        if function is None:
            return
        if isinstance(function, functools.partial):
            keywords = {**function.keywords, **keywords}
        held = getattr(function, "kwargs", None)  # torch.compile's wrapper holds mode and options
        if isinstance(held, Mapping):
            keywords = {**held, **keywords}
        yield function, keywords
        for name in ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__"):
            inner = getattr(function, name, None)
            if inner is not None and inner is not function:
                function = inner
                break
        else:
            return
