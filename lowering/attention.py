"""`sm12x::attention` → a kernel.

In order of merit:

    torch.sdpa         no mask or plain causal: PyTorch's own kernels are at the peak there
    triton.decode      few queries: split-KV over the cache in place, only as far as it is filled
    triton.prefill     flash attention with windows, sinks, softcap, lengths, segments
    torch.sdpa.masked  what SDPA can express with a mask tensor (on the CPU, mostly)
    aten               the formula in plain ATen, fused by Inductor
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.ops import attention as op
from sm12x_compile.ops.attention import allowed_keys
from sm12x_compile.registry import YES, Call, No, Verdict, accepts_unless, register_kernel

from .triton.attention_decode import attention_decode, decode_refusal
from .triton.attention_prefill import attention_prefill, prefill_refusal

_STRUCTURED = ("window_left", "window_right", "chunk", "kv_len", "key_padding", "q_segments")


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0


def _sdpa_refusal(call: Call) -> str | None:
    """What SDPA can express with no kernel at all."""
    if call.softcap:
        return "SDPA has no softcap"
    if call.sinks is not None:
        return "SDPA has no attention sinks"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"SDPA does not take {call.q.dtype}"
    return None


def _accepts_plain_sdpa(call: Call, arch: Arch) -> Verdict:
    refusal = _sdpa_refusal(call)
    if refusal:
        return No(refusal)
    for name in (*_STRUCTURED, "bias"):
        if getattr(call, name) is not None:
            return No(f"{name} needs a mask tensor")
    if call.causal and not (call.q_offset is None and _is_zero(call.q_shift)):
        return No("SDPA's causal mask has no offset")
    return YES


def _expanded(x: Tensor, heads: int) -> Tensor:
    """KV heads repeated to `heads`, without a copy until the kernel wants one."""
    if x.shape[1] == heads:
        return x
    B, Hkv, T, D = x.shape
    return x[:, :, None].expand(B, Hkv, heads // Hkv, T, D).reshape(B, heads, T, D)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    if q.device.type == "cpu":
        # The CPU's flash kernel knows no grouped heads.
        k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


@register_kernel("attention", "torch.sdpa", accepts=_accepts_plain_sdpa, inline=True, merit=40)
def plain_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False,
    out_dtype: torch.dtype | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """SDPA without a mask tensor."""
    out = _sdpa(q, k, v, scale, None, causal)
    return out if out_dtype is None else out.to(out_dtype)


_accepts_decode, _accepts_prefill = accepts_unless(decode_refusal), accepts_unless(prefill_refusal)
register_kernel("attention", "triton.decode", accepts=_accepts_decode, merit=30, triton=True)(attention_decode)
register_kernel("attention", "triton.prefill", accepts=_accepts_prefill, merit=25, triton=True)(attention_prefill)


def _accepts_masked_sdpa(call: Call, arch: Arch) -> Verdict:
    refusal = _sdpa_refusal(call)
    if refusal:
        return No(refusal)
    if call.empty_rows == "nan":
        return No("a query without keys is NaN in the model, zero in SDPA")
    if call.empty_rows == "mean" and call.q.dtype == torch.float16:
        return No("float16 has no number low enough to mask with and keep the mean of empty rows")
    return YES


@register_kernel("attention", "torch.sdpa.masked", accepts=_accepts_masked_sdpa, inline=True, merit=15)
def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, empty_rows: str = "zero",
    out_dtype: torch.dtype | None = None, softcap: float = 0.0, sinks: Tensor | None = None, **masks: Any,
) -> Tensor:  # fmt: skip
    """SDPA with the structured masks spelled out as a tensor."""
    keep = allowed_keys(q.shape[2], k.shape[2], q.device, **masks)
    if bias is not None and bias.dtype == torch.bool:
        keep, bias = (bias if keep is None else keep & bias), None
    # A quarter of the least number: kernels scale the scores, and must not reach -inf where the mean is kept.
    low = q.new_full((), torch.finfo(q.dtype).min / 4 if empty_rows == "mean" else -math.inf)
    if bias is None and keep is not None and empty_rows == "mean":
        bias = torch.zeros_like(low)
    mask = keep
    if bias is not None:
        added = bias.to(q.dtype)
        mask = torch.maximum(added, low) if keep is None else torch.where(keep, torch.maximum(added, low), low)
    out = _sdpa(q, k, v, scale, mask, False)
    return out if out_dtype is None else out.to(out_dtype)


@register_kernel("attention", "aten", accepts=lambda call, arch: YES, inline=True, merit=5)
def aten_attention(*args: Any, **kwargs: Any) -> Tensor:
    """The reference's formula, traced into the graph so that Inductor can fuse it."""
    return op.reference(*args, **kwargs)
