"""Proofs as a table: one row for a kernel on a card, and every violation by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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
    for (_, kernel), group in groupby(proofs, key=lambda p: (p.arch, p.kernel)):
        table.add_row(kernel.replace(": ", "\n"), *_row(list(group)))
    bad = [proof for proof in proofs if proof.violations]
    lines = [Text(f"{p.kernel} on {p.arch}, {p.case}: {'; '.join(p.violations)}", style="red") for p in bad]
    held = f"{len(proofs) - len(bad)} of {len(proofs)} configurations hold"
    return Group(table, *lines, Text(held, style="red" if bad else "green"))


def _row(group: list[Proof]) -> list[str]:
    most = max(proof.shared_bytes for proof in group)
    families = sorted({name.split(".")[0] for proof in group for name in proof.matrix})
    blocks = [proof.blocks for proof in group]
    spilling = sum(proof.spills > 0 for proof in group)
    bad = sum(bool(proof.violations) for proof in group)
    return [
        f"{group[0].arch}\n{group[0].target}",
        group[0].triton,
        str(sum(proof.cases for proof in group)),
        str(len(group)),
        _range([proof.registers for proof in group]),
        f"{most} of\n{by_name(group[0].arch).smem_per_block} B",
        _range(blocks),
        str(spilling),
        ", ".join(families) or "none needed",
        f"{bad} violations" if bad else "holds",
    ]


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
