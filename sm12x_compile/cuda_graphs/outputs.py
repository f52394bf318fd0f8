"""Results that stay what they were.

A CUDA graph writes its results to the same memory at every replay. In CUDA graph trees a tensor of an earlier call
raises an error during the first calls, and from then on it *silently* holds the newest values (seen on torch 2.11): a
loop that keeps the logits of its steps would be wrong. What leaves the graph is therefore copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor


class Way(Enum):
    """How a result is copied."""

    KEEP = auto()  # it shares memory with an argument, or is no tensor: it stays what it is
    CLONE = auto()
    STRIDED = auto()  # it has gaps; compiled code after a graph break may count on its strides
    SHARED = auto()  # it shares memory with another result, and the copies shall do so too


def kept(compiled: Callable[..., Any], replays: Callable[[], bool]) -> Callable[..., Any]:
    """A compiled function whose results belong to the caller.

    Args:
        compiled: takes tensors and numbers one by one and returns a sequence.
        replays: whether a recording is in use by now; before that, results have memory of their own.
    """
    ways: list[Way] | None = None  # what shares memory with what is the same in every call

    def run(*args: Any) -> Any:
        nonlocal ways
        results = compiled(*args)
        if not replays():
            return results
        if ways is None:
            ways = ways_to_copy(args, results)
        return copies(results, ways)

    return run


def ways_to_copy(args: Sequence[Any], results: Sequence[Any]) -> list[Way]:
    given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    memory = [r.untyped_storage().data_ptr() if isinstance(r, Tensor) else None for r in results]
    ways = []
    for result, address in zip(results, memory, strict=True):
        if address is None or address in given:
            ways.append(Way.KEEP)
        elif memory.count(address) > 1:
            ways.append(Way.SHARED)
        else:
            ways.append(Way.CLONE if result.clone().stride() == result.stride() else Way.STRIDED)
    return ways


def copies(results: Sequence[Any], ways: Sequence[Way]) -> list[Any]:
    memory: dict[int, Tensor] = {}  # address of shared memory -> its copy, as bytes
    new: list[Any] = []
    for result, way in zip(results, ways, strict=True):
        if way is Way.KEEP:
            new.append(result)
        elif way is Way.CLONE:
            new.append(result.clone())
        elif way is Way.STRIDED:
            new.append(_strided(result))
        else:
            address = result.untyped_storage().data_ptr()
            if address not in memory:
                memory[address] = result.new_empty(0, dtype=torch.uint8).set_(result.untyped_storage()).clone()
            storage = memory[address].untyped_storage()
            new.append(result.new_empty(0).set_(storage, result.storage_offset(), result.shape, result.stride()))
    return new


def _strided(tensor: Tensor) -> Tensor:
    if torch._debug_has_internal_overlap(tensor) == 1:  # expanded: one element stands for many
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
