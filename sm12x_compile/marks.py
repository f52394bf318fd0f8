"""Marks on the nodes that sites compute, so that the first call can hold them against the user's own code."""

from __future__ import annotations

from torch.fx import Node

from .report import Site

_KEY = "sm12x_checks"


def mark(value: Node, site: Site, original: Node) -> None:
    """Remember that `value`, computed by `site`, stands for the node `original` of the graph before."""
    if isinstance(value.meta.get("val"), (tuple, list)):  # a call of the user's own; what is read of it counts
        for part in value.users:
            mark(part, site, part)
    else:
        value.meta[_KEY] = [*marks(value), (site, original.name)]


def moved(old: Node, new: Node) -> None:
    """`new` takes the place of `old`."""
    if marks(old):
        new.meta[_KEY] = [*marks(new), *marks(old)]


def marks(node: Node) -> list[tuple[Site, str]]:
    """The sites that compute a node, and the names of the nodes that it stands for."""
    found: list[tuple[Site, str]] = node.meta.get(_KEY, [])
    return found
