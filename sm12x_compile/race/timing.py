"""How long a call takes: on a GPU by replays of a CUDA graph, on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]
SPENT = 0.25  # seconds that one candidate is timed for, at most
REPEATS = (3, 25)  # at least, at most


class Timer(Protocol):
    """Measures a candidate; a test hands over one that knows the answer."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of one call; `calls` do the same work on different operands."""
        ...


class HostTimer:
    """For work that is done when the call returns."""

    def seconds(self, calls: Sequence[Call]) -> float:
        for call in calls:
            call()
        times: list[float] = []
        until = time.perf_counter() + SPENT
        while len(times) < REPEATS[0] or (time.perf_counter() < until and len(times) < 200):
            begin = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


class DeviceTimer:
    """CUDA events around replays of a graph that holds every call once, so launches cost nothing.

    What cannot be captured is timed call by call, with its launches; `captured` says which it was.
    """

    captured = True

    def seconds(self, calls: Sequence[Call]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # This thread's work alone: others may go on allocating.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for call in calls:
                    call()
            run: Call = graph.replay
            self.captured = True
        except RuntimeError:
            self.captured = False

            def run() -> None:
                for call in calls:
                    call()

        try:
            return self._median(run, stream) / len(calls)
        finally:
            if self.captured:
                graph.reset()

    def _median(self, run: Call, stream: torch.cuda.Stream) -> float:
        times: list[float] = []
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
            until = time.perf_counter() + SPENT
            while len(times) < REPEATS[0] or (time.perf_counter() < until and len(times) < REPEATS[1]):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(times)
