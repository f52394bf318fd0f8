"""Proofs as a table: one row for a kernel on a card, and every violation by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .arch import by_name
from .prove import Proof


def render(proofs: Sequence[Proof]) -> RenderableType:
    """A summary of proofs that are sorted by card and kernel, and the violations among them."""
    table = Table(title="compiled offline; nothing was run")
    for heading in ("kernel", "card", "Triton"):
        table.add_column(heading, overflow="fold")
    for heading in ("launches", "compiled", "registers", "shared memory", "blocks an SM", "spilling"):
        table.add_column(heading, justify="right")
    table.add_column("matrix")
    table.add_column("verdict")
    for row in summary(proofs):
        most = f"{row['shared_bytes']} of\n{by_name(row['arch']).smem_per_block} B"
        table.add_row(
            row["kernel"], f"{row['arch']}\n{row['target']}", row["triton"], str(row["launches"]), str(row["compiled"]),
            row["registers"], most, row["blocks"], str(row["spilling"]), row["matrix"] or "none needed",
            f"{row['violations']} violations" if row["violations"] else "holds",
        )  # fmt: skip
    bad = [proof for proof in proofs if proof.violations]
    lines = [Text(f"{p.kernel} on {p.arch}, {p.case}: {'; '.join(p.violations)}", style="red") for p in bad]
    held = f"{len(proofs) - len(bad)} of {len(proofs)} configurations hold"
    return Group(table, *lines, Text(held, style="red" if bad else "green"))


def summary(proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """One row for a kernel on a card, of proofs that are sorted by card and kernel.

    `launches` compile to `compiled` different things; of those `spilling` have local-memory instructions in the hot
    loop and `violations` do not hold. `shared_bytes` is the most that a block takes.
    """
    rows = []
    for (arch, kernel), found in groupby(proofs, key=lambda p: (p.arch, p.kernel)):
        group = list(found)
        rows.append({
            "kernel": kernel, "arch": arch, "target": group[0].target, "triton": group[0].triton,
            "launches": sum(p.cases for p in group), "compiled": len(group),
            "registers": _range([p.registers for p in group]),
            "shared_bytes": max(p.shared_bytes for p in group),
            "blocks": _range([p.blocks for p in group]),
            "spilling": sum(p.spills > 0 for p in group),
            "matrix": ", ".join(sorted({name.split(".")[0] for p in group for name in p.matrix})),
            "violations": sum(bool(p.violations) for p in group),
        })  # fmt: skip
    return rows


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
