"""Inductor with CUDA graphs for one graph, and what came of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from ..normalize import example_value
from ..pipeline import device_of
from ..report import Report
from .decision import Decision, changing_size
from .host_values import Lifted, lift
from .outputs import kept
from .recording import Recordings, recordings
from .syncs import host_syncs

logger = logging.getLogger("sm12x_compile")
Compiled = Callable[..., Any]


class Outcome:
    """What is said about one graph, wherever it is said: a recording may still give up in a later call."""

    def __init__(self) -> None:
        self.state: tuple[bool, str | None] = (False, None)
        self._told: list[tuple[Report, int]] = []

    def tell(self, report: Report) -> None:
        """Add the graph to a report, and keep it up to date."""
        self._told.append((report, len(report.cuda_graphs)))
        report.cuda_graphs.append(self.state)

    def settle(self, decision: Decision, recorded: bool, reason: str | None) -> None:
        self.state = (recorded, reason)
        for report, place in self._told:
            report.cuda_graphs[place] = self.state
        if recorded or reason is None:
            return
        if decision.wanted:
            logger.info("no CUDA graph: %s", reason)
        if decision.asked:
            text = f"sm12x: a CUDA graph was asked for, and the graph runs without one: {reason}."
            warnings.warn(text, stacklevel=2)
            for report, _ in self._told:
                report.warn(text)


def compile_with_graphs(
    gm: GraphModule, inputs: Sequence[Any], decision: Decision, patches: Mapping[str, Any], outcome: Outcome,
    *, gradients: bool,
) -> Compiled:  # fmt: skip
    """`compile_fx`, recorded if the decision says so.

    Args:
        gm: the graph to compile.
        inputs: its example inputs.
        decision: whether to record.
        patches: Inductor's configuration for this compilation alone.
        outcome: gets to know what came of it.
        gradients: whether the graph needs them: then Inductor's CUDA graph trees see to it by themselves.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    if not decision.wanted:
        if decision.asked or "triton.cudagraphs" in patches:
            patches["triton.cudagraphs"] = False
        uncaptured: Any = compile_fx(gm, list(inputs), config_patches=patches or None)
        return uncaptured  # type: ignore[no-any-return]
    patches["triton.cudagraphs"] = True
    syncs = host_syncs(gm)
    with ExitStack() as stack:
        made = stack.enter_context(recordings(partial(outcome.settle, decision, False), watch=not gradients))
        arguments: dict[str, Any] = {}
        if not gradients and _has_ints(gm) and changing_size(gm) is None:
            # Inputs of the code are not those of the graph then, which its cache of whole graphs knows nothing of.
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            arguments["inner_compile"] = partial(compile_lifted, device_of(gm))
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches, **arguments)
    outcome.settle(decision, *_verdict(made, syncs))
    return compiled if gradients else kept(compiled, made.replays)


def _verdict(made: Recordings, syncs: Sequence[str]) -> tuple[bool, str | None]:
    count = len(made.parts)
    if count == 1:
        return True, None
    cause = f", because it waits for the GPU: {syncs[0]}" if syncs else ""
    if count > 1:
        return True, f"{count} CUDA graphs with code between them{cause}"
    reason = made.skipped[0].removeprefix("skipping cudagraphs due to ") if made.skipped else "nothing to record"
    return False, " ".join(reason.split()) + cause


def _has_ints(gm: GraphModule) -> bool:
    return any(isinstance(example_value(n), torch.SymInt) for n in gm.graph.find_nodes(op="placeholder"))


def compile_lifted(device: torch.device, gm: GraphModule, example_inputs: Sequence[Any], **known: Any) -> Compiled:
    """`compile_fx_inner` for a graph that is given ints: where possible they come to be tensors on the device."""
    from torch._inductor.compile_fx import compile_fx_inner

    lifted = lift(gm, device)
    if lifted is None:
        unchanged: Compiled = compile_fx_inner(gm, example_inputs, **known)
        return unchanged
    fakes = [n.meta["val"] for n in lifted.graph.graph.find_nodes(op="placeholder")][-lifted.values :]
    inputs = [example_inputs[k] for k in lifted.kept] + fakes
    static = known.pop("static_input_idxs", ())
    place = {old: new for new, old in enumerate(lifted.kept)}
    static = [place[k] for k in static if k in place] + list(range(len(lifted.kept), len(inputs)))
    return fed(compile_fx_inner(lifted.graph, inputs, static_input_idxs=static, **known), lifted, device)


def fed(compiled: Compiled, lifted: Lifted, device: torch.device) -> Compiled:
    """A function of the original inputs, in a list that it empties, from the one of the lifted inputs."""
    tensors: list[torch.Tensor] = []
    filled: list[int | None] = [None] * lifted.values

    def run(inputs: list[Any]) -> Any:
        if not tensors:
            with torch.inference_mode(False):
                tensors.extend(torch.zeros((), dtype=torch.int64, device=device) for _ in range(lifted.values))
        numbers = lifted.host(*[inputs[k] for k in lifted.ints])
        for k, tensor in enumerate(tensors):
            if filled[k] != numbers[k]:
                tensor.fill_(numbers[k])
                filled[k] = numbers[k]
        given = [inputs[k] for k in lifted.kept] + tensors
        inputs.clear()
        results = compiled(given)
        if not lifted.results:
            return results
        results = list(results)
        for k, number in zip(lifted.results, numbers[lifted.values :], strict=True):
            results[k] = number
        return results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
