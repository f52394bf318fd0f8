"""Takes the preparation of weights out of a graph, to be done once instead of at each step.

A lowering or a pattern writes a *preparation* (a call of an op defined by `preparation`) into the graph like any other
call, where it is correct as it stands. If all that it works on are parameters and buffers that the graph does not
write, `hoist` makes its results inputs of the graph, and `Hoisted` hands them over from `prepared.STORE`. Otherwise
the call stays, computed at each step.

    packed, scales = swizzle(w13)      ->      graph(..., w13, packed, scales)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import AttrSource
from torch.fx import Graph, GraphModule, Node

from .normalize import written_arguments
from .ops import define_custom_op
from .prepared import STORE, Event, Recipe

Describe = Callable[[Event], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Preparation:
    """An op whose results are prepared weights.

    Attributes:
        overload: what a graph calls.
        title: what the progress bar says, e.g. ``quantising experts to MXFP4``.
        describe: a line for ``report.weights`` from what was done; None for none.
    """

    overload: torch._ops.OpOverload
    title: str
    describe: Describe | None = None


PREPARATIONS: dict[Any, Preparation] = {}


def preparation(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], *, title: str, describe: Describe | None = None
) -> torch._ops.OpOverload:
    """Define ``sm12x_prepare::<name>`` from `function`, whose results share no memory with its arguments."""
    overload = define_custom_op(f"sm12x_prepare::{name}", function, fake)
    PREPARATIONS[overload] = Preparation(overload, title, describe)
    return overload


def _join(parts: list[Tensor], dim: int, stack: bool) -> Tensor:
    return torch.stack(parts, dim) if stack else torch.cat(parts, dim)


def _join_fake(parts: list[Tensor], dim: int, stack: bool) -> Tensor:
    return _join(parts, dim, stack)


def _described_join(event: Event) -> dict[str, Any]:
    return {"joined": len(event.sources), "bytes_added": sum(t.nbytes for t in event.results)}


JOIN = preparation("join", _join, _join_fake, title="joining weights", describe=_described_join)
"""``join(parts, dim, stack)``: weights that a kernel wants as one tensor and that the user holds as several."""


@dataclass(frozen=True)
class Step:
    """One preparation that was taken out: which of the graph's arguments it reads, and the first one's name."""

    recipe: Recipe
    reads: tuple[int, ...]
    preparation: Preparation
    weight: str


@dataclass
class Hoisted:
    """Calls the compiled graph with the prepared tensors behind its own arguments."""

    steps: tuple[Step, ...]
    compiled: Callable[..., Any] | None = None
    fakes: tuple[Tensor, ...] = ()
    notify: Callable[[dict[str, Any]], None] | None = None
    known: set[int] = field(default_factory=set)

    def __call__(self, *args: Any) -> Any:
        assert self.compiled is not None
        return self.compiled(*args, *self.tensors(args))

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The prepared tensors for these arguments of the graph."""
        sources = [tuple(args[k] for k in step.reads) for step in self.steps]
        waiting = sum(not STORE.has(s.recipe, t[0]) for s, t in zip(self.steps, sources, strict=True))
        found: list[Tensor] = []
        with _progress(self.steps[0].preparation.title, waiting) as advance:
            for step, tensors in zip(self.steps, sources, strict=True):

                def watch(event: Event, step: Step = step) -> None:
                    advance()
                    self._tell(step, event)

                found += STORE.get(step.recipe, tensors, watch)
        STORE.watch_turn([(s.recipe, t) for s, t in zip(self.steps, sources, strict=True)])
        return found

    def _tell(self, step: Step, event: Event) -> None:
        line = step.preparation.describe(event) if step.preparation.describe else None
        if line is not None and self.notify is not None:
            self.notify({"weight": step.weight, **line})


def hoist(gm: GraphModule, *, drop: Callable[[Node], bool] = lambda node: False) -> Hoisted | None:
    """Make the results of preparations inputs of the graph, behind those that it has.

    Args:
        gm: a graph in normal form; it is changed.
        drop: whether a preparation gives up the memory of what it read. It is not asked where the graph reads
            the weight elsewhere.

    Returns:
        What calls the graph, `compiled` to be set; None if there is nothing to take out.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = {x for node in gm.graph.nodes for x in written_arguments(node)}
    position = {node: k for k, node in enumerate(placeholders)}
    steps: list[Step] = []
    fakes: list[Tensor] = []
    place: dict[tuple[str, tuple[int, ...]], list[Node]] = {}
    last = placeholders[-1] if placeholders else None
    for node in list(gm.graph.nodes):
        if node.target not in PREPARATIONS or not node.users:
            continue
        cone = _cone(node, written)
        if cone is None:
            continue
        inner, leaves = cone
        recipe_key, run = _extracted(node, inner, leaves)
        reads = tuple(position[leaf] for leaf in leaves)
        key = (recipe_key, reads)
        if key not in place:
            values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
            new = []
            for k, value in enumerate(values):
                with gm.graph.inserting_after(last):
                    last = _placeholder(gm.graph, f"prepared_{len(fakes)}_{k}", value, leaves[0])
                new.append(last)
            fakes += values
            place[key] = new
            drops = drop(node) and all(set(leaf.users) <= inner for leaf in leaves)
            recipe = Recipe(recipe_key, run, drops)
            steps.append(Step(recipe, reads, PREPARATIONS[node.target], _weight_name(leaves[0])))
        _replace(gm.graph, node, place[key])
    if not steps:
        return None
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return Hoisted(tuple(steps), fakes=tuple(fakes))


def is_static(node: Node) -> bool:
    """Whether Dynamo says that an input keeps its address: a parameter, a buffer, a marked tensor."""
    return node.op == "placeholder" and bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def _cone(node: Node, written: set[Node]) -> tuple[set[Node], list[Node]] | None:
    """The nodes that a preparation is computed from, and the inputs at their beginning, if they all are static."""
    inner: set[Node] = set()
    leaves: list[Node] = []
    waiting = [node]
    while waiting:
        at = waiting.pop(0)
        if at in inner or at in leaves:
            continue
        if at.op == "placeholder":
            if not is_static(at) or at in written:
                return None
            leaves.append(at)
            continue
        target = at.target
        functional = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
        )
        if at.op != "call_function" or not functional or not _has_fixed_shape(at):
            return None
        inner.add(at)
        waiting += at.all_input_nodes
    return (inner, leaves) if leaves else None


def _has_fixed_shape(node: Node) -> bool:
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    return all(isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape) for v in values)


def _extracted(node: Node, inner: set[Node], leaves: list[Node]) -> tuple[str, Callable[..., tuple[Tensor, ...]]]:
    """The cone as a function, and its text: graphs that prepare a weight alike share the result."""
    graph = Graph()
    copied = {leaf: graph.placeholder(f"w{k}") for k, leaf in enumerate(leaves)}
    for k, old in enumerate(sorted(inner)):
        args, kwargs = torch.fx.node.map_arg((old.args, old.kwargs), lambda n: copied[n])
        copied[old] = graph.create_node("call_function", old.target, args, kwargs, name=f"n{k}")
    graph.output(copied[node])
    module = GraphModule(torch.nn.Module(), graph)
    shapes = [f"{leaf.meta['val'].dtype} {tuple(leaf.meta['val'].shape)}" for leaf in leaves]

    def run(*sources: Tensor) -> tuple[Tensor, ...]:
        found = module(*sources)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    return f"{node.target}\n{shapes}\n{module.code}", run


def _placeholder(graph: Graph, name: str, value: Any, beside: Node) -> Node:
    """An input that stays where it is, as the weight does that it was prepared from."""
    new = graph.placeholder(f"sm12x_{name}")
    new.meta["val"] = value
    new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    source = getattr(beside, "_dynamo_source", None)
    new._dynamo_source = None if source is None else AttrSource(source, f"sm12x_{name}")  # type: ignore[attr-defined]
    return new


def _replace(graph: Graph, node: Node, results: list[Node]) -> None:
    if not isinstance(node.meta["val"], (tuple, list)):
        node.replace_all_uses_with(results[0])
        return
    for pick in list(node.users):
        pick.replace_all_uses_with(results[pick.args[1]])  # type: ignore[index]
        graph.erase_node(pick)


def _weight_name(leaf: Node) -> str:
    """Path of a weight in the user's model, e.g. ``layers.3.mlp.experts.down_proj``."""
    source = getattr(leaf, "_dynamo_source", None)
    name = leaf.name if source is None else source.name
    name = name() if callable(name) else name  # a method until torch 2.11
    name = re.sub(r"^L\['\w+'\]\.?", "", name)
    return re.sub(r"_(?:modules|parameters|buffers)\['([^']*)'\]", r"\1", name)


class _progress:
    """A bar on a terminal while several weights are prepared."""

    def __init__(self, title: str, count: int) -> None:
        self.title, self.count = title, count
        self.bar: Any = None

    def __enter__(self) -> Callable[[], None]:
        if self.count < 2:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.count)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


__all__ = ["JOIN", "PREPARATIONS", "Hoisted", "Preparation", "hoist", "is_static", "preparation"]
