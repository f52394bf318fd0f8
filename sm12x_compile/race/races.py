"""Races while compiling: which kernels contend for a call, and what the report says of it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..arch import Arch
from ..options import Options
from ..registry import Call, Kernel
from ..toolchain import available_memory
from .ahead import compile_ahead, fake_run
from .compiling import compiler_at_work
from .contest import PATIENCE, Verdict, contest
from .entrant import Entrant, Field, compared
from .identity import device_key, kernel_key, versions
from .spec import CannotRace, Spec, bucket, describe, title
from .timing import DeviceTimer, HostTimer, Timer
from .verdicts import Verdicts

logger = logging.getLogger("sm12x_compile")

# Kernels of this merit or less are formulas in plain PyTorch: always right, never fast. They don't race.
LAST_RESORT = 5

_settled: dict[str, Verdict] = {}  # in this process


def racing(options: Options, arch: Arch) -> bool:
    """Whether kernels are chosen by a race on this device."""
    return options.select == "race" or (options.select == "auto" and arch.is_cuda)


class Races:
    """Chooses kernels for one graph; `records` is what the report shows."""

    patience = PATIENCE

    def __init__(
        self,
        options: Options,
        arch: Arch,
        *,
        timer: Timer | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.options, self.arch = options, arch
        self.timer: Timer = timer or (DeviceTimer() if arch.is_cuda else HostTimer())
        self.verdicts = verdicts or Verdicts()
        self.records: list[dict[str, Any]] = []

    def choose(self, call: Call, accepted: Sequence[Kernel]) -> tuple[Kernel | None, list[tuple[str, str]]]:
        """The kernel to use, and (name, why not) of those that raced and lost.

        Args:
            call: what is to be computed; its tensors may be fake.
            accepted: the kernels that take it, in order of merit.
        """
        entrants = _entrants(accepted)
        if not entrants:
            return (accepted[0] if accepted else None), []
        try:
            verdict = self._verdict(call, entrants)
        except CannotRace as reason:
            logger.info("no race for %s: %s", call.op, reason)
            self.records.append({"op": call.op, "call": "", "winner": accepted[0].name, "why": f"no race: {reason}"})
            return accepted[0], []
        return _by(verdict, accepted)

    def prepare(self, calls: Sequence[tuple[Call, Sequence[Kernel]]]) -> None:
        """Compile side by side what the choices of these calls, with the kernels that accept them, are going to run."""
        runs: dict[torch.device, dict[str, Callable[[], object]]] = {}
        for call, accepted in calls:
            entrants = _entrants(accepted)
            with contextlib.suppress(CannotRace):
                spec, device = describe(call), device_of(call)
                if device.type != "cuda" or not entrants:
                    continue
                key = self._key(spec, device, entrants)
                kept = _settled.get(repr(key)) or self.verdicts.load(key)
                again = kept is None or not (kept.complete or repr(key) in _settled)
                specs = list({repr(s): s for s in (spec, compared(spec, device))}.values()) if again else [spec]
                for kernel in entrants:
                    if (kernel.triton or kernel.inline) and (again or (kept and kernel.name == kept.winner)):
                        run = partial(fake_run, kernel, specs, device, self.arch, self.options)
                        runs.setdefault(device, {}).setdefault(repr((kernel.name, specs)), run)
        for device, wanted in runs.items():
            begun = time.monotonic()
            kernels = compile_ahead(list(wanted.values()), device)
            logger.debug("%d Triton kernels compiled ahead in %.1f s", kernels, time.monotonic() - begun)

    def _key(self, spec: Spec, device: torch.device, entrants: Sequence[Kernel]) -> dict[str, Any]:
        return {
            "call": bucket(spec), "device": device_key(device), "versions": versions(),
            "kernels": [kernel_key(k) for k in entrants], "seconds": self.options.race_seconds,
        }  # fmt: skip

    def _verdict(self, call: Call, entrants: Sequence[Kernel]) -> Verdict:
        spec = describe(call)
        device = device_of(call)
        key = self._key(spec, device, entrants)
        name = repr(key)
        if name in _settled:
            return _settled[name]
        verdict, source = self.verdicts.load(key), "kept"
        begun = time.monotonic()
        if verdict is None or not verdict.complete:
            with self.verdicts.alone(3 * self.options.race_seconds):
                verdict = self.verdicts.load(key)  # another process may have been faster
                if verdict is None or not verdict.complete:
                    verdict = self._race(spec, device, entrants, key)
                    source = "raced" if self.verdicts.store(key, verdict) else "raced, could not be kept"
        _settled[name] = verdict
        self._record(spec, verdict, source, time.monotonic() - begun)
        return verdict

    def _race(self, spec: Spec, device: torch.device, kernels: Sequence[Kernel], key: dict[str, Any]) -> Verdict:
        free = (lambda: free_bytes(device, self.arch)) if device.type == "cuda" else None
        field = Field(spec, device, self.arch, self.options, self.timer, seed=_seed(), free_bytes=free)
        entrants = [Entrant(kernel, field) for kernel in kernels]
        with _progress(title(spec), len(entrants)) as step:
            verdict = contest(
                entrants, bound=self.options.race_seconds, patience=self.patience,
                strikes=self.verdicts.strikes(key), step=step, compiling=compiler_at_work, works=field.works,
            )  # fmt: skip
        field.release()
        if device.type == "cuda" and not any(entrant.abandoned for entrant in entrants):
            with contextlib.suppress(RuntimeError):  # a device that was lost
                torch.cuda.empty_cache()  # memory of the race's stream serves no other
        return verdict

    def _record(self, spec: Spec, verdict: Verdict, source: str, seconds: float) -> None:
        record = {
            "op": spec.op, "call": title(spec), "winner": verdict.winner, "source": source,
            "seconds": round(seconds, 3), "entries": [vars(entry) for entry in verdict.entries],
        }  # fmt: skip
        self.records.append(record)
        for name, reason in verdict.out.items():
            logger.warning("kernel %s is out for %s: it %s", name, title(spec), reason)
        logger.info("race of %s: %s wins (%s)", title(spec), verdict.winner, source)


def _entrants(accepted: Sequence[Kernel]) -> list[Kernel]:
    """Those that race; one alone has no rival, but if it is opaque it must show that it is right."""
    found = [k for k in accepted if k.merit > LAST_RESORT]
    return [] if len(found) == 1 and found[0].inline else found


def _by(verdict: Verdict, accepted: Sequence[Kernel]) -> tuple[Kernel | None, list[tuple[str, str]]]:
    """The winner, else the first that is not out."""
    usable = [k for k in accepted if k.name not in verdict.out]
    winner = next((k for k in usable if k.name == verdict.winner), usable[0] if usable else None)
    best = next((e.seconds for e in verdict.entries if winner and e.name == winner.name), None)
    why = []
    for entry in verdict.entries:
        if winner is not None and entry.name == winner.name:
            continue
        if entry.status == "ran" and entry.seconds is not None and best is not None:
            why.append((entry.name, f"raced: {entry.seconds * 1e6:.1f} us, the winner {best * 1e6:.1f} us"))
        else:
            why.append((entry.name, f"raced: {entry.reason}"))
    return winner, why


def device_of(call: Call) -> torch.device:
    """Where the call's tensors live."""
    tensors = [a for a in call.arguments.values() if isinstance(a, torch.Tensor)]
    if not tensors:
        raise CannotRace("the call has no tensors")
    device = tensors[0].device
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise CannotRace(f"its tensors are on {device.type}")
    return device


def free_bytes(device: torch.device, arch: Arch) -> int:
    """What may be allocated on a GPU without running out, the allocator's own reserve included."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(torch.cuda.mem_get_info(device)[0])
    if arch.unified_memory:  # the driver counts the page cache as used; Linux gives it back
        free = max(free, available_memory() or 0)
    return free + cached


def _seed() -> int:
    """Fresh operands in each race; the user's generators are left alone."""
    return time.time_ns() & 0x7FFFFFFF


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Shown on a terminal while a race runs."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"racing {text}")
        yield lambda name, number: bar.update(task, description=f"racing {text}: {name} ({number} of {total})")
