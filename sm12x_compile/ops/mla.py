"""`sm12x::mla`: multi-head latent attention over the cached latents.

Keys and values are linear maps of one latent vector a token, and a rotary part of the key is shared by all
heads. For every batch b, head h, query s::

    k[b,h,t] = w_uk[h] @ latent[b,t]                                  [N]
    v[b,h,t] = w_uv[h] @ latent[b,t]                                  [V]
    score[t] = scale * (q_nope[b,h,s] . k[b,h,t] + q_rope[b,h,s] . k_rope[b,t])

and from there on as `sm12x::attention`, with the same masks. Source: DeepSeek-V2 (2024), section 2.1. The
reference moves w_uk to the query side and w_uv behind the softmax (the paper's "absorption"), which is the
same sum in another order and never expands the cache. Without the weights the op is what is left then: attention of
queries in latent space over the latents, whose result is a mixture of latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import wide_dtype
from ._define import Cost, semantic_op
from .attention import attention_cost, attention_weights

_OPTIONAL = 16  # arguments after w_uv, in the schema's order; out_dtype is the last
_BLOCKS, _MANY_TOKENS, _FEW_ROWS = 8, 2048, 64  # 1.0 ms to 0.55 for 16 rows and 4,096 tokens on two cores


def mla_fake(
    q_nope: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    w_uk: Tensor | None,
    w_uv: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    out_dtype = kwargs.get("out_dtype", args[-1] if len(args) == _OPTIONAL else None)
    B, H, S, _ = q_nope.shape
    width = latent.shape[2] if w_uv is None else w_uv.shape[1]
    return q_nope.new_empty((B, S, H, width), dtype=out_dtype or latent.dtype).transpose(1, 2)


def mla_forms(a: dict[str, Any]) -> tuple[Cost, Cost | None]:
    """Costs of the absorbed form, and of the expanded one (None without the weights)."""
    q_nope, latent, w_uv = a["q_nope"], a["latent"], a["w_uv"]
    B, H, S, N = q_nope.shape
    T, L = latent.shape[1:]
    R = 0 if a["q_rope"] is None else a["q_rope"].shape[3]
    V = L if w_uv is None else w_uv.shape[1]
    width = latent.element_size()

    def core(kv_heads: int, dim: int, v_dim: int) -> Cost:
        shapes = {"q": (B, H, S, dim), "k": (B, kv_heads, T, dim), "v": (B, kv_heads, T, v_dim)}
        given = {n: torch.empty(s, device="meta", dtype=latent.dtype) for n, s in shapes.items()}
        return attention_cost({**a, **given})

    absorbed = core(1, L + R, L)
    # The latents serve as keys and as values, and are read once.
    read = absorbed.bytes - width * B * T * L
    if w_uv is None:
        return Cost(read, absorbed.flops), None
    weights = a["w_uk"].numel() + w_uv.numel()
    operands = width * (B * H * S * (N + R + V) + B * T * (L + R) + weights)
    project = 2.0 * B * H * L * (N + V)
    expanded = core(H, N + R, V)
    return (
        Cost(operands, absorbed.flops + project * S),
        Cost(operands + 2 * width * B * T * H * (N + V), expanded.flops + project * T),
    )


def mla_cost(a: dict[str, Any]) -> Cost:
    """The cheaper of the absorbed and the expanded form in FLOPs; the bytes are those of the operands."""
    absorbed, expanded = mla_forms(a)
    return Cost(absorbed.bytes, min(absorbed.flops, expanded.flops if expanded else absorbed.flops))


@semantic_op(fake=mla_fake, cost=mla_cost)
def mla(
    q_nope: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    w_uk: Tensor | None,
    w_uv: Tensor | None,
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
        q_nope: ``[B, H, S, N]``, any strides, floating point; without ``w_uk`` in latent space, so N is L.
        q_rope: ``[B, H, S, R]``, rotated already, or None together with ``k_rope``.
        latent: ``[B, T, L]``: the compressed keys and values, normalised already.
        k_rope: ``[B, T, R]``, rotated already, shared by all heads.
        w_uk: ``[Hw, N, L]``, usually a view of the up-projection's weight; Hw divides H, and head h reads
            ``h // (H // Hw)``. None if q_nope has been multiplied by it.
        w_uv: ``[Hw, V, L]``, likewise. None together with ``w_uk``: the result stays in latent space.
        scale: multiplies the sum of both products.
        causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding, q_segments,
            k_segments, bias, softcap, sinks, empty_rows: as in `sm12x::attention`.
        out_dtype: dtype of the result; default that of ``latent``.

    Returns:
        ``[B, H, S, V]``, or ``[B, H, S, L]`` without the weights: a transposed view of ``[B, S, H, V]``, which is
        what callers go on with.

    Raises:
        ValueError: the shapes or ``empty_rows`` are not as above, or only one rotary part or weight is given.
    """
    _check(q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    wide = wide_dtype(q_nope)
    value = latent.to(wide)
    query = q_nope.to(wide)
    if w_uk is not None:
        query = per_head(query, w_uk.to(wide))
    B, H, S, L = query.shape
    # One KV head that all query heads read. Keys are the rows: CPU libraries do badly with few rows and many columns.
    scores = value @ query.reshape(B, H * S, L).mT
    if q_rope is not None and k_rope is not None:
        scores = scores + k_rope.to(wide) @ q_rope.to(wide).reshape(B, H * S, -1).mT
    weights = attention_weights(
        scores.mT.reshape(B, H, S, -1) * scale,
        causal=causal, window_left=window_left, window_right=window_right, chunk=chunk,
        q_offset=q_offset, q_shift=q_shift, kv_len=kv_len, key_padding=key_padding,
        q_segments=q_segments, k_segments=k_segments, bias=bias, softcap=softcap, sinks=sinks,
        empty_rows=empty_rows,
    )  # fmt: skip
    mixed = _mixture(weights.reshape(B, H * S, -1), value).reshape(B, H, S, L)
    out = mixed if w_uv is None else per_head(mixed, w_uv.to(wide).mT)
    return out.transpose(1, 2).to(out_dtype or latent.dtype).contiguous().transpose(1, 2)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x[b, h, s] @ weight[h div G]``: ``[B, H, S, I]`` and ``[Hw, I, J]`` to ``[B, H, S, J]``, one product a head."""
    B, H, S, I = x.shape
    Hw = weight.shape[0]
    rows = x.reshape(B, Hw, H // Hw * S, I).transpose(0, 1).reshape(Hw, -1, I)
    return (rows @ weight).reshape(Hw, B, H // Hw, S, -1).transpose(0, 1).reshape(B, H, S, -1)


def _mixture(weights: Tensor, value: Tensor) -> Tensor:
    """``weights[b] @ value[b]``, ``[B, rows, T]`` and ``[B, T, L]``.

    Few rows and many tokens are a sum over blocks of tokens: CPU libraries share out a batch of products better than
    one whose threads each read a part of every latent.
    """
    (B, rows, T), L = weights.shape, value.shape[2]
    if value.device.type != "cpu" or not isinstance(T, int) or T < _MANY_TOKENS or T % _BLOCKS or rows > _FEW_ROWS:
        return weights @ value
    parts = weights.reshape(B, rows, _BLOCKS, -1).transpose(1, 2).flatten(0, 1)
    mixed = parts @ value.reshape(B * _BLOCKS, -1, L)
    return mixed.view(B, _BLOCKS, rows, L).sum(1)


def _check(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None,
    w_uk: Tensor | None, w_uv: Tensor | None,
) -> None:  # fmt: skip
    B, H, _, N = q_nope.shape
    T, L = latent.shape[1:]
    if (w_uk is None) != (w_uv is None):
        raise ValueError("sm12x::mla: give both w_uk and w_uv, or neither")
    shapes = {name: tuple(x.shape) for name, x in (("w_uk", w_uk), ("w_uv", w_uv)) if x is not None}
    fits = latent.shape[0] == B
    if w_uk is not None and w_uv is not None:
        fits = fits and w_uk.shape[1:] == (N, L) and w_uv.shape[2] == L and w_uk.shape[0] == w_uv.shape[0]
        fits = fits and H % w_uk.shape[0] == 0
    elif N != L:
        fits = False
    if not fits:
        raise ValueError(f"sm12x::mla: q_nope {tuple(q_nope.shape)}, latent {tuple(latent.shape)}, {shapes} do not fit")
    if (q_rope is None) != (k_rope is None):
        raise ValueError("sm12x::mla: give both q_rope and k_rope, or neither")
    if q_rope is None or k_rope is None:
        return
    if k_rope.shape[:2] != (B, T) or q_rope.shape != (*q_nope.shape[:3], k_rope.shape[2]):
        raise ValueError(f"sm12x::mla: q_rope {tuple(q_rope.shape)} and k_rope {tuple(k_rope.shape)} do not fit")
