"""How many keys a call of attention sees, in the terms of FlashInfer: a length, and masks aligned to its end.

FlashInfer's causal mask and window put the last query at the last key. Ours put query 0 at position
``q_offset + q_shift``. They are the same where the keys end at the position of the last query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Call

_TENSORS = {
    "bias": "a bias or mask tensor",
    "key_padding": "a padding mask",
    "q_segments": "packed sequences",
    "chunk": "attention in chunks",
}


def _plain(call: Call) -> str | None:
    """Masks that none of the kernels knows."""
    for name, what in _TENSORS.items():
        if getattr(call, name) is not None:
            return f"has no {what}" if name == "chunk" else f"does not take {what}"
    right = call.window_right
    if right is not None and not (call.causal and right >= 0):
        return "has no window to the right"
    return None


def known_refusal(call: Call, queries: Any, keys: Any) -> str | None:
    """Why the keys that are seen are not known on the host, where FlashInfer plans, in one sentence, or None."""
    if call.q_offset is not None or call.kv_len is not None:
        return "plans on the host, but how far the cache is filled is known on the device alone"
    return _plain(call) or _alignment(call, call.hint(queries), call.hint(keys))


def _alignment(call: Call, queries: int, keys: int) -> str | None:
    shift = call.hint(call.q_shift)
    if not call.causal and call.window_left is None:
        return None
    if shift < 0:
        return "the first queries have no keys, which it does not promise to handle"
    if queries + shift > keys or (not call.causal and queries + shift != keys):
        return "aligns masks to the last key, which is not the position of the last query"
    return None


def known_length(causal: bool, window_left: int | None, q_shift: int, queries: int, keys: int) -> int | None:
    """The keys that count, from the front, or None if `_alignment` does not hold for these sizes."""
    if not causal and window_left is None:
        return keys
    end = queries + q_shift
    aligned = q_shift >= 0 and (end <= keys if causal else end == keys)
    return end if aligned else None


def last_token_refusal(call: Call) -> str | None:
    """Why `last_token_length` is not all that masks do to the one query of this call, in one sentence, or None."""
    plain = _plain(call)
    if plain:
        return plain
    runtime = call.kv_len is not None or (call.causal and call.q_offset is not None)
    if runtime and call.empty_rows == "mean" and call.sinks is None:
        return "cannot tell a query without keys, which here gets the mean of all values"
    if call.causal and call.q_offset is None and call.hint(call.q_shift) < 0:
        return "the query has no keys, which it does not promise to handle"
    if call.window_left is None:
        return None
    if call.q_offset is not None or call.kv_len is not None:
        return "aligns the window to the last key, which need not be the position of the query"
    cache = call.latent if "latent" in call.arguments else call.k
    return _alignment(call, 1, call.hint(cache.shape[-2]))


def last_token_length(
    batches: Any, keys: int, causal: bool, q_offset: Tensor | None, q_shift: int, kv_len: Tensor | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """int32 ``[B]``: how many keys a single query sees, from the front; 0 or less is none. Plain PyTorch, no sync."""
    length: Tensor | None = None
    if causal and q_offset is not None:
        length = q_offset + (q_shift + 1)
    elif causal:
        keys = max(0, min(keys, q_shift + 1))
    if kv_len is not None:
        length = kv_len if length is None else torch.minimum(length, kv_len)
    if length is None:
        return torch.full((batches,), keys, dtype=torch.int32, device=device)
    return length.clamp(max=keys).to(torch.int32).expand(batches).contiguous()
