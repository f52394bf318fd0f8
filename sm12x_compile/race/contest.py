"""One race: every candidate is checked, then timed, within a bound; the fastest that is right wins.

Nothing here knows of a device. What a candidate is, how it is checked and how it is timed are given.

A candidate is out if it raises, gives wrong numbers, or is not done within `patience`. It runs in a thread of its
own, which is left behind if it does not come back: a thread cannot be ended, and neither can a kernel that a GPU is
busy with. So behind a candidate that hangs the race is over, and those that were not tried are neither in nor out.
One that is still being compiled is left to its compiler, and raced by the next process.
A process that dies of a candidate cannot report it; the `strikes` that `verdicts.py` keeps on disk can. Nor can this
process go on behind an illegal memory access: the CUDA context is lost, and whoever runs next would be blamed. So the
device is asked whether it still works behind everyone who failed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

BOUND = 3.0  # seconds: no candidate is begun later, but for the first
PATIENCE = 20.0  # seconds for one candidate, its compilation included
CLEARLY = 0.97  # a candidate of less merit must take less than this part of the time
STRIKES = 2  # so often may a process end, or a candidate hang, before it is not tried again

Status = Literal["ran", "out", "not raced"]


class Wrong(RuntimeError):
    """A candidate's numbers are not the reference's; the message says by how much."""


class Candidate(Protocol):
    """What runs in a race."""

    name: str
    abandoned: bool  # set when it is not waited for: it must do no more

    def check(self) -> float:
        """Run on fresh operands; the relative error.

        Raises:
            Wrong: the numbers differ by more than rounding.
        """
        ...

    def seconds(self) -> float:
        """The time of one call."""
        ...


@dataclass(frozen=True)
class Entry:
    """What became of one candidate. `seconds`, `error`: of those that ran; `reason`: of the others."""

    name: str
    status: Status
    seconds: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The entries in order of merit, and whether every candidate had its turn.

    `complete` is False if the bound was up, or if one hung: the next process races again.
    """

    entries: tuple[Entry, ...]
    complete: bool

    @property
    def winner(self) -> str | None:
        """The fastest; those of more merit stay ahead of one that is not clearly faster."""
        best: Entry | None = None
        for entry in self.entries:
            if entry.seconds is None:
                continue
            if best is None or best.seconds is None or entry.seconds < CLEARLY * best.seconds:
                best = entry
        return best.name if best else None

    @property
    def out(self) -> dict[str, str]:
        """Names of those that may not be used, and why."""
        return {entry.name: entry.reason or "out" for entry in self.entries if entry.status == "out"}


class Strikes(Protocol):
    """Remembers who was running when a process ended."""

    def count(self, name: str) -> int: ...
    def begin(self, name: str) -> None: ...
    def end(self, name: str) -> None: ...
    def condemn(self, name: str) -> None: ...


class NoStrikes:
    """Remembers nothing."""

    def count(self, name: str) -> int:
        return 0

    def begin(self, name: str) -> None: ...
    def end(self, name: str) -> None: ...
    def condemn(self, name: str) -> None: ...


def contest(
    candidates: Sequence[Candidate],
    *,
    bound: float = BOUND,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    strikes: Strikes | None = None,
    step: Callable[[str, int], None] = lambda name, number: None,
    compiling: Callable[[], str | None] = lambda: None,
    works: Callable[[], bool] = lambda: True,
) -> Verdict:
    """Race.

    Args:
        candidates: in order of merit.
        bound: seconds after which no further candidate is begun; the first one always is.
        patience: seconds after which a candidate is not waited for.
        clock: seconds.
        strikes: who was running when earlier processes ended; those go last, or are out.
        step: called before each candidate, with its name and number.
        compiling: the compiler that the process is waiting for, if there is one.
        works: whether the device can still be used.
    """
    strikes = strikes or NoStrikes()
    begun, over, late = clock(), "", False
    found: dict[str, Entry] = {}
    for number, candidate in enumerate(sorted(candidates, key=lambda c: strikes.count(c.name)), 1):
        name = candidate.name
        if strikes.count(name) >= STRIKES:
            reason = "it hung, or the process or the device was lost, when it was tried before"
            found[name] = Entry(name, "out", reason=reason)
        elif over:
            found[name] = Entry(name, "not raced", reason=over)
        elif clock() - begun > bound and any(e.status == "ran" for e in found.values()):
            late = True
            found[name] = Entry(name, "not raced", reason=f"the race's {bound:g} s were up")
        else:
            step(name, number)
            strikes.begin(name)
            found[name] = _try(candidate, patience)
            if found[name].status == "out" and not candidate.abandoned and not works():
                over = f"{name} has made the device unusable for this process; start it again, without that kernel"
                strikes.condemn(name)
            elif not candidate.abandoned:
                strikes.end(name)
            elif compiler := compiling():
                strikes.end(name)
                late = True
                reason = f"{compiler} is still compiling it; it is raced the next time"
                found[name] = Entry(name, "not raced", reason=reason)
            else:
                over = f"{name} hangs, and may keep the device busy"
    return Verdict(tuple(found[c.name] for c in candidates), complete=not (over or late))


def _try(candidate: Candidate, patience: float) -> Entry:
    """Check and time one; it is abandoned if it does not come back."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["error"] = candidate.check()
            box["seconds"] = candidate.seconds()
        except BaseException as raised:  # whatever a kernel does must not reach the user's model
            box["raised"] = raised

    thread = threading.Thread(target=work, name=f"race of {candidate.name}", daemon=True)
    thread.start()
    thread.join(patience)
    name = candidate.name
    if thread.is_alive():
        candidate.abandoned = True
        return Entry(name, "out", reason=f"did not come back within {patience:g} s")
    raised = box.get("raised")
    if isinstance(raised, Wrong):
        return Entry(name, "out", reason=str(raised))
    if raised is not None:
        first = (str(raised).strip().splitlines() or [""])[0]
        return Entry(name, "out", reason=f"raised {type(raised).__name__}: {first[:200]}")
    return Entry(name, "ran", seconds=box["seconds"], error=box["error"])


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON objects."""
    return {"complete": verdict.complete, "entries": [vars(entry) for entry in verdict.entries]}


def from_json(data: Mapping[str, Any]) -> Verdict:
    """The verdict of `to_json`.

    Raises:
        ValueError: it is none.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        entries = tuple(_entry(e) for e in data["entries"])
        if isinstance(data["complete"], bool) and entries:
            return Verdict(entries, data["complete"])
    raise ValueError("no verdict")


def _entry(data: Mapping[str, Any]) -> Entry:
    entry = Entry(**data)
    numbers = all(n is None or isinstance(n, (int, float)) for n in (entry.seconds, entry.error))
    text = isinstance(entry.name, str) and isinstance(entry.reason, (str, type(None)))
    ran = (entry.status == "ran") == (entry.seconds is not None)
    if not (numbers and text and ran and entry.status in ("ran", "out", "not raced")):
        raise ValueError("no entry")
    return entry
