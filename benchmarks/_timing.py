"""Device times by CUDA graph replay: medians, over rotated inputs, free of launch overhead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def graph_time(calls: Sequence[Call], *, replays: int = 25, warmup: int = 3) -> float:
    """Median seconds of one call.

    Args:
        calls: the same work on different inputs (four or more, so that one call does not find its own inputs in
            the L2 cache); all are captured in one graph, in order.
        replays: replays that are timed one by one, with CUDA events.
        warmup: replays before those; the calls also run once uncaptured, which compiles and autotunes.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(warmup):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    graph.reset()
    return statistics.median(times)


def median_ms(step: Call, *, repeats: int = 30, warmup: int = 6) -> float:
    """Median milliseconds of a step between two CUDA events, the GPU idle before: what the host does counts."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def host_time(call: Call, *, repeats: int = 200) -> float:
    """Seconds that the host spends on a call before it returns: Python, checks and the launch."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_bandwidth(gib: float = 2.0, repeats: int = 10) -> float:
    """Bytes per second of a device-to-device copy, reads and writes counted. (In a graph it would be slower.)"""
    source = torch.randn(int(gib * 2**30 / 4), device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * source.numel() * 4 * repeats / (begin.elapsed_time(end) * 1e-3)


def matmul_rate(size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP per second of a square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / graph_time([lambda: torch.mm(a, b, out=out)], replays=9)
