"""`sm12x::mla`: multi-head latent attention over the cached latents.

Keys and values are linear maps of one latent vector a token, and a rotary part of the key is shared by all
heads. For every batch b, head h, query s::

    k[b,h,t] = w_uk[h] @ latent[b,t]                                  [N]
    v[b,h,t] = w_uv[h] @ latent[b,t]                                  [V]
    score[t] = scale * (q_nope[b,h,s] . k[b,h,t] + q_rope[b,h,s] . k_rope[b,t])

and from there on as `sm12x::attention`, with the same masks. Source: DeepSeek-V2 (2024), section 2.1. The
reference moves w_uk to the query side and w_uv behind the softmax (the paper's "absorption"), which is the
same sum in another order and never expands the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import wide_dtype
from ._define import Cost, semantic_op
from .attention import attention, attention_cost

_OPTIONAL = 16  # arguments after w_uv, in the schema's order; out_dtype is the last


def mla_fake(
    q_nope: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    out_dtype = kwargs.get("out_dtype", args[-1] if len(args) == _OPTIONAL else None)
    B, H, S, _ = q_nope.shape
    return q_nope.new_empty((B, H, S, w_uv.shape[1]), dtype=out_dtype or latent.dtype)


def mla_cost(a: dict[str, Any]) -> Cost:
    """The cheaper of the absorbed and the expanded form in FLOPs; the bytes are those of the operands."""
    q_nope, latent, w_uv = a["q_nope"], a["latent"], a["w_uv"]
    B, H, S, N = q_nope.shape
    T, L = latent.shape[1:]
    V = w_uv.shape[1]
    R = 0 if a["q_rope"] is None else a["q_rope"].shape[3]

    def core(kv_heads: int, dim: int, v_dim: int) -> Cost:
        shapes = {"q": (B, H, S, dim), "k": (B, kv_heads, T, dim), "v": (B, kv_heads, T, v_dim)}
        return attention_cost({**a, **{n: torch.empty(s, device="meta") for n, s in shapes.items()}})

    absorbed, expanded = core(1, L + R, L), core(H, N + R, V)
    project = 2.0 * B * H * L * (N + V)
    visible = absorbed.flops / max(1.0, 2.0 * B * H * S * (2 * L + R))
    elements = B * H * S * (N + R + V) + B * (T if S > 1 else visible) * (L + R) + H * L * (N + V)
    return Cost(
        bytes=elements * latent.element_size(),
        flops=min(absorbed.flops + project * S, expanded.flops + project * T),
    )


@semantic_op(fake=mla_fake, cost=mla_cost)
def mla(
    q_nope: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int | None = None,
    q_offset: Tensor | None = None,
    q_shift: int = 0,
    kv_len: Tensor | None = None,
    key_padding: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty_rows: str = "zero",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multi-head latent attention, eager reference (absorbed; fp32 inside, fp64 for fp64 inputs).

    Args:
        q_nope: ``[B, H, S, N]``, any strides, floating point.
        q_rope: ``[B, H, S, R]``, rotated already, or None together with ``k_rope``.
        latent: ``[B, T, L]``: the compressed keys and values, normalised already.
        k_rope: ``[B, T, R]``, rotated already, shared by all heads.
        w_uk: ``[H, N, L]``, usually a view of the up-projection's weight.
        w_uv: ``[H, V, L]``, likewise.
        scale: multiplies the sum of both products.
        causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding, q_segments,
            k_segments, bias, softcap, sinks, empty_rows: as in `sm12x::attention`.
        out_dtype: dtype of the result; default that of ``latent``.

    Returns:
        ``[B, H, S, V]``.

    Raises:
        ValueError: the shapes or ``empty_rows`` are not as above, or only one rotary part is given.
    """
    B, H, _, N = q_nope.shape
    T, L = latent.shape[1:]
    if w_uk.shape != (H, N, L) or w_uv.shape[0] != H or w_uv.shape[2] != L or latent.shape[0] != B:
        raise ValueError(
            f"sm12x::mla: q_nope {tuple(q_nope.shape)}, latent {tuple(latent.shape)}, "
            f"w_uk {tuple(w_uk.shape)}, w_uv {tuple(w_uv.shape)} do not fit"
        )
    wide = wide_dtype(q_nope)
    value = latent.to(wide)
    query = torch.einsum("bhsn,hnl->bhsl", q_nope.to(wide), w_uk.to(wide))
    key = value
    if q_rope is not None and k_rope is not None:
        if k_rope.shape[:2] != (B, T) or q_rope.shape != (*q_nope.shape[:3], k_rope.shape[2]):
            raise ValueError(
                f"sm12x::mla: q_rope {tuple(q_rope.shape)} and k_rope {tuple(k_rope.shape)} do not fit"
            )
        query = torch.cat([query, q_rope.to(wide)], dim=-1)
        key = torch.cat([value, k_rope.to(wide)], dim=-1)
    elif q_rope is not None or k_rope is not None:
        raise ValueError("sm12x::mla: give both q_rope and k_rope, or neither")
    # One KV head that all query heads read: multi-query attention over the latents.
    mixed = attention.reference(
        query, key[:, None], value[:, None], scale,
        causal=causal, window_left=window_left, window_right=window_right, chunk=chunk,
        q_offset=q_offset, q_shift=q_shift, kv_len=kv_len, key_padding=key_padding,
        q_segments=q_segments, k_segments=k_segments, bias=bias, softcap=softcap, sinks=sinks,
        empty_rows=empty_rows,
    )  # fmt: skip
    out = torch.einsum("bhsl,hvl->bhsv", mixed, w_uv.to(wide))
    return out.to(out_dtype or latent.dtype).contiguous()
