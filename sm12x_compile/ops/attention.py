"""`sm12x::attention`: softmax attention with grouped heads and structured masks.

For every batch b, head h, query s (its position among the keys is ``p = s + q_offset + q_shift``)::

    score[t] = softcap(scale * sum_d q[b,h,s,d] * k[b, h div G, t, d]) + bias[b,h,s,t]
    out      = sum_t exp(score[t]) v[b, h div G, t] / (sum_t exp(score[t]) + exp(sinks[h]))

over the keys t that every given mask allows. Sources: FlashAttention-2 (Dao, 2023) for the algorithm, Gemma 2
for ``softcap(x) = c tanh(x / c)``, StreamingLLM / gpt-oss for sinks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._define import Cost, semantic_op

EMPTY_ROWS = ("zero", "nan", "mean")
_OPTIONAL = 16  # arguments after v, in the schema's order; out_dtype is the last


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out_dtype = kwargs.get("out_dtype", args[-1] if len(args) == _OPTIONAL else None)
    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return q.new_empty(shape, dtype=out_dtype or v.dtype).transpose(1, 2)


def allowed_keys(
    S: int,
    T: int,
    device: torch.device,
    *,
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
) -> Tensor | None:
    """The structured masks as one bool tensor broadcastable to ``[B, 1, S, T]`` (True: may be attended)."""
    t = torch.arange(T, device=device)
    p = torch.arange(S, device=device)[None, None, :, None] + q_shift
    if q_offset is not None:
        p = p + q_offset.reshape(-1, 1, 1, 1)
    keep = []
    if causal:
        keep.append(t <= p)
    if window_left is not None:
        keep.append(t >= p - window_left)
    if window_right is not None:
        keep.append(t <= p + window_right)
    if chunk is not None:
        keep.append(torch.div(t, chunk, rounding_mode="floor") == torch.div(p, chunk, rounding_mode="floor"))
    if kv_len is not None:
        keep.append(t < kv_len.reshape(-1, 1, 1, 1))
    if key_padding is not None:
        keep.append(key_padding[:, None, None, :])
    if q_segments is not None and k_segments is not None:
        keep.append(q_segments[:, None, :, None] == k_segments[:, None, None, :])
    if not keep:
        return None
    mask = keep[0]
    for other in keep[1:]:
        mask = mask & other
    return mask


def attention_weights(
    scores: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty_rows: str = "zero",
    **masks: Any,
) -> Tensor:
    """From scaled scores ``[B, H, S, T]`` in fp32 or fp64 to weights, with the arguments of `sm12x::attention`."""
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"empty_rows={empty_rows!r}, not one of {EMPTY_ROWS}")
    H, S, T = scores.shape[1:]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(scores.dtype)
    keep = allowed_keys(S, T, scores.device, **masks)
    if bias is not None and bias.dtype == torch.bool:
        keep = bias if keep is None else keep & bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    top = scores.amax(-1, keepdim=True) if T else scores.new_full((*scores.shape[:3], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, H, 1, 1)
        top = torch.maximum(top, sink)
    empty = top == -math.inf
    weights = torch.exp(scores - top.masked_fill(empty, 0.0))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top.masked_fill(empty, 0.0))
    if empty_rows == "mean":
        weights = torch.where(empty, torch.ones_like(weights), weights)
        total = torch.where(empty, torch.full_like(total, T), total)
    elif empty_rows == "zero":
        total = total.masked_fill(empty, 1.0)
    return weights / total


def attention_cost(a: dict[str, Any]) -> Cost:
    q, k, v = a["q"], a["k"], a["v"]
    B, Hq, S, D = q.shape
    Hkv, T, Dv = k.shape[1], k.shape[2], v.shape[3]
    visible = float(T)
    if a["causal"] and S > 1 and a["q_offset"] is None:
        first = a["q_shift"]
        visible = max(1.0, sum(min(T, max(0, first + 1 + s)) for s in (0, S - 1)) / 2)
    if a["window_left"] is not None:
        visible = min(visible, a["window_left"] + 1 + (a["window_right"] or (0 if a["causal"] else T)))
    width = q.element_size()
    keys = T if S > 1 else visible
    moved = width * (B * Hq * S * (D + Dv) + B * Hkv * keys * (D + Dv))
    return Cost(bytes=moved, flops=2.0 * B * Hq * S * visible * (D + Dv))


@semantic_op(fake=attention_fake, cost=attention_cost)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Softmax attention, eager reference (fp32 inside; fp64 for fp64 inputs).

    Args:
        q: ``[B, Hq, S, D]``, any strides, floating point.
        k: ``[B, Hkv, T, D]``; ``Hq`` is a multiple of ``Hkv`` and head h reads KV head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, T, Dv]``.
        scale: multiplies ``q @ k^T``.
        causal: key t is allowed where ``t <= p``.
        window_left: allowed where ``t >= p - window_left`` (Hugging Face's ``sliding_window=w`` is ``w - 1``).
        window_right: allowed where ``t <= p + window_right``.
        chunk: allowed where ``t`` and ``p`` lie in the same chunk of this many positions.
        q_offset: int64, 0-d or ``[B]``: position of query 0 among the keys, known at run time only.
        q_shift: the part of that position known while compiling; added to ``q_offset``.
        kv_len: int64, 0-d or ``[B]``: allowed where ``t < kv_len``.
        key_padding: bool ``[B, T]`` (or ``[1, T]``): True where the key may be attended.
        q_segments, k_segments: integers ``[B, S]`` and ``[B, T]`` (or batch 1): allowed where equal.
        bias: broadcastable to ``[B, Hq, S, T]``: added if floating point, True-may-be-attended if bool.
        softcap: ``c`` of ``c * tanh(score / c)``, applied before the masks; 0 is none.
        sinks: ``[Hq]``: an extra logit for each head that takes probability and has no value.
        empty_rows: what a query gets that no key may serve, where the sources differ: ``zero`` (SDPA),
            ``nan`` (softmax over -inf), ``mean`` of all T values (softmax over finfo.min). With sinks: zero.
        out_dtype: dtype of the result; default that of ``v``.

    Returns:
        ``[B, Hq, S, Dv]``, stored as ``[B, S, Hq, Dv]``: nearly every caller puts the heads last again.

    Raises:
        ValueError: the shapes or ``empty_rows`` are not as above.
    """
    B, Hq, S, D = q.shape
    Hkv, T, Dv = k.shape[1], k.shape[2], v.shape[3]
    if Hq % Hkv or k.shape[3] != D or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"sm12x::attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit"
        )
    if (q_segments is None) != (k_segments is None):
        raise ValueError("sm12x::attention: q_segments and k_segments are given together or not at all")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    G = Hq // Hkv
    qg = q.to(wide).reshape(B, Hkv, G, S, D)
    scores = torch.einsum("bhgsd,bhtd->bhgst", qg, k.to(wide)).reshape(B, Hq, S, T) * scale
    weights = attention_weights(
        scores, causal=causal, window_left=window_left, window_right=window_right, chunk=chunk,
        q_offset=q_offset, q_shift=q_shift, kv_len=kv_len, key_padding=key_padding,
        q_segments=q_segments, k_segments=k_segments, bias=bias, softcap=softcap, sinks=sinks, empty_rows=empty_rows,
    ).reshape(B, Hkv, G, S, T)  # fmt: skip
    out = torch.einsum("bhgst,bhtv->bshgv", weights, v.to(wide)).reshape(B, S, Hq, Dv)
    return out.to(out_dtype or v.dtype).contiguous().transpose(1, 2)
