"""The choice of the experts in one launch: scores, groups, the K best, their weights. A program takes one token.

The K best are found one after the other, each by one reduction. K is small and the scores of a token fit in a warp's
registers, so that beats a sort. Of equal scores the expert with the lower number comes first; NaN counts as the
largest, as in `torch.topk`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

SOFTMAX: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)

LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)
NEVER: tl.constexpr = tl.constexpr(-(2**63))


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
    top, total = 0.0, 1.0
    if SCORE == SOFTMAX:
        top = tl.max(tl.max(x, 1), 0)
        total = tl.sum(tl.sum(tl.exp(x - top), 1), 0)
    score = _score(x, top, total, SCORE)
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
    # A choice and its expert's number in one integer, which orders first by one and then by the other. -0 equals 0.
    bits = (choice + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(free, (bits.to(tl.int64) << 32) + (LAST - expert), NEVER)
    slot = tl.arange(0, TOPK_PAD)
    picked = tl.full((TOPK_PAD,), LAST, tl.int64)
    for j in tl.static_range(TOPK):
        best = tl.max(tl.max(key, 1), 0)
        picked = tl.where(slot == j, best, picked)
        key = tl.where(key == best, NEVER, key)
    at = LAST - (picked & 0xFFFFFFFF)
    x = tl.load(logits + t * stride_t + at * stride_e, mask=slot < TOPK, other=0.0).to(tl.float32)
    weight = tl.where(slot < TOPK, _score(x, top, total, SCORE), 0.0)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 0) + eps)
    weight = weight * scaling
    tl.store(ids + t * TOPK + slot, at, mask=slot < TOPK)
    tl.store(weights + t * TOPK + slot, weight.to(weights.dtype.element_ty), mask=slot < TOPK)


@triton.jit
def _score(x, top, total, SCORE: tl.constexpr):
    """The score of logits; top and total: the largest logit of the token and the sum of the powers, for softmax."""
    if SCORE == SOFTMAX:
        score = tl.exp(x - top) / total
    elif SCORE == SIGMOID:
        score = tl.sigmoid(x)
    else:
        # softplus, with the logarithm of 1 + e right also where e vanishes beside 1
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        score = tl.sqrt(tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0))))
    return score


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
