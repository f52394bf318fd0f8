"""`sm12x::attention` by FlashInfer's FA2 kernels over pages, with attention sinks where the call has them.

The plain wrapper takes `sinks=` and ignores it in this kernel; `BatchAttentionWithAttentionSinkWrapper` is the one that
honours them. The plan is made on the host from the shape (`plans.py`), so the length must be known there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import KIB, Arch
from ...ops import attention as op
from ...registry import Call
from ..triton.arguments import dtype_name
from . import installed
from .lengths import known_length, known_refusal
from .pages import page_size, page_table, paged, pages_apart
from .plans import PLANS

FAMILIES = ("sm8x", "sm9x", "sm10x", "sm12x")  # no gate in FlashInfer: mma.sync and cp.async, from SM80 on
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
WIDE_HEAD_DIMS = ((512, 512),)  # FlashInfer's tests have them on cards with more shared memory


def fa2_refusal(call: Call, arch: Arch) -> str | None:
    """Why `fa2` cannot take this call on this card, in one sentence, or None."""
    q, k, v = call.q, call.k, call.v
    missing = installed.refusal(arch, FAMILIES)
    if missing:
        return missing
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        names = ", ".join(dtype_name(t.dtype) for t in (q, k, v))
        return f"FA2 needs q, k and v in fp16 or bf16 alike, not {names}"
    if call.out_dtype not in (None, *DTYPES, torch.float32):
        return f"writes fp16, bf16 or fp32, not {dtype_name(call.out_dtype)}"
    dims = (q.shape[3], v.shape[3])
    allowed = HEAD_DIMS + (WIDE_HEAD_DIMS if arch.smem_per_block >= 160 * KIB else ())
    if dims not in allowed:
        known = ", ".join(str(a) if a == b else f"{a}/{b}" for a, b in allowed)
        return f"FA2 is used for head dims {known}, here {dims[0]}/{dims[1]}"
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return "the numbers of heads must be known while compiling"
    if call.sinks is not None and (call.softcap or dims[0] != dims[1]):
        return "FlashInfer's attention with sinks has neither a softcap nor different head dims"
    return known_refusal(call, q.shape[2], k.shape[2])


@installed.explained("flashinfer.fa2")
def fa2(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::attention`, see `sm12x_compile.ops.attention` for the arguments and the result."""
    B, H, S, D = q.shape
    T, Dv = k.shape[2], v.shape[3]
    length = known_length(causal, window_left, q_shift, S, T)
    if not length or not q.numel():  # sizes for which the graph was not compiled
        return op.reference(
            q, k, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding,
            q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
        )  # fmt: skip
    k, v, page, apart = _pages(k, v)
    window = -1 if window_left is None else window_left
    shape = ("fa2", B, H, k.shape[1], S, length, T, D, Dv, page, apart, q.dtype, causal, window, scale, softcap,
             sinks is not None)  # fmt: skip

    def make(workspace: Tensor) -> Any:
        wrapper = _wrapper(workspace, q.dtype, D, Dv, window, sinks is not None)
        used = -(-length // page)
        table = page_table(B, T, page, apart, torch.device("cpu"))[:, :used]
        wrapper.plan(
            qo_indptr=torch.arange(B + 1, dtype=torch.int32) * S,
            paged_kv_indptr=torch.arange(B + 1, dtype=torch.int32) * used,
            paged_kv_indices=table.reshape(-1).to(q.device),
            paged_kv_last_page_len=torch.full((B,), (length - 1) % page + 1, dtype=torch.int32),
            num_qo_heads=H,
            num_kv_heads=k.shape[1],
            head_dim_qk=D,
            head_dim_vo=Dv,
            page_size=page,
            causal=causal,
            window_left=window,
            logits_soft_cap=softcap or None,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
        return wrapper

    wrapper = PLANS.get(q.device, shape, make)
    rows = q.transpose(1, 2).reshape(B * S, H, D)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    out = q.new_empty((B * S, H, Dv))
    extra = () if sinks is None else (sinks.float().contiguous(), scale)
    wrapper.run(rows, (paged(k, page, apart), paged(v, page, apart)), *extra, out=out)
    result = out.view(B, S, H, Dv).transpose(1, 2)
    return result if out_dtype in (None, q.dtype) else result.transpose(1, 2).to(out_dtype).transpose(1, 2)


def _pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """k and v (copied where pages cannot show them), the pages' size, and how many lie between the rows."""
    page = page_size(k.shape[2]) or 1
    k, v = (t if t.stride(3) == 1 and _on_pages(t, page) else t.contiguous() for t in (k, v))
    apart, other = (pages_apart(t.stride(), t.shape[0], page) for t in (k, v))
    if apart != other:  # one table serves both
        k, v = k.contiguous(), v.contiguous()
        apart = pages_apart(k.stride(), k.shape[0], page)
    assert apart is not None
    return k, v, page, apart


def _on_pages(t: Tensor, page: int) -> bool:
    return pages_apart(t.stride(), t.shape[0], page) is not None


def _wrapper(workspace: Tensor, dtype: torch.dtype, D: int, Dv: int, window: int, sinks: bool) -> Any:
    if not sinks:
        plain = installed.entry("flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper")
        return plain(workspace, kv_layout="HND", backend="fa2")
    with_sinks = installed.entry("flashinfer.attention:BatchAttentionWithAttentionSinkWrapper")
    return with_sinks(
        workspace, kv_layout="HND", backend="fa2", q_data_type=dtype, kv_data_type=dtype, head_dim_qk=D,
        head_dim_vo=Dv, window_left=window,
    )  # fmt: skip
