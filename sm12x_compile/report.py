"""What happened to a model: the record that `explain` returns and prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["rewritten", "near-miss", "left"]


@dataclass(frozen=True)
class Floor:
    """The least that a site costs on the card planned for: max(bytes / bandwidth, FLOPs / rate)."""

    bytes: float
    flops: float
    microseconds: float


@dataclass
class Site:
    """One place in the model that a pattern looked at.

    Attributes:
        pattern: the pattern's name, e.g. ``attention``.
        op: the semantic op it became, e.g. ``sm12x::attention``; None when it did not.
        module: path of the user's module, e.g. ``model.layers.3.self_attn``.
        source: the user's file and line.
        tags: what was read off the subgraph (mask, scale, groups, ...).
        kernel: the kernel that runs it.
        refused: (kernel, why) for every candidate that declined.
        status: ``rewritten``; ``near-miss`` (looks like the family, a condition failed: see `reason`);
            ``left`` (recognised, but deliberately not rewritten).
        floor: least cost on the card planned for; None where unknown.
        reason: the first condition that failed, for a near-miss or a site left.
        graph: index of the graph in the order of compilation.
    """

    pattern: str
    op: str | None
    module: str
    source: str
    tags: dict[str, Any] = field(default_factory=dict)
    kernel: str | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)
    status: Status = "rewritten"
    floor: Floor | None = None
    reason: str | None = None
    graph: int = 0


@dataclass
class Report:
    """Everything that compiling (and running) a model told us. The module `explain` fills it.

    Attributes (of those that do not explain themselves):
        syncs: operations that wait for the GPU, with their lines.
        cuda_graphs: for every graph, whether it runs as a CUDA graph, and why not, or in how many parts.
    """

    sites: list[Site] = field(default_factory=list)
    captures: list[str] = field(default_factory=list)
    code_rewrites: list[str] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    recompiles: list[str] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    cuda_graphs: list[tuple[bool, str | None]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    races: list[dict[str, Any]] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    planned: bool = False
    arch: str = "cpu"
    seconds: dict[str, float] = field(default_factory=dict)

    def weight_lines(self) -> list[str]:
        """What was done to weights, a line for each format."""
        lines = []
        for format in sorted({str(w["format"]) for w in self.weights if "relative_error" in w}):
            of_it = [w for w in self.weights if w.get("format") == format]
            before, after = (sum(w[k] for w in of_it) / 2**20 for k in ("bytes_before", "bytes_after"))
            worst = max(of_it, key=lambda w: w["relative_error"])
            dropped = "originals given up" if all(w["dropped"] for w in of_it) else "beside the originals"
            lines.append(
                f"{len(of_it)} quantised to {format}: {before:.1f} MiB -> {after:.1f} MiB {dropped}; relative error at "
                f"most {worst['relative_error']:.4f} ({worst['weight']})"
            )
        return lines

    @property
    def cuda_graph(self) -> tuple[bool, str | None]:
        """Whether all of it runs as CUDA graphs, and if not, the first reason."""
        for recorded, reason in self.cuda_graphs:
            if not recorded:
                return False, reason
        return bool(self.cuda_graphs), next((reason for _, reason in self.cuda_graphs if reason), None)

    @property
    def rewritten(self) -> list[Site]:
        return [s for s in self.sites if s.status == "rewritten"]

    @property
    def near_misses(self) -> list[Site]:
        return [s for s in self.sites if s.status == "near-miss"]

    def count(self, pattern: str) -> int:
        """How many sites of a pattern were rewritten."""
        return sum(1 for s in self.rewritten if s.pattern == pattern)

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cuda_graph": self.cuda_graph}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def table(self) -> Table:
        """The sites as a rich table; equal sites of repeated layers fold into one row."""
        title = f"sm12x: {len(self.rewritten)} of {len(self.sites)} sites rewritten, {self.graphs} graph(s), "
        title += f"{len(self.graph_breaks)} break(s), {'planned for' if self.planned else 'on'} {self.arch}"
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for column in ("site", "status", "read off the code", "kernel", "refused, or why not", "floor"):
            table.add_column(column, overflow="fold")
        for sites in _folded(self.sites):
            site = sites[0]
            name = site.module or site.source or "-"
            if len(sites) > 1:
                name += f"\n(and {len(sites) - 1} more like it)"
            why = site.reason or "\n".join(f"{k}: {w}" for k, w in site.refused)
            if site.status != "rewritten" and site.source:
                why += f"\nat {site.source}"
            floor = f"{site.floor.microseconds:.1f} us" if site.floor else ""
            tags = ", ".join(f"{k}={v}" for k, v in site.tags.items())
            cells = (name, site.status, f"{site.pattern}[{tags}]", site.kernel or "-", why, floor)
            table.add_row(*map(Text, cells))  # as Text: a console must not take "[mask=causal]" for markup
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        console = Console(file=out, width=150, force_terminal=False, markup=False, highlight=False)
        console.print(self.table())
        for label, lines in (
            ("graph break", self.graph_breaks), ("recompile", self.recompiles), ("host sync", self.syncs),
            ("weights", self.weight_lines()),
            ("captured", self.captures), ("code rewritten", self.code_rewrites),
            ("verified", self.verified), ("warning", self.warnings),
        ):  # fmt: skip
            for line in lines:
                console.print(f"{label}: {line}")
        for race in self.races:
            console.print(f"race: {race_line(race)}")
        for state, graphs in _same_state(self.cuda_graphs).items():
            which = "" if len(graphs) == len(self.cuda_graphs) else f" (graph {', '.join(map(str, graphs))})"
            console.print(f"CUDA graph{which}: {'yes' if state[0] else 'no'}{f', {state[1]}' if state[1] else ''}")
        return out.getvalue()


def _same_state(states: list[tuple[bool, str | None]]) -> dict[tuple[bool, str | None], list[int]]:
    groups: dict[tuple[bool, str | None], list[int]] = {}
    for place, state in enumerate(states):
        groups.setdefault(state, []).append(place)
    return groups


def race_line(race: dict[str, Any]) -> str:
    """One race in one line: the winner, the times of all who ran, why the others did not."""
    if "why" in race:
        return f"{race['op']}: {race['winner']}, {race['why']}"
    shown = [
        f"{e['name']} {e['seconds'] * 1e6:.1f} us" if e["status"] == "ran" else f"{e['name']} {e['reason']}"
        for e in race["entries"]
    ]
    return f"{race['call']}: {race['winner'] or 'nobody'} ({'; '.join(shown)}; {race['source']})"


def _folded(sites: list[Site]) -> list[list[Site]]:
    """Sites grouped by everything but the module: a 32-layer model prints a few rows."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        key = repr((site.pattern, site.status, site.tags, site.kernel, site.refused, site.reason, site.graph))
        groups.setdefault(key, []).append(site)
    return list(groups.values())
