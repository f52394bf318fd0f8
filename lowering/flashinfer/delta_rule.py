"""`sm12x::gated_delta_rule` by FlashInfer's chunked kernel (CuTe DSL).

FlashInfer's ``g`` is the decay itself, not its logarithm, its state has keys last (``[N, H, V, K]``), and sequences are
packed behind each other, with their bounds on the device. q and k are normalised here: its flag for that is accepted
and ignored by release 0.6.18.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch
from ...ops import gated_delta_rule as op
from ...registry import Call
from ..triton.arguments import dtype_name
from . import installed

FAMILIES = ("sm9x", "sm12x")  # gdn_prefill.py; its SM100 kernel needs tcgen05
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIM = 128


def gdn_refusal(call: Call, arch: Arch) -> str | None:
    """Why `gdn_chunked` cannot take this call on this card, in one sentence, or None."""
    q, k, v = call.q, call.k, call.v
    missing = installed.refusal(arch, FAMILIES, needs_nvcc=False, needs_cute=True)
    if missing:
        return missing
    if call.g.ndim == 4:
        return "FlashInfer's chunked delta rule has one decay a head, not one a channel"
    if v.dtype not in DTYPES or q.dtype != v.dtype or k.dtype != v.dtype:
        names = ", ".join(dtype_name(t.dtype) for t in (q, k, v))
        return f"FlashInfer's chunked delta rule needs q, k and v in fp16 or bf16 alike, not {names}"
    if (k.shape[3], v.shape[3]) != (HEAD_DIM, HEAD_DIM):
        return f"FlashInfer's chunked delta rule has head dims of {HEAD_DIM} alone, not {k.shape[3]} and {v.shape[3]}"
    if call.cu_seqlens is not None and call.cu_seqlens.dtype not in (torch.int32, torch.int64):
        return f"cu_seqlens must be int32 or int64, not {dtype_name(call.cu_seqlens.dtype)}"
    if call.out_dtype not in (None, *DTYPES, torch.float32):
        return f"writes fp16, bf16 or fp32, not {dtype_name(call.out_dtype)}"
    return None


@installed.explained("flashinfer.gdn")
def gdn_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None = None,
    qk_l2norm: str = "none", eps: float = 1e-6, cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sm12x::gated_delta_rule`, see `sm12x_compile.ops.gated_delta_rule` for the arguments and the results."""
    B, T, H, V = v.shape
    if not v.numel():
        return op.reference(q, k, v, g, beta, scale, initial_state, qk_l2norm, eps, cu_seqlens, out_dtype)
    if qk_l2norm != "none":
        q, k = (_unit_length(x, eps) for x in (q, k))
    rows, keys, values = (x.reshape(B * T, x.shape[2], x.shape[3]).contiguous() for x in (q, k, v))
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=v.device) * T
    state = v.new_empty((cu_seqlens.shape[0] - 1, H, V, k.shape[3]), dtype=torch.float32)
    out = torch.empty_like(values)
    installed.entry("flashinfer.gdn_prefill:chunk_gated_delta_rule")(
        q=rows,
        k=keys,
        v=values,
        g=g.reshape(B * T, H).float().exp().contiguous(),
        beta=beta.reshape(B * T, H).float().contiguous(),
        scale=scale,
        initial_state=None if initial_state is None else keys_last(initial_state.float()),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        output=out,
        output_state=state,
    )
    return out.view(v.shape).to(out_dtype or v.dtype), keys_last(state)


def _unit_length(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps)).to(x.dtype)


def keys_last(state: Tensor) -> Tensor:
    """``[N, H, K, V]`` and ``[N, H, V, K]``, the one from the other, contiguous."""
    return state.transpose(-1, -2).contiguous()
