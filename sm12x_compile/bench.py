"""The league table: every kernel that takes a sample call on this device, right or wrong, its time beside the floor.

Each kernel is held against the op's reference, then timed as in a race (`race/timing.py`): on a GPU replays of a CUDA
graph, operands rotated. Kernels that are plain PyTorch are timed as they stand; Inductor may fuse what is around them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from .arch import Arch, resolve
from .lowering.select import acceptances, floor
from .options import Options
from .race.contest import Entry, contest
from .race.entrant import Entrant, Field
from .race.identity import versions
from .race.races import device_of, free_bytes
from .race.spec import CannotRace, describe, title
from .race.timing import DeviceTimer, HostTimer, Timer
from .registry import Kernel
from .samples import Sample, samples

SLOW = 60.0  # seconds: a kernel that takes longer, compilation included, is given up


@dataclass(frozen=True)
class Row:
    """One kernel on one call. `floor`: seconds; `note`: why it is out, or how it was timed."""

    op: str
    call: str
    kernel: str
    status: str  # "ran", "out", "not raced", "refused"
    seconds: float | None
    floor: float | None
    error: float | None
    note: str

    @property
    def times_floor(self) -> float | None:
        return self.seconds / self.floor if self.seconds and self.floor else None


Progress = Callable[[int, int, str], None]


def bench(
    ops: Sequence[str] = (),
    options: Options | None = None,
    progress: Progress = lambda done, total, what: None,
    timer: Timer | None = None,
) -> list[Row]:
    """Run every sample call on the device at hand.

    Args:
        ops: only these; all, if none is given.
        options: ``kernels`` leaves some out.
        progress: called before each call with how many are done, how many there are, and which is next.
        timer: how to measure; by the device, if not given.

    Raises:
        ValueError: an op is unknown.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch, _ = resolve("auto", device)
    found = samples(device.type)
    known = list(dict.fromkeys(s.call.op for s in found))
    unknown = [op for op in ops if op not in known]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; known: {', '.join(known)}")
    wanted = [s for s in found if not ops or s.call.op in ops]
    rows: list[Row] = []
    for number, sample in enumerate(wanted):
        progress(number, len(wanted), f"{sample.call.op}: {sample.title}")
        rows += _league(sample, arch, options or Options(), timer)
    return rows


def _league(sample: Sample, arch: Arch, options: Options, timer: Timer | None) -> list[Row]:
    call = sample.call
    accepted, refused = acceptances(call, arch, options)
    least = floor(call, arch)
    seconds = least.microseconds * 1e-6 if least else None
    timer = timer or (DeviceTimer() if arch.is_cuda else HostTimer())
    captured: dict[str, bool] = {}

    class Timed(Entrant):
        def seconds(self) -> float:
            found = super().seconds()
            captured[self.name] = getattr(timer, "captured", True)
            return found

    try:
        spec, device = describe(call), device_of(call)
        free = (lambda: free_bytes(device, arch)) if arch.is_cuda else None
        field = Field(spec, device, arch, options, timer, seed=0, free_bytes=free)
        verdict = contest([Timed(k, field) for k in accepted], bound=float("inf"), patience=SLOW)
        entries: Sequence[Entry] = verdict.entries
        about = title(spec).split(": ", 1)[1]
    except CannotRace as reason:
        entries, about = [Entry(k.name, "not raced", reason=str(reason)) for k in accepted], call.op
    rows = [_row(sample, about, e, seconds, captured, {k.name: k for k in accepted}) for e in entries]
    rows.sort(key=lambda row: (row.seconds is None, row.seconds))
    return rows + [
        Row(call.op, f"{sample.title} ({about})", name, "refused", None, seconds, None, why) for name, why in refused
    ]


def _row(
    sample: Sample, about: str, entry: Entry, least: float | None, captured: dict[str, bool], known: dict[str, Kernel]
) -> Row:
    note = entry.reason or ""
    if entry.status == "ran":
        note = "plain PyTorch, not fused" if known[entry.name].inline else ""
        note += "" if captured.get(entry.name, True) else " timed with its launches: it cannot be captured"
    where = f"{sample.title} ({about})"
    return Row(sample.call.op, where, entry.name, entry.status, entry.seconds, least, entry.error, note.strip())


def render(rows: Sequence[Row], arch: Arch) -> Table:
    """The league as a rich table; who declined stands below those who ran."""
    table = Table(title=f"kernels on {arch.name}; floor: by the card's data sheet", title_justify="left")
    for column in ("call", "kernel", "time", "times floor", "error", ""):
        table.add_column(column, overflow="fold", justify="right" if column in ("time", "times floor") else "left")
    leagues: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        leagues.setdefault((row.op, row.call), []).append(row)
    for (op, call), league in leagues.items():
        least = league[0].floor
        name = f"{op}: {call}" + (f"\nfloor {least * 1e6:.1f} us" if least else "")
        for row in (r for r in league if r.status != "refused"):
            time = f"{row.seconds * 1e6:.1f} us" if row.seconds else row.status
            ratio = f"{row.times_floor:.2f}" if row.times_floor else ""
            error = f"{row.error:.0e}" if row.error is not None else ""
            table.add_row(*map(Text, (name, row.kernel, time, ratio, error, row.note)))
            name = ""
        reasons: dict[str, list[str]] = {}
        for row in (r for r in league if r.status == "refused"):
            reasons.setdefault(row.note, []).append(row.kernel)
        for reason, names in reasons.items():
            table.add_row(*map(Text, (name, "\n".join(names), "refused", "", "", reason)))
            name = ""
        table.add_section()
    return table


def to_dict(rows: Sequence[Row], arch: Arch) -> dict[str, Any]:
    """The league as JSON objects, with what it depends on."""
    device = torch.cuda.get_device_name() if arch.is_cuda else platform.processor() or platform.machine()
    return {
        "device": device, "arch": arch.name, "versions": versions(),
        "rows": [{**asdict(row), "times_floor": row.times_floor} for row in rows],
    }  # fmt: skip
