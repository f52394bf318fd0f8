"""Choose a kernel for every call of a semantic op: ask the candidates in order of merit, keep every No."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from sm12x_compile.arch import Arch
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.registry import YES, Call, Kernel, No, Verdict, kernels
from sm12x_compile.report import Floor, Site

from .splice import Splicer

logger = logging.getLogger("sm12x_compile")
REFERENCE = "reference"
LEFT_OUT = "left out by the option 'kernels'"


class Chooser(Protocol):
    """Chooses among the kernels that accept a call: a race."""

    def prepare(self, calls: Sequence[tuple[Call, Sequence[Kernel]]]) -> None: ...

    def choose(self, call: Call, accepted: Sequence[Kernel]) -> tuple[Kernel | None, list[tuple[str, str]]]: ...


def lower(
    gm: GraphModule,
    calls: Sequence[tuple[Site, Node]],
    options: Options,
    arch: Arch,
    race: Chooser | None = None,
) -> None:
    """Give every call a kernel; the sites learn which, and who declined.

    Args:
        gm: the graph with calls of semantic ops.
        calls: the sites and their calls.
        options: ``kernels`` allows or denies by name.
        arch: what the graph will run on, or is planned for.
        race: chooses among the kernels that accept; the first in order of merit, if not given.
    """
    splicer = Splicer(gm)
    if race is not None:
        ours = [_call(op, node) for op, node in ((_op(node), node) for _, node in calls) if op]
        race.prepare([(call, acceptances(call, arch, options)[0]) for call in ours])
    # In the order of the graph: what calls share must stand before the first of them.
    place = {node: k for k, node in enumerate(gm.graph.nodes)}
    for site, node in sorted(calls, key=lambda call: place[call[1]]):
        op = _op(node)
        if op is None:
            site.kernel = site.op  # a pattern of one's own may call any op
            continue
        site.floor = floor(_call(op, node), arch)
        names: list[str] = []
        waiting = [node]
        for call_node in waiting:  # a kernel may be written in terms of another semantic op
            name, refused = _lower_one(call_node, splicer, options, arch, waiting, race)
            known = {*names, *(other for other, _ in site.refused)}
            site.refused += [no for no in refused if no[0] not in known]
            names.append(name)
        site.kernel = " + ".join(names)


def plan(gm: GraphModule, calls: Sequence[tuple[Site, Node]], options: Options, arch: Arch) -> None:
    """Let the sites say what a card would get; the graph stays as it is. Arguments as for `lower`."""
    copies: dict[Node, Node] = {}
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    lower(GraphModule(gm, graph), [(site, copies[call]) for site, call in calls], options, arch)


def _lower_one(
    node: Node,
    splicer: Splicer,
    options: Options,
    arch: Arch,
    waiting: list[Node],
    race: Chooser | None,
) -> tuple[str, list[tuple[str, str]]]:
    """Give one call its kernel; returns which, and who declined or lost. Calls inside the kernel wait."""
    op = _op(node)
    assert op is not None
    call = _call(op, node)
    if race is None:
        chosen, refused = choose(call, arch, options)
    else:
        accepted, refused = acceptances(call, arch, options)
        chosen, lost = race.choose(call, accepted)
        refused = refused + lost
    if chosen is not None and chosen.overload is None:
        waiting += [n for n in splicer.inline(node, chosen) if _op(n)]
    elif chosen is not None:
        assert chosen.overload is not None
        node.target = chosen.overload
    return (chosen.name if chosen else REFERENCE), refused


def _call(op: str, node: Node) -> Call:
    return Call(op, torch.fx.node.map_arg(OPS[op].bind(node), lambda n: n.meta["val"]))


def _op(node: Node) -> str | None:
    """The name of the semantic op that a node calls."""
    return next((name for name, op in OPS.items() if node.target is op.overload), None)


def choose(call: Call, arch: Arch, options: Options) -> tuple[Kernel | None, list[tuple[str, str]]]:
    """The first kernel that accepts, and (name, why) of those asked before; None means the reference."""
    refused: list[tuple[str, str]] = []
    for kernel, why_not in _asked(call, arch, options):
        if why_not is None:
            return kernel, refused
        refused.append((kernel.name, why_not))
    return None, refused


def acceptances(call: Call, arch: Arch, options: Options) -> tuple[list[Kernel], list[tuple[str, str]]]:
    """All kernels that accept, in order of merit, and (name, why) of the others."""
    asked = list(_asked(call, arch, options))
    refused = [(kernel.name, why_not) for kernel, why_not in asked if why_not is not None]
    return [kernel for kernel, why_not in asked if why_not is None], refused


def _asked(call: Call, arch: Arch, options: Options) -> Iterator[tuple[Kernel, str | None]]:
    """Each kernel, in order of merit, and why it does not take the call."""
    for kernel in kernels(call.op):
        verdict = ask(kernel, call, arch) if options.wants_kernel(kernel.name) else No(LEFT_OUT)
        yield kernel, None if verdict else verdict.reason if isinstance(verdict, No) else "declined"


def ask(kernel: Kernel, call: Call, arch: Arch) -> Verdict:
    """A kernel's verdict; an exception in it is a No, with the exception as the reason."""
    try:
        verdict: Any = kernel.accepts(call, arch)
    except Exception as error:
        logger.warning("kernel %s failed to decide", kernel.name, exc_info=True)
        return No(f"its accepts() failed: {type(error).__name__}: {error}")
    if isinstance(verdict, No) or verdict is YES:
        return verdict
    return YES if verdict else No("declined")


def floor(call: Call, arch: Arch) -> Floor | None:
    """The least time of a call on a card, from its op's cost; symbolic sizes by their hints."""
    cost = OPS[call.op].cost
    if cost is None or not arch.bandwidth:
        return None
    arguments = {name: hinted(value) for name, value in call.arguments.items()}
    try:
        least = cost(arguments)
    except (TypeError, ValueError):
        return None
    seconds = max(least.bytes / arch.bandwidth, least.flops / arch.bf16_flops)
    return Floor(least.bytes, least.flops, seconds * 1e6)


class _Hinted:
    """A tensor's shape and dtype with every size an int."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(Call.hint(s) for s in tensor.shape)
        self.dtype = tensor.dtype

    def element_size(self) -> int:
        return self.dtype.itemsize

    def numel(self) -> int:
        total = 1
        for s in self.shape:
            total *= s
        return total


def hinted(value: Any) -> Any:
    """An argument as a cost function takes it: every size an int."""
    if isinstance(value, torch.Tensor):
        return _Hinted(value)
    return Call.hint(value) if isinstance(value, torch.SymInt) else value
