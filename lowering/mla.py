"""`sm12x::mla` → a kernel.

With the up-projections in hand there are two ways to add up the same numbers:

    expanded   keys and values of every head, then `sm12x::attention`: fewer operations for long prompts
    absorbed   queries taken into latent space, one KV head for all, the cache read as it is: decode

The operation counts decide (`ops/mla.py`), by the sizes the graph was compiled for. On a GPU, `triton.mla_prefill` is
all of the expanded form, and `triton.mla_absorbed` all of the absorbed one for a single token. Otherwise both end in
another semantic op, which is lowered in turn; what is left of the absorbed form is `mla` without weights:

    triton.mla_decode   split-KV decode over the latents in place
    aten                the reference's formula in plain ATen, fused by Inductor
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.ops import mla as op
from sm12x_compile.ops.mla import mla_forms, per_head
from sm12x_compile.registry import YES, Call, No, Verdict, register_kernel

from .select import hinted
from .triton.mla_absorbed import mla_absorbed, mla_absorbed_refusal
from .triton.mla_decode import mla_decode, mla_decode_refusal
from .triton.mla_prefill import expand, mla_prefill, mla_prefill_refusal

LONG_PROMPT = 4096  # benchmarks/results/latent_prefill-h200.json


def _accepts_expanded(call: Call, arch: Arch) -> Verdict:
    if call.w_uk is None:
        return No("the author has absorbed the up-projections")
    absorbed, expanded = mla_forms({name: hinted(value) for name, value in call.arguments.items()})
    assert expanded is not None
    if expanded.flops >= absorbed.flops:
        times = expanded.flops / absorbed.flops
        return No(f"expanding the latents takes {times:.1f} times the operations of absorbing the projections")
    return YES


def _accepts_absorbed(call: Call, arch: Arch) -> Verdict:
    return YES if call.w_uk is not None else No("the author has absorbed the up-projections")


def _accepts_core(call: Call, arch: Arch) -> Verdict:
    return YES if call.w_uk is None else No("computes what is left once the up-projections are absorbed")


@register_kernel("mla", "expanded", accepts=_accepts_expanded, inline=True, merit=40)
def expanded(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor, w_uv: Tensor,
    scale: float, **masks: Any,
) -> Tensor:  # fmt: skip
    """Keys and values of every head."""
    q, k, v = q_nope, expand(latent, w_uk), expand(latent, w_uv)
    if q_rope is not None and k_rope is not None:
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1, -1)], dim=-1)
    out: Tensor = torch.ops.sm12x.attention(q, k, v, scale, **masks)
    return out


@register_kernel("mla", "absorbed", accepts=_accepts_absorbed, inline=True, merit=30)
def absorbed(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor, w_uv: Tensor,
    scale: float, out_dtype: torch.dtype | None = None, **masks: Any,
) -> Tensor:  # fmt: skip
    """Queries go into latent space, the mixture of latents comes out of it."""
    query = per_head(q_nope, w_uk)
    mixed = torch.ops.sm12x.mla(query, q_rope, latent, k_rope, None, None, scale, **masks)
    out = per_head(mixed, w_uv.mT)
    return out if out_dtype is None else out.to(out_dtype)


def _accepts_decode(call: Call, arch: Arch) -> Verdict:
    core = _accepts_core(call, arch)
    refusal = mla_decode_refusal(call, arch) if core else None
    return No(refusal) if refusal else core


def _accepts_one_token(call: Call, arch: Arch) -> Verdict:
    absorbed = _accepts_absorbed(call, arch)
    refusal = mla_absorbed_refusal(call, arch) if absorbed else None
    return No(refusal) if refusal else absorbed


def _accepts_prefill(call: Call, arch: Arch) -> Verdict:
    expanded = _accepts_expanded(call, arch)
    if expanded and arch.wgmma and call.hint(call.q_nope.shape[2]) > LONG_PROMPT:
        return No(f"over {LONG_PROMPT} queries SDPA is faster on this card, if it takes more memory")
    refusal = mla_prefill_refusal(call, arch) if expanded else None
    return No(refusal) if refusal else expanded


register_kernel("mla", "triton.mla_prefill", accepts=_accepts_prefill, merit=45, triton=True)(mla_prefill)
register_kernel("mla", "triton.mla_absorbed", accepts=_accepts_one_token, merit=35, triton=True)(mla_absorbed)
register_kernel("mla", "triton.mla_decode", accepts=_accepts_decode, merit=20, triton=True)(mla_decode)


@register_kernel("mla", "aten", accepts=_accepts_core, inline=True, merit=5)
def aten_mla(*args: Any, **kwargs: Any) -> Tensor:
    """The reference's formula, traced into the graph so that Inductor can fuse it."""
    return op.reference(*args, **kwargs)
