"""Python ints that a frame counts up: symbols from the first trace on.

A cache that keeps its length in an int (``self.length += n``) makes Dynamo compile twice: it takes the int for a
constant first, and for a symbol once it has changed. That it will change can be told at the end of the first trace,
when an attribute has been given another int than it had; the frame is then traced again, with the symbol.

Dynamo takes ints of modules for constants for good, and rightly: they are sizes. Only in frames that count in one is
an int that changes a symbol there too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from types import CodeType
from typing import Any

import torch
from torch import nn

from .runtime.refusal import originals
from .scope import options_for

logger = logging.getLogger("sm12x_compile")
_in_modules: set[CodeType] = set()
_names: dict[CodeType, set[str]] = {}  # a frame's code: its counters, as Dynamo names their sources


def counts_in_a_module(code: CodeType) -> bool:
    """Whether a frame of this code was seen to count in an attribute of a module."""
    return code in _in_modules


def counted_in(code: CodeType) -> set[str]:
    """Dynamo's names of the ints that a frame of this code was seen to count up."""
    return _names.get(code, set())


def install(undo: list[Callable[[], None]]) -> None:
    """Look for counters whenever Dynamo is about to compile a graph for our backend.

    Raises:
        ImportError, AttributeError: this torch has none of the places; then Dynamo counts as ever.
    """
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.pgo import CodeId, auto_dynamic, get_code_state  # noqa: F401 (missing ones shall be noticed here)

    compile_subgraph = OutputGraph.compile_subgraph

    @wraps(compile_subgraph)
    def compiling(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        options = options_for(self.compiler_fn)
        wanted = options is not None and options.capture and not self.export
        if wanted and torch._dynamo.config.automatic_dynamic_shapes:
            try:
                found = _make_symbols(self)
            except Exception:  # a torch that keeps its memory in another way: a graph more, never a failure
                logger.debug("Dynamo's memory of ints could not be read", exc_info=True)
                found = False
            if found:
                raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason="sm12x: a Python int is counted up")
        return compile_subgraph(self, tx, *args, **kwargs)

    OutputGraph.compile_subgraph = compiling  # type: ignore[method-assign]
    undo.append(lambda: setattr(OutputGraph, "compile_subgraph", compile_subgraph))
    undo.append(_in_modules.clear)
    undo.append(_names.clear)


def _make_symbols(graph: Any) -> bool:
    """Tell Dynamo which ints of the traced frame change; whether it did not know yet."""
    from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic

    root = graph.root_tx
    known = _memory(root)
    found = False
    code = originals.get(root.f_code, root.f_code)
    for owner, name, new in _counted(graph.side_effects):
        _names.setdefault(code, set()).add(name)
        entry = known.get(name)
        if entry is not None and entry.scalar is not auto_dynamic and entry.scalar != new:
            entry |= FrameStateSizeEntry.make_scalar(new)
            found = True
            if isinstance(owner, nn.Module):
                _in_modules.add(code)
    return found


def _memory(root: Any) -> Any:
    """What Dynamo remembers of a frame's inputs; older releases tell frames apart by their code alone."""
    from torch._dynamo.pgo import CodeId, get_code_state

    by_closure = "closure" in inspect.signature(CodeId.make).parameters
    frame = CodeId.make(root.f_code, root.closure) if by_closure else CodeId.make(root.f_code)
    return get_code_state()[frame].automatic_dynamic


def _counted(effects: Any) -> Iterator[tuple[Any, str, int]]:
    """Attributes that held an int and were given another: the object, the source's name in Dynamo, the new int."""
    from torch._dynamo.source import AttrSource

    for owner, attributes in effects.store_attr_mutations.items():
        held, source = getattr(owner, "value", None), getattr(owner, "source", None)
        if held is None or source is None:
            continue
        for name, variable in attributes.items():
            new = getattr(variable, "value", None)
            old = inspect.getattr_static(held, name, None)
            if type(new) is int and type(old) is int and new != old and "." not in name:
                place = AttrSource(source, name).name
                yield held, (place() if callable(place) else place), new
