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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule

from .arch import resolve
from .capture import wrap
from .capture.captured import captured_nodes, expand
from .capture.install import install
from .collect import active_reports
from .cuda_graphs.compiling import Outcome, compile_with_graphs
from .cuda_graphs.decision import Decision, decide
from .cuda_graphs.syncs import host_syncs
from .hoist import Hoisted, hoist
from .normalize import NotNormalizable, example_value, written_arguments
from .options import OptionError, Options
from .pipeline import device_of, transform
from .quantize import QUANTIZE
from .race.verify import Verification, verified
from .registry import load_built_in
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
    outcome = Outcome()
    outcome.tell(report)
    finish = Finish(example_inputs, parsed, mode, report, outcome)
    compiled = _compile(gm, parsed, report, finish)
    for collected in active_reports():
        _merge(report, collected)
        outcome.tell(collected)
    return compiled


class _Shown(OptionError, ShortenTraceback):
    """A mistake in the options, as the user sees it: Dynamo would wrap any other exception in its own."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


_Shown.__name__ = _Shown.__qualname__ = "OptionError"


def _compile(gm: GraphModule, options: Options, report: Report, finish: Finish) -> Compiled:
    if _needs_gradients(gm):
        _say_once(report, GRADIENTS)
        return finish(gm, gradients=True)
    try:
        transformed = transform(gm, options, report)
    except NotNormalizable as reason:
        report.warn(f"a graph was left as it is: {reason}")
        logger.info("graph left as it is: %s", reason)
        return finish(gm)
    except Exception as error:
        report.warn(f"a graph was left as it is: {type(error).__name__}: {error}")
        logger.warning("sm12x could not transform a graph and left it as it is", exc_info=True)
        return finish(gm)
    report.sites = transformed.sites
    if not any(site.status == "rewritten" for site in transformed.sites):
        # Nothing to gain: Dynamo's own graph compiles to the same code, with fewer things that can go wrong.
        return finish(gm)
    normal = transformed.graph
    hoisted = hoist(normal, drop=lambda node: node.target is QUANTIZE and options.moe_weights == "mxfp4_only")
    extra = () if hoisted is None else hoisted.fakes
    if options.codegen == "eager":
        finish.decide(normal)
        prepared = _with_prepared(hoisted, _guarded(normal, gm, len(finish.inputs)), report)
        return _verified(prepared, transformed.verification, gm)
    try:
        return _verified(_with_prepared(hoisted, finish(normal, extra), report), transformed.verification, gm)
    except Exception as error:
        report.sites = []
        report.warn(f"a graph was left as it is: its rewritten form did not compile ({type(error).__name__}: {error})")
        logger.warning("the rewritten graph did not compile; the original is compiled instead", exc_info=True)
        return finish(gm)


def _verified(compiled: Compiled, verification: Verification | None, gm: GraphModule) -> Compiled:
    """With the first call held against the user's own graph, if that is wanted."""

    def own_code() -> Compiled:
        if captured_nodes(gm):
            expand(gm)
        return gm.forward

    return verified(compiled, verification, own_code) if verification else compiled


def _with_prepared(hoisted: Hoisted | None, compiled: Compiled, report: Report) -> Compiled:
    """The compiled graph, given what was prepared from its weights; reports hear of each preparation."""
    if hoisted is None:
        return compiled

    def notify(line: dict[str, Any]) -> None:
        for listening in (report, *active_reports()):
            listening.weights.append(line)

    hoisted.compiled, hoisted.notify = compiled, notify
    return hoisted


@dataclass
class Finish:
    """Compiles a graph as it is: Dynamo's, with the user's own code for what was captured, or a rewritten one."""

    inputs: Sequence[Any]
    options: Options
    mode: str | None
    report: Report
    outcome: Outcome

    def __call__(self, gm: GraphModule, extra: Sequence[Any] = (), *, gradients: bool = False) -> Compiled:
        """`extra`: examples of inputs that the graph has beside those of Dynamo's."""
        if captured_nodes(gm):
            expand(gm)
            self.report.captures = []
        decision, patches = self.decide(gm, gradients=gradients)
        if self.options.codegen == "eager":
            return gm.forward
        started = time.perf_counter()
        compiled = compile_with_graphs(
            gm, [*self.inputs, *extra], decision, patches, self.outcome, gradients=gradients
        )
        self.report.add_seconds("inductor", time.perf_counter() - started)
        return compiled

    def decide(self, gm: GraphModule, *, gradients: bool = False) -> tuple[Decision, dict[str, Any]]:
        """Whether to record the graph, and Inductor's settings for the user's mode."""
        patches = torch._inductor.list_mode_options(self.mode) if self.mode else {}
        decision = decide(gm, self.options, patches, gradients=gradients)
        self.report.syncs = host_syncs(gm)
        if not decision.wanted:
            self.outcome.settle(decision, False, decision.reason)
        return decision, patches


def _guarded(normal: GraphModule, original: GraphModule, count: int) -> Compiled:
    """The interpreted normal form; calls whose inputs alias a mutated one take the original graph.

    Its first `count` inputs are those of the original. Inductor's own guards check this for compiled code;
    interpreted code has none.
    """
    placeholders = normal.graph.find_nodes(op="placeholder")
    position = {node: k for k, node in enumerate(placeholders)}
    written = {position[x] for node in normal.graph.nodes for x in written_arguments(node) if x in position}
    if not written:
        return normal.forward

    def run(*args: Any) -> Any:
        storages = [a.untyped_storage()._cdata if isinstance(a, torch.Tensor) else None for a in args]
        if any(storages.count(storages[k]) > 1 for k in written):
            return original.forward(*args[:count])
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
    into.arch, into.planned = new.arch, new.planned
    into.syncs += [sync for sync in new.syncs if sync not in into.syncs]
    for stage, seconds in new.seconds.items():
        into.add_seconds(stage, seconds)
    for message in new.warnings:
        into.warn(message)


load_built_in()
wrap.install()
install()

__all__ = ["OptionError", "sm12x"]
