"""`sm12x::attention` for a single query by FlashInfer's xqa: the cache in place, its length read on the device.

xqa needs no plan, and what it works in is allocated for each call: it can be captured in a CUDA graph as it is, and
calls on different streams do not meet. The page table and the lengths are plain PyTorch: all layers share them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from ..triton.arguments import card_of, dtype_name
from . import installed
from .lengths import last_token_length, last_token_refusal
from .pages import page_size, page_table, paged, pages_apart

FAMILIES = ("sm9x", "sm10x", "sm12x")  # xqa.py: major in [9, 10, 12]
DTYPES = (torch.float16, torch.bfloat16)
MAX_GROUP = 32  # xqa/mha.cu: static_assert(nbValidRows <= 32u)
MAX_GROUP_WIDE = 16  # of heads over 256
_SEMAPHORE_BYTES = 8 << 20  # xqa_batch_decode_with_kv_cache keeps that much of its workspace for them


def xqa_refusal(call: Call, arch: Arch) -> str | None:
    """Why `xqa` cannot take this call on this card, in one sentence, or None."""
    q, k, v = call.q, call.k, call.v
    missing = installed.refusal(arch, FAMILIES)
    if missing:
        return missing
    queries = q.shape[2]
    if not isinstance(queries, int) or queries != 1:
        return f"xqa decodes one query a sequence, not {call.hint(queries)}"
    return _layout(q, k, v) or _mask(call) or _result(call)


def _layout(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    D, T = q.shape[3], k.shape[2]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"xqa needs q, k and v in fp16 or bf16 alike, not {', '.join(dtype_name(t.dtype) for t in (q, k, v))}"
    if not isinstance(D, int) or v.shape[3] != D or D % 16 or not 16 <= D <= 512:
        return f"xqa needs one head dim for keys and values, a multiple of 16 up to 512, here {D} and {v.shape[3]}"
    heads, kv_heads = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return "the numbers of heads must be known while compiling"
    most = MAX_GROUP if D <= 256 else MAX_GROUP_WIDE
    if heads // kv_heads > most:
        return f"xqa shares a KV head among up to {most} heads of {D}, not {heads // kv_heads}"
    if not isinstance(T, int) or page_size(T) is None:
        return f"xqa reads pages of 16 keys or more, and a cache of {T} keys cannot be cut into them"
    return _strides(k, v, T)


def _strides(k: Tensor, v: Tensor, keys: int) -> str | None:
    page, D = page_size(keys), k.shape[3]
    assert page is not None
    if not all(isinstance(s, int) for s in (*k.stride(), *v.stride())):
        return "the layout of the cache must be known while compiling"
    if k.stride() != v.stride():
        return "xqa wants keys and values that lie in memory alike"
    if k.stride(3) != 1 or any(s % D for s in k.stride()[1:3]) or pages_apart(k.stride(), k.shape[0], page) is None:
        return f"xqa cannot see a cache with strides {tuple(k.stride())} as pages"
    return None


def _mask(call: Call) -> str | None:
    if call.softcap:
        return "xqa has no softcap"
    return last_token_refusal(call)


def _result(call: Call) -> str | None:
    dtype = call.out_dtype
    if dtype is not None and dtype not in (*DTYPES, torch.float32):
        return f"writes fp16, bf16 or fp32, not {dtype_name(dtype)}"
    return None


def xqa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    q_offset: Tensor | None = None, q_shift: int = 0, kv_len: Tensor | None = None, sinks: Tensor | None = None,
    empty_rows: str = "zero", out_dtype: torch.dtype | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """`sm12x::attention` of one query a sequence; traced into the graph, but for the kernel itself."""
    B, T = q.shape[0], k.shape[2]
    page = page_size(T)
    assert page is not None
    apart = pages_apart(k.stride(), B, page)
    assert apart is not None
    length = last_token_length(B, T, causal, q_offset, q_shift, kv_len, q.device)
    table = page_table(B, T, page, apart, q.device)
    out: Tensor = torch.ops.sm12x_flashinfer.xqa(
        q, k, v, table, length.clamp(min=1), apart, scale, -1 if window_left is None else window_left, sinks
    )
    if kv_len is not None or (causal and q_offset is not None):
        empty = float("nan") if empty_rows == "nan" and sinks is None else 0.0
        out = out.masked_fill((length < 1).reshape(-1, 1, 1, 1), empty)
    return out if out_dtype is None else out.to(out_dtype)


def _xqa_fake(q: Tensor, *args: Any) -> Tensor:
    B, H, S, D = q.shape
    return q.new_empty((B, S, H, D)).transpose(1, 2)


@torch.library.custom_op("sm12x_flashinfer::xqa", mutates_args=())
@installed.explained("flashinfer.xqa")
def _xqa(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, apart: int, scale: float, window_left: int,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The kernel: q ``[B, Hq, 1, D]``, k and v ``[B, Hkv, T, D]``, their page table and int32 ``[B]`` lengths."""
    B, H, _, D = q.shape
    T, Hkv = k.shape[2], k.shape[1]
    page = page_size(T)
    assert page is not None
    if k.stride() != v.stride() or _strides(k, v, T) or pages_apart(k.stride(), B, page) != apart:
        # Laid out anew since the graph was compiled.
        k, v = k.contiguous(), v.contiguous()
        apart = pages_apart(k.stride(), B, page) or 0
        table = page_table(B, T, page, apart, q.device)
    query = q.transpose(1, 2).reshape(B, H, D).contiguous()
    out = torch.empty_like(query)
    installed.entry("flashinfer.decode:xqa_batch_decode_with_kv_cache")(
        query=query,
        kv_cache=(paged(k, page, apart), paged(v, page, apart)),
        workspace_buffer=_workspace(q, B, Hkv, H // Hkv),
        block_tables=table,
        seq_lens=length.view(torch.uint32),
        max_seq_len=T,
        bmm1_scale=scale,
        bmm2_scale=1.0,
        window_left=window_left,
        out=out,
        sinks=None if sinks is None else sinks.float().contiguous(),
        kv_layout="HND",
    )
    return out.view(B, 1, H, D).transpose(1, 2)


_xqa.register_fake(_xqa_fake)


def _workspace(q: Tensor, batches: int, kv_heads: int, group: int) -> Tensor:
    """Semaphores, zeroed, and room for the parts of the result: uint8.

    xqa splits a sequence among blocks until there is one for each multiprocessor; a block leaves a tile of rows in the
    tensor's dtype with a maximum and a sum for each. The room is for fp32 and twice as many rows.
    """
    blocks = batches * kv_heads + card_of(q).sm_count
    rows = 2 * (-(-group // 16) * 16)
    scratch = blocks * rows * (q.shape[3] + 16) * 4
    room = torch.empty(_SEMAPHORE_BYTES + scratch, dtype=torch.uint8, device=q.device)
    room[: 64 + 16 * batches * kv_heads].zero_()
    return room
