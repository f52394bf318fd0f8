"""The choice of the experts in one launch: scores, groups, the K best, their weights. A program takes one token.

The K best are found one after the other. K is small and the scores of a token fit in a warp's registers, so that
beats a sort. Of equal scores the expert with the lower number comes first; NaN counts as the largest, as in
`torch.topk`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

SOFTMAX: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)


@triton.jit
def route_kernel(
    logits, bias, ids, weights, stride_t, stride_e, stride_b, scaling, eps,
    TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP2: tl.constexpr, SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). Experts are laid out as [GROUPS, SIZE]; ids and weights are ``[T, TOPK]``, contiguous."""
    if PDL:
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_PAD)
    member = tl.arange(0, SIZE_PAD)
    expert = group[:, None] * SIZE + member[None, :]
    real = (group[:, None] < GROUPS) & (member[None, :] < SIZE)
    x = tl.load(logits + t * stride_t + expert * stride_e, mask=real, other=float("-inf")).to(tl.float32)
    if SCORE == SOFTMAX:
        top = tl.max(tl.max(x, 1), 0)
        score = tl.exp(x - top)
        score = score / tl.sum(tl.sum(score, 1), 0)
    elif SCORE == SIGMOID:
        score = tl.sigmoid(x)
    else:
        # softplus, with the logarithm of 1 + e right also where e vanishes beside 1
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        score = tl.sqrt(tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0))))
    choice = score
    if bias is not None:
        choice = score + tl.load(bias + expert * stride_b, mask=real, other=0.0).to(tl.float32)
    choice = tl.where(choice == choice, choice, float("inf"))
    free = real
    if TOPK_GROUP < GROUPS:
        worth, first = _best(choice, real, expert, 1, GROUPS * SIZE)
        if TOP2 and SIZE > 1:
            worth += _best(choice, real & (expert != first[:, None]), expert, 1, GROUPS * SIZE)[0]
        left = group < GROUPS
        for _ in tl.static_range(TOPK_GROUP):
            _, chosen = _best(worth, left, group, 0, GROUPS)
            left = left & (group != chosen)
        free = real & ((group < GROUPS) & (left == 0))[:, None]
    slot = tl.arange(0, TOPK_PAD)
    picked = tl.zeros((TOPK_PAD,), tl.int32)
    weight = tl.zeros((TOPK_PAD,), tl.float32)
    for j in tl.static_range(TOPK):
        value, at = _best(choice, free, expert, 1, GROUPS * SIZE)
        top = tl.max(value, 0)
        at = tl.min(tl.where((value == top) & (at < GROUPS * SIZE), at, GROUPS * SIZE), 0)
        picked = tl.where(slot == j, at, picked)
        weight = tl.where(slot == j, tl.sum(tl.sum(tl.where(expert == at, score, 0.0), 1), 0), weight)
        free = free & (expert != at)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 0) + eps)
    weight = weight * scaling
    tl.store(ids + t * TOPK + slot, picked.to(tl.int64), mask=slot < TOPK)
    tl.store(weights + t * TOPK + slot, weight.to(weights.dtype.element_ty), mask=slot < TOPK)


@triton.jit
def _best(value, free, number, AXIS: tl.constexpr, NONE: tl.constexpr):
    """The largest value along an axis among those that are free, and its number; NONE where none is free."""
    value = tl.where(free, value, float("-inf"))
    top = tl.max(value, AXIS)
    if len(value.shape) == 2:
        equal = value == top[:, None]
    else:
        equal = value == top
    return top, tl.min(tl.where(free & equal, number, NONE), AXIS)
