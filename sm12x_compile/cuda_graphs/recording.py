"""From code that launches kernels to a recording that is replayed: what must hold is seen while the code still runs.

Inductor hands every stretch of code that it can record to `torch._inductor.compile_fx.cudagraphify`, with what it knows
of the inputs. `recordings` stands there while one graph is compiled and makes a `Recording` of each. In its first
two calls the code runs as it is, and a `Recording` learns what Inductor cannot know:

* **Does it wait for the GPU?** A custom op may read a value on the host. In a capture that fails, and it leaves the
  allocator in a state in which no CUDA graph of the process can be recorded any more (seen on torch 2.11).
* **Which inputs stay where they are?** Inductor takes parameters, and tensors that are marked static, to lie at one
  address. It copies all others into the recording at every replay, and records nothing that writes one of them. A cache
  that the user passes as an argument is both. An input that the code writes, or a large one, is taken as static when
  its address was the same twice. A replay checks addresses; an input that moves too often ends that.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

logger = logging.getLogger("sm12x_compile")
Code = Callable[[list[Any]], Any]

LARGE = 1 << 20  # bytes: an input that is worth having static; smaller ones are copied at every replay
MAX_MOVES = 8  # recordings of one piece of code because inputs moved
MAX_NUMBERS = 8  # recordings of one piece of code because numbers changed
_ATTEMPTS = 3  # calls that wait for the GPU before that is taken as a property of the code: others may have done it


@dataclass
class Recordings:
    """What became of one graph: a recording for each stretch of it, or why there is none."""

    parts: list[Recording] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def replays(self) -> bool:
        return any(part.replays for part in self.parts)


class Recording:
    """One stretch of Inductor's code: run as it is at first, then recorded and replayed.

    Args:
        code: takes its inputs as a list, which it empties.
        record: makes a replaying function from code and the positions of its static inputs.
        static: positions of inputs that lie at one address.
        written: positions of inputs that the code writes.
        names: of the inputs, for the reason.
        gave_up: called with the reason when it turns out that this code is not to be recorded.
    """

    def __init__(
        self, code: Code, record: Callable[[Code, Sequence[int]], Code], static: Sequence[int],
        written: Sequence[int], names: Sequence[str], gave_up: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.code = code
        self._record = record
        self._static = frozenset(static)
        self._written = frozenset(written) - self._static
        self._names = names
        self._gave_up = gave_up
        self._calls = 0
        self._waits = 0
        self._watched: tuple[int, ...] = ()  # inputs whose address decides whether they are static
        self._addresses: tuple[int, ...] = ()  # theirs, in the last call
        self._places: set[tuple[int, ...]] = set()  # all that were seen
        self._ints: list[int] = []  # inputs that are numbers
        self._numbers: set[tuple[int, ...]] = set()  # their values so far
        self._recorded: Code | None = None
        self._given_up = False

    @property
    def replays(self) -> bool:
        return self._recorded is not None

    def __call__(self, inputs: list[Any]) -> Any:
        if self._given_up or self._is_a_number_too_many(inputs):
            return self.code(inputs)
        self._calls += 1
        if self._calls == 1:  # compiles and tunes kernels, which waits for the GPU
            self._watched = tuple(k for k, x in enumerate(inputs) if self._is_watched(k, x))
        moved = self._moved(inputs)
        if self._calls == 1:
            return self.code(inputs)
        if len(self._places) > MAX_MOVES:
            self._settle(moved)
        if self._recorded is not None:
            return self._recorded(inputs)
        if self._given_up or moved & self._written:
            return self.code(inputs)
        places, results = waits_for_gpu(lambda: self.code(inputs))
        if not places:
            self._watch_no_more(moved)
        else:
            self._waits += 1
            if self._waits == _ATTEMPTS:
                self._give_up(f"its code waits for the GPU ({places[0]})")
        return results

    def _is_a_number_too_many(self, inputs: list[Any]) -> bool:
        """Every number (a size, a position) is a constant of a recording."""
        if self._calls == 0:
            self._ints = [k for k, x in enumerate(inputs) if isinstance(x, int)]
        if not self._ints:
            return False
        numbers = tuple(inputs[k] for k in self._ints)
        if numbers in self._numbers:
            return False
        if len(self._numbers) < MAX_NUMBERS:
            self._numbers.add(numbers)
            return False
        if len(self._numbers) == MAX_NUMBERS:
            self._numbers.add(numbers)
            self._gave_up(f"a number that it is given changes from call to call; {MAX_NUMBERS} values were recorded")
        return True

    def _is_watched(self, k: int, value: Any) -> bool:
        if k in self._static or not isinstance(value, torch.Tensor):
            return False
        return k in self._written or value.numel() * value.element_size() >= LARGE

    def _moved(self, inputs: list[Any]) -> set[int]:
        """Which of the watched inputs lie elsewhere than in the last call."""
        addresses = tuple([inputs[k].data_ptr() for k in self._watched])
        if addresses == self._addresses:
            return set()
        before, self._addresses = self._addresses or addresses, addresses
        self._places.add(addresses)
        return {k for k, old, new in zip(self._watched, before, addresses, strict=True) if old != new}

    def _watch_no_more(self, moved: set[int]) -> None:
        """Record anew; what has moved is copied at every replay from now on, and need not be watched."""
        self._watched = tuple(k for k in self._watched if k not in moved)
        self._addresses, self._places = (), set()
        self._recorded = self._record(self.code, sorted(self._static.union(self._watched)))

    def _settle(self, moved: set[int]) -> None:
        """Too many recordings because inputs moved."""
        written = sorted(moved & self._written)
        if written:
            name = self._names[written[0]]
            self._give_up(
                f"it writes input {name}, which lies elsewhere from call to call; keep it in one tensor, marked by "
                "torch._dynamo.mark_static_address"
            )
        elif moved:
            self._watch_no_more(moved)

    def _give_up(self, reason: str) -> None:
        self._given_up, self._recorded = True, None
        self._gave_up(reason)


def waits_for_gpu(call: Callable[[], Any]) -> tuple[list[str], Any]:
    """Run something; the places where it waited for the GPU, and what it returned."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _debug_syncs("warn")
        try:
            results = call()
        finally:
            _debug_syncs(before)
    found = []
    for message in said:
        text = str(message.message)
        if "synchronizing CUDA operation" in text:
            found.append(f"{message.filename}:{message.lineno}")
        elif not text.startswith("Synchronization debug mode"):  # that it is a prototype, at its first use
            warnings.warn_explicit(message.message, message.category, message.filename, message.lineno)
    return list(dict.fromkeys(found)), results


def _debug_syncs(mode: int | str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def recordings(gave_up: Callable[[str], None], *, watch: bool = True) -> Iterator[Recordings]:
    """Stand between Inductor and its CUDA graph trees while one graph is compiled.

    Only names in Inductor's modules are replaced, for the time of the compilation, which Dynamo's lock keeps to one
    thread.

    Args:
        gave_up: called with the reason when a recording gives up in a later call.
        watch: whether to run the code as it is at first; otherwise Inductor records as it always does.
    """
    from torch._inductor import compile_fx, cudagraph_utils

    made = Recordings()
    cudagraphify = compile_fx.cudagraphify

    def instead(model: Code, static_input_idxs: Sequence[int] = (), **known: Any) -> Code:
        def record(code: Code, static: Sequence[int]) -> Code:
            replaying: Code = cudagraphify(code, static_input_idxs=tuple(static), **known)
            return replaying

        names = [p.name for p in known.get("placeholders", ())]
        part = Recording(model, record, static_input_idxs, known.get("mutated_input_idxs", ()), names, gave_up)
        made.parts.append(part)
        return part if watch else record(model, static_input_idxs)

    listener = _Skips(made.skipped)
    cudagraph_utils.cudagraphs_log.addHandler(listener)
    try:
        with mock.patch.object(compile_fx, "cudagraphify", instead):
            yield made
    finally:
        cudagraph_utils.cudagraphs_log.removeHandler(listener)


class _Skips(logging.Handler):
    """Inductor's own reasons to record nothing."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.into = into

    def emit(self, record: logging.LogRecord) -> None:
        self.into.append(record.getMessage())
