"""Whether a graph is to run as a CUDA graph: decided before it is compiled, with the first reason why not.

``auto`` records what is launched again and again with the same sizes: a decode step over a static cache, a model called
with one shape. It records nothing whose sizes change from call to call (a prompt, a cache that grows), because each
size would need a recording of its own, with memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from ..normalize import example_value
from ..options import Options


@dataclass(frozen=True)
class Decision:
    """Attributes:
    wanted: whether to record.
    reason: why not.
    asked: whether the user asked for it, rather than left it to us: then a no is worth a warning.
    """

    wanted: bool
    reason: str | None
    asked: bool


def decide(gm: GraphModule, options: Options, patches: Mapping[str, Any], *, gradients: bool) -> Decision:
    """Whether `gm` is to be recorded.

    Args:
        gm: a graph from Dynamo, or its normal form.
        options: the user's.
        patches: Inductor's configuration for the user's ``mode``.
        gradients: whether the graph needs them.
    """
    by_mode = patches.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    asked = options.cuda_graphs is True or (options.cuda_graphs == "auto" and bool(by_mode))
    reason = _reason_against(gm, options, asked, gradients)
    return Decision(reason is None, reason, asked)


def _reason_against(gm: GraphModule, options: Options, asked: bool, gradients: bool) -> str | None:
    if options.cuda_graphs is False:
        return "cuda_graphs=False"
    if not runs_on_cuda(gm):
        return "the graph does not run on CUDA" if torch.cuda.is_available() else "no CUDA device"
    if options.codegen == "eager":
        return "codegen='eager' runs the graph op by op"
    if asked:
        return None
    if gradients:
        return "the graph needs gradients (cuda_graphs=True records it all the same)"
    changing = changing_size(gm)
    if changing:
        return f"{changing} changes from call to call, and each size would be a recording of its own"
    return None


def runs_on_cuda(gm: GraphModule) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"
        for node in gm.graph.nodes
        for leaf in pytree.tree_leaves(example_value(node))
    )


def changing_size(gm: GraphModule) -> str | None:
    """The first size of an input that is symbolic, in words."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                return f"dim {dim} of {name_of(node)}"
    return None


def name_of(node: Node) -> str:
    """An input as the user knows it, e.g. ``L['input_ids']``."""
    source = getattr(node, "_dynamo_source", None)
    try:
        return str(source.name if isinstance(source.name, str) else source.name()) if source is not None else node.name
    except (NotImplementedError, AttributeError):
        return node.name
