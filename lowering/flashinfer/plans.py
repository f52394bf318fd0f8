"""FlashInfer's planned wrappers: made on the host, once for a shape, outside of every CUDA graph.

A wrapper plans its schedule on the host and copies it to the device; `run` then only launches. Inductor runs a graph
before it captures it, and allocates that first run in the memory pool of the graph, which it takes back afterwards; so
a wrapper is made in a thread of its own, whose allocations belong to no graph.

Wrappers on one stream share the device's workspace. A wrapper that a CUDA graph has captured is kept for good.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from .installed import FlashInferError

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
KEPT = 64  # wrappers; each holds about 8 MiB on the device and on the host

Make = Callable[[Tensor], Any]
_Key = tuple[torch.device, int, Hashable]


class _Planned:
    """A planned wrapper; captured ones must outlive the graphs that hold their addresses."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.captured = False


class Plans:
    """Planned wrappers by device, stream and shape, the ones used last."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._planned: OrderedDict[_Key, _Planned] = OrderedDict()
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}
        self._lock = Lock()

    def get(self, device: torch.device, shape: Hashable, make: Make) -> Any:
        """The wrapper of this shape; `make` gets the workspace and plans a new one.

        Raises:
            FlashInferError: the shape is new and a CUDA graph is being captured.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with self._lock:
            key = (device, stream, shape)
            planned = self._planned.get(key)
            if planned is None and capturing:
                planned = self._on_any_stream(device, shape)
                if planned is None:
                    raise FlashInferError(
                        "FlashInfer plans this shape on the host: run the model once before you capture a CUDA graph"
                    )
            elif planned is None:
                planned = self._planned[key] = _Planned(self._make(device, stream, make))
                self._drop()
            if key in self._planned:
                self._planned.move_to_end(key)
            planned.captured = planned.captured or capturing
            return planned.wrapper

    def _on_any_stream(self, device: torch.device, shape: Hashable) -> _Planned | None:
        """A capture has a stream of its own; what ran before it ran on another."""
        return next((p for key, p in self._planned.items() if (key[0], key[2]) == (device, shape)), None)

    def clear(self) -> None:
        """Forget everything that no CUDA graph may hold."""
        with self._lock:
            for key in [key for key, planned in self._planned.items() if not planned.captured]:
                del self._planned[key]

    def _drop(self) -> None:
        loose = [key for key, planned in self._planned.items() if not planned.captured]
        for key in loose[: max(0, len(self._planned) - self._kept)]:
            del self._planned[key]

    def _make(self, device: torch.device, stream: int, make: Make) -> Any:
        result: list[Any] = []
        failure: list[BaseException] = []
        current = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def run() -> None:
            try:
                with torch.cuda.stream(current):
                    if (device, stream) not in self._workspaces:
                        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
                        self._workspaces[device, stream] = workspace
                    result.append(make(self._workspaces[device, stream]))
            except BaseException as error:
                failure.append(error)

        thread = Thread(target=run, name="flashinfer-plan")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]


PLANS = Plans()
