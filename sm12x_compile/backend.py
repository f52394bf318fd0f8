"""The backend: what `torch.compile(model, backend="sm12x")` calls with every graph that Dynamo captured.

    Dynamo's graph --normalize--> normal form --patterns--> semantic ops --lowering--> kernels --Inductor--> code

Any failure on the way leaves Dynamo's graph, untouched, for Inductor, with the reason in the report: a model
never fails because of us.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule

from .arch import resolve
from .capture import wrap
from .capture.captured import captured_nodes, expand
from .capture.install import install
from .collect import active_reports
from .normalize import NotNormalizable, example_value, written_arguments
from .options import OptionError, Options
from .pipeline import device_of, transform
from .race.verify import Verification, verified
from .report import Report

logger = logging.getLogger("sm12x_compile")

Compiled = Callable[..., Any]

GRADIENTS = (
    "sm12x: this graph needs gradients (grad mode is on and parameters require grad), so it was left to Inductor. "
    "For inference call the model under torch.inference_mode() or torch.no_grad()."
)
_said: set[str] = set()


def sm12x(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The function behind ``backend="sm12x"``.

    Args:
        gm: a graph from Dynamo.
        example_inputs: its inputs (fake tensors).
        options: see `Options`.
        mode: as for Inductor; ``reduce-overhead`` turns CUDA graphs on.

    Raises:
        OptionError: an option is unknown or has a value that is not allowed.
    """
    try:
        parsed = Options.parse(options)
    except OptionError as error:
        raise _Shown(str(error)) from None
    wrap.install()  # after `uninstall`, the first call is where we learn that we are back
    install()
    arch, planned = resolve(parsed.arch, device_of(gm))
    report = Report(graphs=1, arch=arch.name, planned=planned)
    report.captures = [str(plan) for _, plan in captured_nodes(gm)]
    compiled = _compile(gm, example_inputs, parsed, mode, report)
    for collected in active_reports():
        _merge(report, collected)
    return compiled


class _Shown(OptionError, ShortenTraceback):
    """A mistake in the options, as the user sees it: Dynamo would wrap any other exception in its own."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


_Shown.__name__ = _Shown.__qualname__ = "OptionError"


def _compile(
    gm: GraphModule, inputs: Sequence[Any], options: Options, mode: str | None, report: Report
) -> Compiled:
    if _needs_gradients(gm):
        _say_once(report, GRADIENTS)
        return _finish(gm, inputs, options, mode, report)
    try:
        transformed = transform(gm, options, report)
    except NotNormalizable as reason:
        report.warn(f"a graph was left as it is: {reason}")
        logger.info("graph left as it is: %s", reason)
        return _finish(gm, inputs, options, mode, report)
    except Exception as error:
        report.warn(f"a graph was left as it is: {type(error).__name__}: {error}")
        logger.warning("sm12x could not transform a graph and left it as it is", exc_info=True)
        return _finish(gm, inputs, options, mode, report)
    report.sites = transformed.sites
    if not any(site.status == "rewritten" for site in transformed.sites):
        # Nothing to gain: Dynamo's own graph compiles to the same code, with fewer things that can go wrong.
        return _finish(gm, inputs, options, mode, report)
    normal = transformed.graph
    if options.codegen == "eager":
        return _verified(_guarded(normal, gm), transformed.verification, gm)
    try:
        return _verified(_finish(normal, inputs, options, mode, report), transformed.verification, gm)
    except Exception as error:
        report.sites = []
        report.warn(f"a graph was left as it is: its rewritten form did not compile ({type(error).__name__}: {error})")
        logger.warning("the rewritten graph did not compile; the original is compiled instead", exc_info=True)
        return _finish(gm, inputs, options, mode, report)


def _verified(compiled: Compiled, verification: Verification | None, gm: GraphModule) -> Compiled:
    """With the first call held against the user's own graph, if that is wanted."""

    def own_code() -> Compiled:
        if captured_nodes(gm):
            expand(gm)
        return gm.forward

    return verified(compiled, verification, own_code) if verification else compiled


def _finish(
    gm: GraphModule, inputs: Sequence[Any], options: Options, mode: str | None, report: Report
) -> Compiled:
    """Compile a graph as it is: Dynamo's, with the user's own code for what was captured, or a rewritten one."""
    if captured_nodes(gm):
        expand(gm)
        report.captures = []
    if options.codegen == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    started = time.perf_counter()
    patches = torch._inductor.list_mode_options(mode) if mode else {}
    if options.cuda_graphs is not None and options.cuda_graphs != "auto":
        patches["triton.cudagraphs"] = bool(options.cuda_graphs)
    wants_graphs = bool(patches.get("triton.cudagraphs"))
    on_cuda = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in inputs)
    if wants_graphs and not on_cuda:
        report.cuda_graph = (False, "the graph does not run on CUDA")
    elif wants_graphs:
        report.cuda_graph = (True, "asked for; Inductor logs it if it skips a graph")
    else:
        report.cuda_graph = (False, "not asked for (cuda_graphs=True turns them on)" if on_cuda else None)
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches or None)
    report.add_seconds("inductor", time.perf_counter() - started)
    return compiled


def _guarded(normal: GraphModule, original: GraphModule) -> Compiled:
    """The interpreted normal form; calls whose inputs alias a mutated one take the original graph.

    Inductor's own guards check this for compiled code; interpreted code has none.
    """
    placeholders = normal.graph.find_nodes(op="placeholder")
    position = {node: k for k, node in enumerate(placeholders)}
    written = {position[x] for node in normal.graph.nodes for x in written_arguments(node) if x in position}
    if not written:
        return normal.forward

    def run(*args: Any) -> Any:
        storages = [a.untyped_storage()._cdata if isinstance(a, torch.Tensor) else None for a in args]
        if any(storages.count(storages[k]) > 1 for k in written):
            return original.forward(*args)
        return normal.forward(*args)

    return run


def _needs_gradients(gm: GraphModule) -> bool:
    values = [example_value(n) for n in gm.graph.find_nodes(op="placeholder")]
    if not any(isinstance(v, torch.Tensor) and v.requires_grad for v in values):
        return False
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return True
    switches = gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return any(node.args[0] for node in switches)


def _say_once(report: Report, message: str) -> None:
    report.warn(message)
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


def _merge(new: Report, into: Report) -> None:
    into.sites += [replace(site, graph=into.graphs) for site in new.sites]
    into.captures += new.captures
    into.races += new.races
    into.graphs += 1
    into.arch, into.planned, into.cuda_graph = new.arch, new.planned, new.cuda_graph
    for stage, seconds in new.seconds.items():
        into.add_seconds(stage, seconds)
    for message in new.warnings:
        into.warn(message)


__all__ = ["OptionError", "sm12x"]
