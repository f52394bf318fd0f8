"""`sm12x::mla` for many queries: keys and values of every head, then flash attention in Triton.

The keys' rotary part, which all heads share, stays where it is: the kernel reads it as the second tile of the head
dim, so no joined keys are written for every head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import card_of, device_guard, refusal, split_head_dim
from .attention_prefill import prefill_launch
from .tiles import Tiles, prefill_tiles

MAX_ROPE = 128


def mla_prefill_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_prefill` cannot or should not take this call on this card, in one sentence, or None."""
    B, N = call.q_nope.shape[0], call.q_nope.shape[3]
    Hw, V = call.w_uv.shape[:2]
    rope = 0 if call.q_rope is None else call.q_rope.shape[3]
    if not all(isinstance(n, int) for n in (N, V, rope)):
        return "the widths of a head must be known while compiling"
    if rope and split_head_dim(N)[1]:
        return f"{N} columns without rotation take two tiles, and the rotary ones would be a third"
    if rope > MAX_ROPE:
        return f"the rotary part is wider than {MAX_ROPE}"
    if len({call.q_nope.dtype, call.w_uk.dtype, call.w_uv.dtype, call.latent.dtype}) > 1:
        return "queries, latents and weights have different dtypes"
    T = call.latent.shape[1]
    k, v = (call.latent.new_empty((B, Hw, T, n)) for n in (N, V))
    return refusal(Call("attention", {**call.arguments, "q": call.q_nope, "k": k, "v": v}), arch)


def expand(latent: Tensor, weight: Tensor) -> Tensor:
    """``weight[h] @ latent[b, t]`` for every head: ``[B, T, L]`` and ``[H, N, L]`` to ``[B, H, T, N]``, one product."""
    H, N, L = weight.shape
    B, T, _ = latent.shape
    return (latent @ weight.reshape(H * N, L).mT).view(B, T, H, N).transpose(1, 2)


def expand_both(latent: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every head, views of one product where the weights are halves of one parameter."""
    joined = _joined(w_uk, w_uv)
    if joined is None:
        return expand(latent, w_uk), expand(latent, w_uv)
    N = w_uk.shape[1]
    both = expand(latent, joined)
    return both[..., :N], both[..., N:]


def _joined(w_uk: Tensor, w_uv: Tensor) -> Tensor | None:
    """The parameter ``[H, N + V, L]`` that both are views of, or None."""
    (H, N, L), V = w_uk.shape, w_uv.shape[1]
    stride = ((N + V) * L, L, 1)
    shared = w_uk.untyped_storage()._cdata == w_uv.untyped_storage()._cdata
    beside = shared and w_uv.storage_offset() - w_uk.storage_offset() == N * L
    if w_uk.stride() != stride or w_uv.stride() != stride or not beside:
        return None
    return w_uk.as_strided((H, N + V, L), stride)


def mla_prefill(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor, w_uv: Tensor,
    scale: float, causal: bool = False, window_left: int | None = None, window_right: int | None = None,
    chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0, kv_len: Tensor | None = None,
    key_padding: Tensor | None = None, q_segments: Tensor | None = None, k_segments: Tensor | None = None,
    bias: Tensor | None = None, softcap: float = 0.0, sinks: Tensor | None = None, empty_rows: str = "zero",
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::mla`, see `sm12x_compile.ops.mla` for the arguments.

    Returns:
        ``[B, H, S, V]``.
    """
    k, v = expand_both(latent, w_uk, w_uv)
    width = q_nope.shape[3] + (0 if q_rope is None else q_rope.shape[3])
    tiles = prefill_tiles(card_of(q_nope), width, v.shape[3], q_nope.dtype, bias is not None)
    return run_mla_prefill(
        tiles, q_nope, q_rope, k, k_rope, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift,
        kv_len, key_padding, q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
    )  # fmt: skip


def run_mla_prefill(
    tiles: Tiles, q: Tensor, q_rope: Tensor | None, k: Tensor, k_rope: Tensor | None, v: Tensor,
    *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The attention of `mla_prefill` over expanded keys and values, with the tiles given."""
    from .prefill_kernel import prefill_kernel

    out, arguments, grid = prefill_launch(q, k, v, *args, **kwargs, tiles=tiles, q_rope=q_rope, k_rope=k_rope)
    if not out.numel() or not arguments["T"]:
        return out.zero_().transpose(1, 2)
    with device_guard(out):
        prefill_kernel[grid](
            **arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers
        )
    return out.transpose(1, 2)
