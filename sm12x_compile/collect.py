"""Reports that are being filled: everything the backend compiles inside ``with collect() as report``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .report import Report

_active: list[Report] = []


def active_reports() -> list[Report]:
    return list(_active)


@contextmanager
def collect() -> Iterator[Report]:
    """Collect what the backend does inside the block: several calls, `generate()`, decode steps.

    What was compiled before the block is not seen again; call ``torch._dynamo.reset()`` first to start afresh.
    """
    from torch._dynamo import utils as dynamo_utils  # with the whole of Dynamo

    report = Report()
    breaks = dict(dynamo_utils.counters["graph_break"])
    metrics = list(dynamo_utils.get_compilation_metrics())
    _active.append(report)
    try:
        yield report
    finally:
        _active[:] = [other for other in _active if other is not report]  # equal reports are not the same
        for reason, count in dynamo_utils.counters["graph_break"].items():
            new = count - breaks.get(reason, 0)
            if new > 0:
                first = reason.strip().splitlines()[0]
                report.graph_breaks.append(first if new == 1 else f"{first} ({new} times)")
        known = set(map(id, metrics))  # Dynamo keeps the last 64, so their number does not tell
        for metric in (m for m in dynamo_utils.get_compilation_metrics() if id(m) not in known):
            why = getattr(metric, "recompile_reason", None)
            if why:
                report.recompiles.append(" ".join(str(why).split(" # ")[0].split()))
