"""A rewritten graph beside the user's own code, on the first real inputs.

Both are interpreted. Where the rewritten graph has a value that a site computes, it is held against what the user's
code computes there, and the user's value goes on: so each site is judged by itself, and roundings of one layer don't
add up to a disagreement in the last. Inputs that a graph writes are copies. A site that disagrees, or raises, sends
the whole graph back to the user's code, with a warning.

This finds a wrong rewrite as well as a wrong kernel. It says nothing of inputs that come later.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from ..arch import Arch
from ..collect import active_reports
from ..marks import marks
from ..normalize import written_arguments
from ..options import Options
from ..quantize import QUANTISED
from ..report import Site
from .judge import ALLOWED, disagreement

logger = logging.getLogger("sm12x_compile")

# The user's code rounds between its steps, and a kernel does not: more than in a race.
LEEWAY = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-6}
TIES = 0.02  # of the integers (a choice of experts) that may differ: equal scores are chosen between as it comes

Compiled = Callable[..., Any]


def verifies(options: Options, arch: Arch) -> bool:
    """Whether the first call of each graph is verified on this device."""
    return options.verify is True or (options.verify == "auto" and arch.family == "sm12x")


def copied(gm: GraphModule) -> GraphModule:
    """The graph as it is now, with the same names."""
    graph = Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    return GraphModule(gm, graph)


class Disagreement(RuntimeError):
    """A site computes something else than the user's code; the message says where and by how much."""


class CannotVerify(RuntimeError):
    """The two cannot be held against each other; the message says why."""


class _Original(Interpreter):
    """The user's code; keeps the values that sites stand for."""

    def __init__(self, gm: GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted, self.kept = wanted, dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            # As it is now: what is written later must not show.
            self.kept[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


class _Rewritten(Interpreter):
    """The rewritten graph; every site's value is judged, and replaced by the user's."""

    def __init__(self, gm: GraphModule, kept: dict[str, Any]) -> None:
        super().__init__(gm)
        self.kept, self.judged, self.worst = kept, list[Site](), 0.0

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Disagreement(f"{n.target} raised {type(error).__name__}: {error}") from error
        for site, name in marks(n):
            if name in self.kept and isinstance(value, Tensor):
                if site.tags.get("weights") != QUANTISED:
                    self._judge(site, value, self.kept[name])
                value = _laid_out(self.kept[name], value)
        return value

    def _judge(self, site: Site, found: Tensor, truth: Tensor) -> None:
        error, wrong = _compare(found, truth)
        self.worst = max(self.worst, error)
        if wrong:
            where = site.module or site.source or site.pattern
            raise Disagreement(f"{where}: {site.pattern}, computed by {site.kernel}, {wrong}")
        if all(site is not other for other in self.judged):
            self.judged.append(site)


def _compare(found: Tensor, truth: Tensor) -> tuple[float, str | None]:
    if truth.is_floating_point():
        return disagreement(found, truth, LEEWAY.get(truth.dtype, LEEWAY[torch.float32]))
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return disagreement(found, truth, ALLOWED[torch.float32])
    different = float((found != truth).double().mean()) if truth.numel() else 0.0
    return 0.0, f"gives {different:.0%} other numbers" if different > TIES else None


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The user's numbers in the strides that the rewritten graph's readers expect."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(value)


@dataclass
class Verification:
    """One graph before and after, until its first call."""

    original: GraphModule
    rewritten: GraphModule

    def run(self, inputs: Sequence[Any]) -> tuple[int, float]:
        """How many sites were judged, and the largest relative error.

        Raises:
            Disagreement: a site is wrong.
            CannotVerify: the user's code cannot be interpreted, or there is no room.
        """
        devices = sorted({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})
        wanted = {name for n in self.rewritten.graph.nodes for _, name in marks(n)}
        with torch.no_grad():
            try:
                mine = self._own_copies(inputs)
                original = _Original(self.original, wanted)
                with torch.random.fork_rng(devices):  # both draw the same numbers, and the user's code draws them again
                    original.run(*mine)
            except Exception as error:
                raise CannotVerify(f"the user's own code could not be run beside it ({error})") from error
            theirs = self._own_copies(inputs)
            rewritten = _Rewritten(self.rewritten, original.kept)
            try:
                with torch.random.fork_rng(devices):
                    rewritten.run(*theirs)
            except torch.OutOfMemoryError as error:
                raise CannotVerify("there is not enough memory for both") from error
        self._judge_written(mine, theirs)
        return len(rewritten.judged), rewritten.worst

    def _written(self) -> set[int]:
        found: set[int] = set()
        for gm in (self.original, self.rewritten):
            place = {node: k for k, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
            found |= {place[x] for node in gm.graph.nodes for x in written_arguments(node) if x in place}
        return found

    def _own_copies(self, inputs: Sequence[Any]) -> list[Any]:
        written = self._written()
        return [_laid_out(x, x) if k in written and isinstance(x, Tensor) else x for k, x in enumerate(inputs)]

    def _judge_written(self, mine: Sequence[Any], theirs: Sequence[Any]) -> None:
        names = [node.name for node in self.original.graph.find_nodes(op="placeholder")]
        for k in self._written():
            if isinstance(mine[k], Tensor):
                _, wrong = _compare(theirs[k], mine[k])
                if wrong:
                    raise Disagreement(f"what is written to {names[k]} {wrong}")


def verified(compiled: Compiled, verification: Verification, fallback: Callable[[], Compiled]) -> Compiled:
    """`compiled`, or what `fallback` gives if the first call shows that it is wrong."""
    pending: Verification | None = verification
    chosen = compiled

    def run(*args: Any) -> Any:
        nonlocal pending, chosen
        if pending is not None and not _capturing(args):
            now, pending = pending, None
            if not _passes(now, args):
                chosen = fallback()
        return chosen(*args)

    return run


def _capturing(args: Sequence[Any]) -> bool:
    on_cuda = any(isinstance(a, Tensor) and a.is_cuda for a in args)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _passes(verification: Verification, args: Sequence[Any]) -> bool:
    try:
        sites, worst = verification.run(args)
    except CannotVerify as reason:
        _say(f"not verified: {reason}")
        return True
    except Disagreement as reason:
        message = (
            f"sm12x: {reason}. This graph runs the model's own code instead, not compiled. "
            "Please report it; options={'kernels': ['-NAME']} or {'patterns': ['-NAME']} leave one out."
        )
        logger.warning("%s", message)
        for report in active_reports():
            report.warn(message)
        warnings.warn(message, stacklevel=2)
        return False
    _say(f"{sites} site(s) agree with the model's own code on the first inputs; largest relative error {worst:.1e}")
    return True


def _say(line: str) -> None:
    logger.info("%s", line)
    for report in active_reports():
        report.verified.append(line)
