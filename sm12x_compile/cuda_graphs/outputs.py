"""Results that stay what they were.

A CUDA graph writes its results to the same memory at every replay. In CUDA graph trees a tensor of an earlier call
raises an error during the first calls, and from then on it *silently* holds the newest values (seen on torch 2.11): a
loop that keeps the logits of its steps would be wrong. What leaves the graph is therefore copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def kept(compiled: Callable[..., Any], replays: Callable[[], bool]) -> Callable[..., Any]:
    """A compiled function whose results belong to the caller.

    Args:
        compiled: takes tensors and numbers one by one and returns a sequence.
        replays: whether a recording is in use by now; before that, results have memory of their own.
    """
    foreign: frozenset[int] | None = None  # results that share memory with an input: they stay what they are

    def run(*args: Any) -> Any:
        nonlocal foreign
        results = compiled(*args)
        if not replays():
            return results
        if foreign is None:
            foreign = shared_with(args, results)
        return copies(results, foreign)

    return run


def shared_with(args: Sequence[Any], results: Sequence[Any]) -> frozenset[int]:
    """Which of the results share memory with an argument: which do is the same in every call."""
    memory = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    return frozenset(
        k for k, r in enumerate(results) if isinstance(r, Tensor) and r.untyped_storage().data_ptr() in memory
    )


def copies(results: Sequence[Any], without: frozenset[int]) -> list[Any]:
    """The results with new memory, but those `without`; results that share memory share it afterwards."""
    memory: dict[int, Tensor] = {}  # address of a storage -> its copy, where more than one result lies in it
    addresses = [
        r.untyped_storage().data_ptr() if isinstance(r, Tensor) and k not in without else None
        for k, r in enumerate(results)
    ]
    new: list[Any] = []
    for result, address in zip(results, addresses, strict=True):
        if address is None or result.device.type == "cpu":
            new.append(result)
        elif addresses.count(address) == 1:
            new.append(_copy(result))
        else:
            if address not in memory:
                whole = torch.empty(0, dtype=torch.uint8, device=result.device).set_(result.untyped_storage())
                memory[address] = whole.clone()
            view = torch.empty(0, dtype=result.dtype, device=result.device)
            view.set_(memory[address].untyped_storage(), result.storage_offset(), result.shape, result.stride())
            new.append(view)
    return new


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides: compiled code after a graph break may count on them."""
    if torch._debug_has_internal_overlap(tensor):  # type: ignore[attr-defined]  # expanded: one element stands for many
        return tensor.clone()
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return new.copy_(tensor)
