"""The second half of a random graph: scores, softmax, values, and the mutations between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Inputs, cached, grouped, keep_masks, operands
from .spec import Spec


def attention_like(spec: Spec) -> Callable[[Inputs], Any]:
    """The function that `spec` describes; it takes the dict of `draw_inputs`."""

    def function(t: Inputs) -> Any:
        extra: list[Tensor] = []
        q, k, v = operands(spec, t)
        k, v = cached(spec, t, k, v)
        k, v = _change_operands(spec, t, k, v)
        if spec.qk == "sdpa":
            out = _sdpa(spec, t, q, k, v)
        else:
            out = _eager(spec, t, q, k, v, extra)
        if spec.output == "tokens":
            out = out.transpose(-2, -3).flatten(-2)
        return (out, *extra) if extra else out

    return function


def _change_operands(spec: Spec, t: Inputs, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if spec.has("keys_reversed_batch"):
        k = k.flip(0)
    if spec.has("keys_rolled"):
        k = k.roll(1, dims=-2)
    if spec.has("large_scores"):
        # Larger than -1e4, which then is no mask.
        k = k * 2e4
    if spec.has("last_key_twice"):
        k = torch.cat((k[..., 1:, :], k[..., -1:, :]), dim=-2)
    if spec.has("score_gathered"):
        k, v = k.index_select(-2, t["picked"]), v.index_select(-2, t["picked"])
    if spec.has("keys_of_half"):
        k = torch.cat((k[..., : spec.D // 2], k[..., : spec.D // 2]), dim=-1)
    if spec.has("values_other_heads"):
        v = v.flip(-3)
    if spec.has("values_transposed") and spec.Dv == spec.T:
        v = v.mT
    if (spec.has("value_is_key") or spec.has("value_is_key_written")) and spec.Dv == spec.D:
        v = k
    return k, v


def _sdpa(spec: Spec, t: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouping: dict[str, Any] = {}
    if spec.G > 1 and spec.grouping == "query_view" and not spec.has("repeat_whole"):
        grouping = {"enable_gqa": True}
    else:
        k, v = grouped(spec, k, "k"), grouped(spec, v, "v")
    scale = _scale(spec) if spec.scale != "none" else None
    masks = keep_masks(spec, t)
    if spec.masks == ("causal_top_left",) and len(masks) == 1 and not spec.has("mask_inverted"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, **grouping)
    mask: Tensor | None = None
    for m in masks:
        mask = m if mask is None else mask & m
    bias = _bias(spec, t)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    if mask is not None and mask.dim() == 1:
        mask = mask[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouping)


def _scale(spec: Spec) -> float:
    scale = 1.0 / math.sqrt(spec.D)
    if spec.has("half_scale"):
        scale *= 0.5
    return -scale if spec.has("negative_scale") else scale


def _bias(spec: Spec, t: Inputs) -> Tensor | None:
    if spec.bias == "alibi":
        distance = torch.arange(spec.T)[None, :] - torch.arange(spec.S)[:, None]
        return t["slopes"][:, None, None] * distance.to(t["slopes"].dtype)
    if spec.bias == "heads":
        return t["bias"][0] if spec.layout == "no_batch" else t["bias"]
    if spec.bias == "whole":
        return t["whole_bias"][0] if spec.layout == "no_batch" else t["whole_bias"]
    return None


def _eager(spec: Spec, t: Inputs, q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor]) -> Tensor:
    masks = keep_masks(spec, t)
    if spec.has("mask_written_before") and masks:
        masks[0] = masks[0].clone().logical_not_()
    s = _scores(spec, q, k, v)
    if spec.has("return_scores"):
        extra.append(s)
    if spec.has("return_keys"):
        extra.append(grouped(spec, k, "k"))
    _write_between(spec, t, q, k, v)
    s = _change_scores(spec, t, s)
    bias = _bias(spec, t)
    if bias is not None and not spec.bias_after_mask and not spec.has("bias_after"):
        s = s + bias
    unmasked = s
    s = _masked(spec, t, s, masks)
    if spec.has("mask_written_after") and "dense" in spec.masks and spec.layout != "no_batch":
        t["keep"].logical_not_()
    if bias is not None and spec.bias_after_mask and not spec.has("bias_after"):
        s = s + bias
    if spec.softcap and spec.has("softcap_after_mask"):
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if spec.scale == "after_mask":
        s = s * _scale(spec)
    if spec.has("return_maximum"):
        extra.append(s.amax(-1))
    p, total = _softmax(spec, t, s, unmasked)
    p = _change_weights(spec, t, p, masks, bias)
    if spec.has("return_weights"):
        extra.append(p)
    out = _values(spec, p, v)
    return out if total is None else out / total


def _scores(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = _scale(spec)
    if spec.scale == "q":
        q = q * scale
    elif spec.scale == "k":
        k = k * scale
    elif spec.scale == "both":
        q, k = q * abs(scale) ** 0.5, k * math.copysign(abs(scale) ** 0.5, scale)
    s = _product(spec.qk, spec, q, k)
    if spec.scale == "multiply":
        s = s * scale
    elif spec.scale == "divide":
        s = s / (1 / scale)
    if spec.softcap and not spec.has("softcap_after_mask"):
        s = torch.tanh(s / spec.softcap) * spec.softcap
    return s


def _product(spelling: str, spec: Spec, q: Tensor, k: Tensor) -> Tensor:
    """``q @ k^T`` over the last dimension, ``[..., Hq, S, T]``, K's heads repeated as the spec says."""
    if spec.G > 1 and spec.grouping == "query_view" and not spec.has("repeat_whole"):
        view = q.unflatten(-3, (spec.Hkv, spec.G))
        return (view @ k.unsqueeze(-3).mT).flatten(-4, -3)
    k = grouped(spec, k, "k")
    if spelling == "einsum":
        return torch.einsum("...qd,...kd->...qk", q, k)
    if spelling == "transposed":
        return torch.einsum("...kd,...qd->...kq", k, q).transpose(-1, -2)
    if spelling == "broadcast":
        return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    if spelling in ("bmm", "baddbmm"):
        *batch, S, D = q.shape
        flat_q, flat_k = q.reshape(-1, S, D), k.reshape(-1, k.shape[-2], D).transpose(1, 2)
        if spelling == "baddbmm":
            empty = torch.zeros(1, 1, k.shape[-2], dtype=q.dtype)
            return torch.baddbmm(empty, flat_q, flat_k, beta=1.0, alpha=0.5).view(*batch, S, -1) * 2.0
        return torch.bmm(flat_q, flat_k).view(*batch, S, -1)
    return torch.matmul(q, k.transpose(-1, -2))


def _write_between(spec: Spec, t: Inputs, q: Tensor, k: Tensor, v: Tensor) -> None:
    if spec.has("value_is_key_written"):
        k.mul_(2.0)
    if spec.has("key_view_written"):
        k[..., :1].zero_()
    if spec.has("value_written"):
        v.add_(1.0)
    if spec.has("query_written_after"):
        q.add_(1.0)


def _change_scores(spec: Spec, t: Inputs, s: Tensor) -> Tensor:
    if spec.has("scores_written"):
        s[..., 0].fill_(0.5)
    if spec.has("scores_diagonal_written"):
        s.diagonal(dim1=-2, dim2=-1).add_(1.0)
    if spec.has("scores_abs"):
        s = s.abs()
    if spec.has("scores_round"):
        s = s.round()
    if spec.has("scores_rolled"):
        s = s.roll(1, dims=-1)
    if spec.has("temperature"):
        s = s * t["temperature"]
    if spec.has("mean_added"):
        s = s + s.mean(dim=-1, keepdim=True)
    return s


def _masked(spec: Spec, t: Inputs, s: Tensor, masks: list[Tensor]) -> Tensor:
    if spec.combine == "and" and len(masks) > 1:
        masks = [torch.logical_and(masks[0], masks[1]), *masks[2:]]
    for keep in masks:
        s = _fill(spec, t, s, keep)
    return s


def _fill(spec: Spec, t: Inputs, s: Tensor, keep: Tensor) -> Tensor:
    least = torch.finfo(s.dtype).min
    for name, value in (("fill_zero", 0.0), ("fill_twenty", -20.0), ("fill_plus_inf", math.inf)):
        if spec.has(name):
            return s.masked_fill(~keep, value)
    if spec.has("mask_multiplies"):
        return s * keep
    if spec.has("fill_tensor"):
        return torch.where(keep, s, t["fill"])
    if spec.fill.startswith("add_"):
        if spec.fill == "add_inf":
            return s + torch.zeros(keep.shape, dtype=s.dtype).masked_fill(~keep, -math.inf)
        amount = {"add_finfo": least, "add_1e9": -1e9, "add_1e4": -1e4}[spec.fill]
        return s + (1.0 - keep.to(s.dtype)) * amount
    if spec.fill.startswith("where_"):
        return torch.where(keep, s, -math.inf if spec.fill == "where_inf" else least)
    return s.masked_fill(~keep, {"inf": -math.inf, "finfo": least, "1e9": -1e9}[spec.fill])


def _softmax(spec: Spec, t: Inputs, s: Tensor, unmasked: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights, and what the output is divided by when that comes after the values."""
    dim = -2 if spec.has("softmax_queries") else -3 if spec.has("softmax_heads") else -1
    sink = t["sinks"][:, None, None]
    if spec.sinks == "column":
        s = torch.cat((s, sink.expand(*s.shape[:-1], 1)), dim=-1)
    p, total = _spelled(spec, s, unmasked, dim, sink)
    return (p[..., :-1] if spec.sinks == "column" else p), total


def _spelled(spec: Spec, s: Tensor, unmasked: Tensor, dim: int, sink: Tensor) -> tuple[Tensor, Tensor | None]:
    how = spec.softmax
    if how in ("by_hand", "after_values", "by_hand_unshifted"):
        top = s.amax(-2 if spec.has("max_of_queries") else dim, keepdim=True)
        if spec.sinks == "denominator":
            top = torch.maximum(top, sink)
        shifted = s if how == "by_hand_unshifted" else s - top
        e = torch.exp2(shifted) if spec.has("exp2") else torch.exp(shifted)
        summed = torch.exp(unmasked - top) if spec.has("sum_before_mask") and spec.sinks != "column" else e
        total = summed.sum(-2 if spec.has("sum_of_queries") else dim, keepdim=True)
        if spec.sinks == "denominator":
            total = total + torch.exp(sink - top)
        if spec.has("epsilon"):
            total = total + 0.5
        return (e, total) if how == "after_values" else (e / total, None)
    if how == "subtract_max":
        return (s - s.amax(-2 if spec.has("max_of_queries") else -1, keepdim=True)).softmax(dim), None
    if how == "logsumexp":
        return torch.exp(s - torch.logsumexp(s, dim=dim, keepdim=True)), None
    if how == "log_softmax":
        return F.log_softmax(s, dim=dim).exp(), None
    if how == "float":
        return s.float().softmax(dim).to(s.dtype), None
    if how == "dtype":
        return F.softmax(s, dim=dim, dtype=torch.float32).to(s.dtype), None
    if how == "module":
        return torch.nn.Softmax(dim=dim)(s), None
    return (F.softmax(s, dim=dim) if how == "functional" else s.softmax(dim)), None


def _change_weights(spec: Spec, t: Inputs, p: Tensor, masks: list[Tensor], bias: Tensor | None) -> Tensor:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "scaled_after": lambda p: p * 0.5,
        "rows_scaled_after": lambda p: p * t["rows"],
        "mask_after": lambda p: p.masked_fill(~masks[0], 0.0) if masks else p.tril(),
        "bias_after": lambda p: p if bias is None else p + bias,
        "weights_squared": lambda p: p * p,
        "weights_clamped": lambda p: p.clamp(max=0.5),
        "weights_cumsum": lambda p: p.cumsum(-1),
        "weights_bf16": lambda p: p.bfloat16().to(p.dtype),
        "nan_to_num": lambda p: p.nan_to_num(0.0),
        "softmax_twice": lambda p: p.softmax(-1),
        "dropout": lambda p: F.dropout(p, 0.4, training=True),
    }
    for name, change in changes.items():
        if spec.has(name):
            p = change(p)
    if spec.has("weights_written"):
        p[..., 0] = 0.0
    return p


def _values(spec: Spec, p: Tensor, v: Tensor) -> Tensor:
    if spec.G > 1 and spec.grouping == "query_view" and not spec.has("repeat_whole"):
        view = p.unflatten(-3, (spec.Hkv, spec.G))
        return (view @ v.unsqueeze(-3)).flatten(-4, -3)
    v = grouped(spec, v, "v")
    if spec.pv == "einsum":
        return torch.einsum("...qk,...kd->...qd", p, v)
    if spec.pv == "broadcast":
        return (p[..., None] * v[..., None, :, :]).sum(-2)
    if spec.pv == "bmm":
        *batch, S, T = p.shape
        return torch.bmm(p.reshape(-1, S, T), v.reshape(-1, T, v.shape[-1])).view(*batch, S, -1)
    return torch.matmul(p, v)
