"""`sm12x::moe` and `sm12x::moe_route`: routed experts, and the choice of the experts.

Experts. For every token t and each of its K choices e = topk_ids[t,j] with weight p = topk_weights[t,j]::

    h   = activate(w13[e] @ x[t] + w13_bias[e])
    y_t = sum_j p * (w2[e] @ h + w2_bias[e])

where ``activate`` splits its input in gate and up (halves, or even and odd rows), clamps and multiplies them.
Choices below 0 or not below E contribute nothing. Sources: Mixtral (2024), DeepSeekMoE (2024), gpt-oss (2025)
for ``swiglu_oai(gate, up) = gate * sigmoid(alpha * gate) * (up + 1)``, Llama 4 for weights on the input.

Choice. ``score = softmax | sigmoid | sqrt(softplus)`` of the logits; the K experts with the largest score
plus correction bias are taken, from the best groups only, and weighted by their score. Source: DeepSeek-V3
(2024), section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_one_of, wide_dtype
from ._define import Cost, semantic_op
from .mxfp4 import FP4_FORMATS, dequantize_fp4

FORMATS = ("bf16", "fp8", *FP4_FORMATS)
LAYOUTS = ("enk", "ekn")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2", "relu")
WEIGHT_ON = ("output", "input")
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("top2_sum", "max")


def moe_fake(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    format: str = "bf16",
    layout: str = "enk",
    interleaved: bool = False,
    activation: str = "silu",
    gated: bool = True,
    alpha: float = 1.702,
    limit: float | None = None,
    weight_on: str = "output",
    w13_global_scale: Tensor | None = None,
    w2_global_scale: Tensor | None = None,
    fp8_block: int = 128,
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_bias: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def moe_cost(a: dict[str, Any]) -> Cost:
    """Bytes of the experts that uniformly random routing is expected to hit."""
    x, ids, w13, w2 = a["x"], a["topk_ids"], a["w13"], a["w2"]
    T, K, E = x.shape[0], ids.shape[1], w13.shape[0]
    hit = E * (1.0 - (1.0 - min(K, E) / E) ** T)
    optional = ("w13_bias", "w2_bias", "w13_scale", "w2_scale", "w3", "w3_bias")
    weights = [w13, w2, *(a[n] for n in optional if a[n] is not None)]
    per_expert = sum(w.numel() * w.element_size() for w in weights) / E
    moved = hit * per_expert + 2 * x.numel() * x.element_size()
    moved += sum(t.numel() * t.element_size() for t in (ids, a["topk_weights"]))
    packing = 2 if a["format"] in FP4_FORMATS else 1
    up = 0 if a["w3"] is None else a["w3"].numel()
    return Cost(bytes=moved, flops=2.0 * T * K * packing * (w13.numel() + up + w2.numel()) / E)


def activate(
    h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float | None
) -> Tensor:
    """What stands between the two matrices: ``[..., N]`` to ``[..., I]``, in the dtype of `h`."""
    if not gated:
        return _nonlinearity(h, activation)
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return _nonlinearity(gate, activation) * up


def _nonlinearity(h: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(h)
    if activation in ("relu", "relu2"):
        return F.relu(h) if activation == "relu" else F.relu(h).square()
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def _fp8_scale(scale: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """One expert's scales, broadcastable to its weight: from 0-d, ``[N]`` or ``[N / block, K / block]``."""
    if scale.ndim < 2:
        return scale.reshape(-1, 1)
    return scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def _expert(
    w: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    e: int,
    format: str,
    layout: str,
    block: int,
    wide: torch.dtype,
) -> Tensor:
    """The weight of one expert as ``[N, K]``, dequantised."""
    if format == "bf16":
        return (w[e] if layout == "enk" else w[e].mT).to(wide)
    assert scale is not None
    if format == "fp8":
        return w[e].to(wide) * _fp8_scale(scale[e].to(wide), w.shape[1], w.shape[2], block)
    factor = None if global_scale is None else global_scale[e]
    return dequantize_fp4("moe", w[e], scale[e], format, factor, wide)


def _check_moe(a: dict[str, Any]) -> None:
    x, w13, w2, ids, format, layout = (a[n] for n in ("x", "w13", "w2", "topk_ids", "format", "layout"))
    for name, allowed in (
        ("format", FORMATS), ("layout", LAYOUTS), ("activation", ACTIVATIONS), ("weight_on", WEIGHT_ON),
    ):  # fmt: skip
        check_one_of("moe", name, a[name], allowed)
    if x.ndim != 2 or ids.shape != a["topk_weights"].shape or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"sm12x::moe: x {tuple(x.shape)}, topk_ids {tuple(ids.shape)}, "
            f"topk_weights {tuple(a['topk_weights'].shape)} do not fit"
        )
    if not a["gated"] and (a["activation"] == "swiglu_oai" or a["limit"] is not None or a["interleaved"]):
        raise ValueError("sm12x::moe: swiglu_oai, limit and interleaved need gated=True")
    if format != "bf16":
        if layout != "enk":
            raise ValueError(f"sm12x::moe: {format} weights need layout='enk'")
        if a["w13_scale"] is None or a["w2_scale"] is None:
            raise ValueError(f"sm12x::moe: {format} weights need w13_scale and w2_scale")
    elif a["w13_scale"] is not None or a["w2_scale"] is not None:
        raise ValueError("sm12x::moe: bf16 weights have no scales")
    packing = 2 if format in FP4_FORMATS else 1
    apart = a["w3"] is not None
    if apart and (format != "bf16" or not a["gated"] or a["interleaved"] or a["w3"].shape != w13.shape):
        raise ValueError("sm12x::moe: w3 needs plain weights of w13's shape, gated=True and interleaved=False")
    if not apart and a["w3_bias"] is not None:
        raise ValueError("sm12x::moe: w3_bias without w3")
    if layout == "ekn":
        w13, w2 = w13.mT, w2.mT
    (E, N, K), D, inner = w13.shape, x.shape[1], w2.shape[2] * packing
    if packing * K != D or inner * (2 if a["gated"] and not apart else 1) != N or w2.shape[:2] != (E, D):
        raise ValueError(
            f"sm12x::moe: x {tuple(x.shape)}, w13 {tuple(a['w13'].shape)}, w2 {tuple(a['w2'].shape)} do not "
            f"fit (format={format!r}, layout={layout!r}, gated={a['gated']})"
        )


@semantic_op(fake=moe_fake, cost=moe_cost)
def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    format: str = "bf16",
    layout: str = "enk",
    interleaved: bool = False,
    activation: str = "silu",
    gated: bool = True,
    alpha: float = 1.702,
    limit: float | None = None,
    weight_on: str = "output",
    w13_global_scale: Tensor | None = None,
    w2_global_scale: Tensor | None = None,
    fp8_block: int = 128,
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_bias: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    """Routed experts, eager reference (sorted by expert; fp32 inside, fp64 for fp64 inputs).

    Args:
        x: ``[T, D]``, any strides, floating point.
        topk_ids: integers ``[T, K]``: experts of every token; outside of 0..E-1: contributes nothing.
        topk_weights: ``[T, K]``, floating point.
        w13: gate and up projection, ``[E, N, D]`` with N = 2 I (gated) or I. An expert's rows are the I of
            the gate and then the I of up, or alternating if ``interleaved``.
        w2: down projection, ``[E, D, I]``.
        w13_bias, w2_bias: ``[E, N]`` and ``[E, D]``.
        w13_scale, w2_scale: of quantised weights. ``fp8``: ``[E]``, ``[E, N]`` or, for square blocks,
            ``[E, ceil(N / fp8_block), ceil(K / fp8_block)]``. ``mxfp4``, ``nvfp4``: as `mxfp4_linear`.
        format: ``bf16`` (any plain floating dtype), ``fp8`` (E4M3); packed, K / 2 bytes a row: ``mxfp4``,
            ``nvfp4``.
        layout: ``enk``: weights as above; ``ekn``: each transposed, ``[E, K, N]`` (plain weights only).
        interleaved: gate and up alternate in the rows of w13.
        activation: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2`` (of the gate, times up; or of the
            only projection if not ``gated``), or ``swiglu_oai``.
        gated: whether w13 holds a gate.
        alpha: of ``swiglu_oai``.
        limit: clamps the gate to at most this, and up to plus or minus this, before the activation.
        weight_on: ``output``, or ``input`` (x is multiplied before the expert).
        w13_global_scale, w2_global_scale: ``[E]``, ``nvfp4`` only; default 1.
        fp8_block: side of the blocks of fp8 scales.
        out_dtype: dtype of the result; default that of ``x``.
        w3: the up projection where it is a tensor of its own, ``[E, I, D]`` (or transposed, as `layout` says);
            ``w13`` is then the gate alone. Plain weights only.
        w3_bias: ``[E, I]``, beside ``w3``.
        stacked: the weights were put together for this call from tensors of the experts' own, so a kernel
            that reads them pays for a copy of all experts. Changes no value.

    Returns:
        ``[T, D]``.

    Raises:
        ValueError: shapes, dtypes or attributes are not as above.
    """
    _check_moe(locals())
    (T, _), K, E = x.shape, topk_ids.shape[1], w13.shape[0]
    wide = wide_dtype(x)
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids >= E), E, ids)
    weights = topk_weights.reshape(-1, 1).to(wide)
    by_expert = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=E + 1)[:E].tolist()
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    start = 0
    for e, count in enumerate(counts):
        if not count:
            continue
        choices = by_expert[start : start + count]
        start += count
        tokens = choices // K
        h, p = x[tokens].to(wide), weights[choices]
        given = p * h if weight_on == "input" else h
        h = F.linear(
            given,
            _expert(w13, w13_scale, w13_global_scale, e, format, layout, fp8_block, wide),
            None if w13_bias is None else w13_bias[e].to(wide),
        )
        if w3 is not None:
            up = _expert(w3, None, None, e, format, layout, fp8_block, wide)
            h = torch.cat([h, F.linear(given, up, None if w3_bias is None else w3_bias[e].to(wide))], dim=-1)
        h = F.linear(
            activate(h, activation, gated, interleaved, alpha, limit),
            _expert(w2, w2_scale, w2_global_scale, e, format, layout, fp8_block, wide),
            None if w2_bias is None else w2_bias[e].to(wide),
        )
        out.index_add_(0, tokens, h if weight_on == "input" else p * h)
    return out.to(out_dtype or x.dtype)


def moe_route_fake(
    logits: Tensor,
    top_k: int,
    correction_bias: Tensor | None = None,
    score: str = "softmax",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    renormalise: bool = False,
    scaling: float = 1.0,
    eps: float = 1e-20,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    dtype = out_dtype or wide_dtype(logits)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)


def moe_route_cost(a: dict[str, Any]) -> Cost:
    logits = a["logits"]
    moved = logits.numel() * logits.element_size() + logits.shape[0] * a["top_k"] * (8 + 4)
    return Cost(bytes=moved, flops=8.0 * logits.numel())


@semantic_op(fake=moe_route_fake, cost=moe_route_cost)
def moe_route(
    logits: Tensor,
    top_k: int,
    correction_bias: Tensor | None = None,
    score: str = "softmax",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    renormalise: bool = False,
    scaling: float = 1.0,
    eps: float = 1e-20,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token, eager reference (fp32 inside; fp64 for fp64 logits).

    Args:
        logits: ``[T, E]``, floating point.
        top_k: how many experts a token gets.
        correction_bias: ``[E]``: added to the scores for the choice, not for the weights.
        score: ``softmax`` (over all E), ``sigmoid`` or ``sqrt_softplus``.
        n_group: number of groups of E / n_group neighbouring experts; 1 is none.
        topk_group: how many groups may be chosen from.
        group_score: a group is as good as its two best experts together (``top2_sum``) or its best (``max``).
        renormalise: divide the weights of a token by (their sum + eps). Softmax of the K best logits is
            ``softmax`` with this.
        scaling: multiplies the weights, last.
        eps: see ``renormalise``.
        out_dtype: dtype of the weights; default fp32 (fp64 for fp64 logits).

    Returns:
        topk_ids int64 ``[T, top_k]``, best choice first (equal ones in any order), and topk_weights
        ``[T, top_k]``.

    Raises:
        ValueError: shapes or attributes are not as above.
    """
    check_one_of("moe_route", "score", score, SCORES)
    check_one_of("moe_route", "group_score", group_score, GROUP_SCORES)
    T, E = logits.shape
    if not 1 <= topk_group <= n_group or E % n_group or not 0 < top_k <= E // n_group * topk_group:
        raise ValueError(
            f"sm12x::moe_route: cannot take {top_k} of {E} experts from {topk_group} of {n_group} groups"
        )
    logits = logits.to(wide_dtype(logits))
    if score == "softmax":
        scores = logits.softmax(-1)
    elif score == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = F.softplus(logits).sqrt()
    choice = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    if n_group > 1:
        groups = choice.unflatten(-1, (n_group, -1))
        best = min(2, E // n_group) if group_score == "top2_sum" else 1
        best_groups = groups.topk(best, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        keep = torch.zeros((T, n_group), dtype=torch.bool, device=logits.device).scatter(1, best_groups, True)
        choice = groups.masked_fill(~keep[..., None], -torch.inf).flatten(-2)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return ids, (weights * scaling).to(out_dtype or scores.dtype)
