"""Normal form → semantic ops → kernels, on one graph."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from .arch import Arch, resolve
from .cuda_graphs.positions import positions_as_tensors
from .lowering.linear import join_linears
from .lowering.linear_cpu import share_linears
from .lowering.select import lower, plan
from .marks import mark
from .match import GraphView, Refusal, Rewrite, module_of, source_of
from .normalize import declare_constants, example_value, normalize
from .options import Options
from .patterns.dequantise import WEIGHT, mark_packed, unmark
from .quantize import quantize_experts
from .race import Races, racing
from .race.verify import Verification, copied, verifies
from .registry import Pattern, patterns
from .report import Report, Site

logger = logging.getLogger("sm12x_compile")
aten = torch.ops.aten


@dataclass
class Transformed:
    """A rewritten graph and what there is to say about it."""

    graph: GraphModule
    sites: list[Site]
    verification: Verification | None = None


def transform(gm: GraphModule, options: Options, report: Report) -> Transformed:
    """Rewrite one graph of Dynamo's; `report` gets the time that it took.

    Raises:
        NotNormalizable: the graph must stay as it is.
    """
    started = time.perf_counter()
    normal = normalize(gm)
    normalized = time.perf_counter()
    device = device_of(gm)
    run_arch, _ = resolve("auto", device)
    plan_arch, _ = resolve(options.arch, device)
    original = copied(normal) if verifies(options, run_arch) else None
    found = recognise(normal, options)
    matched = time.perf_counter()
    sites = [site for site, _ in found]
    calls = [(site, call) for site, call in found if call is not None]
    if options.moe_weights != "keep":
        quantize_experts(normal, calls)
    if device.type == "cuda":
        positions_as_tensors(normal, [call for _, call in calls])
    race = Races(options, run_arch) if racing(options, run_arch) else None
    if plan_arch is not run_arch:
        plan(normal, calls, options, plan_arch)
        calls = [(replace(site, refused=[]), call) for site, call in calls]  # what runs here is not what is reported
    lower(normal, calls, options, run_arch, race)
    report.races += race.records if race else []
    clean(normal)
    if any(site.status == "rewritten" for site in sites):
        sites += join_linears(normal, options, run_arch) + share_linears(normal, options, run_arch)
    declare_constants(normal)
    normal.graph.lint()
    normal.recompile()
    report.add_seconds("normalize", normalized - started)
    report.add_seconds("match", matched - normalized)
    report.add_seconds("lower", time.perf_counter() - matched)
    return Transformed(normal, sites, Verification(original, copied(normal)) if original else None)


def recognise(normal: GraphModule, options: Options) -> list[tuple[Site, Node | None]]:
    """Run every wanted pattern over the graph; rewrite what matches.

    Returns:
        A site for every anchor that a pattern had something to say about, with the call of the semantic op if
        it was rewritten.
    """
    clean(normal)  # who reads a value decides much: nodes that nothing reads must not count
    view = GraphView(normal)
    found: list[tuple[Site, Node | None]] = []
    wanted = [p for p in patterns() if options.wants_pattern(p.name)]
    packed = any(p.packed for p in wanted)
    if packed:
        found += [(_near_miss("mxfp4", refusal, refusal.node), None) for refusal in mark_packed(view)]
    for pattern in wanted:
        answers: list[tuple[Node, tuple[Site, Node | None]]] = []
        for anchor in list(normal.graph.nodes):
            if anchor.op != "call_function" or anchor.target not in pattern.anchors or not anchor.users:
                continue
            outcome = _try(pattern, anchor, view)
            if outcome is not None:
                answers.append((anchor, outcome))
        clean(normal)
        there = set(normal.graph.nodes)  # a near-miss inside what was rewritten later is none
        found += [o for anchor, o in answers if o[1] is not None or anchor in there]
    if packed:
        dense_again = [Refusal(_ELSEWHERE, dense) for dense in unmark(view)]
        found += [(_near_miss("mxfp4", refusal, refusal.node), None) for refusal in dense_again]
        clean(normal)
        for node in normal.graph.find_nodes(op="call_function", target=WEIGHT):
            reader = next(iter(node.users))  # a pattern that takes dense weights found this one
            found.append((Site("mxfp4_weight", _op_name(node), module_of(reader), source_of(reader)), node))
    return found


_ELSEWHERE = (
    "this MXFP4 weight is read by something but a linear layer or routed experts, so it is decoded as before"
)


def _try(pattern: Pattern, anchor: Node, view: GraphView) -> tuple[Site, Node | None] | None:
    """One pattern at one anchor; whatever it added to the graph in vain is taken out again."""
    before = set(view.graph.nodes)
    try:
        outcome = pattern.recognise(anchor, view)
        if not isinstance(outcome, (Rewrite, Refusal, type(None))):
            raise TypeError(f"a pattern answers with Rewrite, Refusal or None, not {type(outcome).__name__}")
    except Exception as error:  # a pattern's bug must not fail the user's model
        logger.warning("pattern %s failed at %s: %s", pattern.name, anchor.name, error, exc_info=True)
        outcome = Refusal(f"the pattern itself failed ({type(error).__name__}: {error}); please report it", anchor)
    if isinstance(outcome, Rewrite):
        site = Site(
            pattern.name, _op_name(outcome.call), module_of(anchor), source_of(anchor), dict(outcome.tags)
        )
        outcome.value.meta.setdefault("nn_module_stack", anchor.meta.get("nn_module_stack"))
        for node in (outcome.call, outcome.value):
            for key in ("nn_module_stack", "stack_trace"):
                if key in anchor.meta:
                    node.meta[key] = anchor.meta[key]
        for write in outcome.obsolete:
            view.graph.erase_node(write)
        for node, value in ((outcome.node, outcome.value), *outcome.also):
            mark(value, site, node)
            if node is not value:  # a call that stands there already is only reported
                view.replace(node, value)
        logger.info("%s: %s -> %s %s", site.module or site.source, pattern.name, site.op, dict(outcome.tags))
        return site, outcome.call
    for node in reversed(list(view.graph.nodes)):
        if node not in before and not node.users:
            view.graph.erase_node(node)
    if outcome is None:
        return None
    return _near_miss(pattern.name, outcome, anchor), None


def _near_miss(pattern: str, refusal: Refusal, anchor: Node | None) -> Site:
    where = refusal.node if refusal.node is not None and refusal.node.meta.get("stack_trace") else anchor
    assert where is not None
    module = "" if anchor is None else module_of(anchor)
    site = Site(
        pattern, None, module or module_of(where), source_of(where), dict(refusal.tags),
        status="near-miss", reason=refusal.reason,
    )  # fmt: skip
    logger.info("%s: near miss of %s: %s", site.module or site.source, pattern, site.reason)
    return site


def _op_name(call: Node) -> str:
    target = call.target
    return target.name().removesuffix(".default") if isinstance(target, torch._ops.OpOverload) else str(target)


def clean(normal: GraphModule) -> None:
    """Remove what nothing reads, but keep writes and the order of random numbers."""
    normal.graph.eliminate_dead_code(is_impure_node=_has_effect)


def _has_effect(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is aten.dropout.default:
        return bool(node.args[1]) and bool(node.args[2])
    if target is aten.scaled_dot_product_attention.default:
        return bool(node.args[4]) if len(node.args) > 4 else bool(node.kwargs.get("dropout_p", 0))
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


def device_of(gm: GraphModule) -> torch.device:
    """The device that the graph computes on: that of its first CUDA input, else the CPU."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            return value.device
    return torch.device("cpu")


__all__ = ["Arch", "Transformed", "recognise", "transform"]
