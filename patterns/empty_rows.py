"""Queries that no key may serve: what the user's code gives them, and which masks keep that.

Masked with -inf, a softmax gives NaN and SDPA gives zero. Masked with a finite number, the weights are those of
whatever stands at the masked scores: uniform if the number *replaced* the scores, or if it is so low that adding
it swallowed them. Where neither holds, a mask stays a tensor that is added, which is exactly what the user did.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sm12x_compile.masks import MaskTerm, StructuredMask, explain_masks
from sm12x_compile.match import Refusal

from .roles import Problem, Roles
from .scores import ABSORBING


def _absorbs(term: MaskTerm) -> bool:
    """Whether adding the drop value leaves nothing of a score: in float16 the least number takes all below 16."""
    half = term.source.node.meta["val"].dtype == torch.float16 and term.drop_value <= torch.finfo(torch.float16).min
    return term.drop_value <= ABSORBING or half


def settle_masks(problem: Problem, roles: Roles) -> tuple[StructuredMask, str] | Refusal:
    """The masks as they may be passed on, and the op's ``empty_rows``."""
    masks = problem.masks
    plain = "zero" if problem.form == "sdpa" else "nan"

    def explain(terms: tuple[MaskTerm, ...]) -> StructuredMask:
        return explain_masks(terms, roles.query, problem.key, set(roles.batch))

    mask = explain(masks)
    may_be_empty = bool(mask.dense) or mask.may_be_empty(roles.query, problem.key)
    if not problem.stable and (may_be_empty or problem.biases):
        return Refusal("the softmax does not subtract each query's maximum: a masked query would be NaN", problem.node)
    finite = [m for m in masks if math.isfinite(m.drop_value)]
    if not may_be_empty:
        return mask, plain if problem.biases else "zero"  # no query is empty, and every kernel can do zero
    if not finite:
        return mask, plain
    same = len({m.drop_value for m in masks}) == 1
    if same and all(m.filled for m in masks):
        return replace(mask, dense=tuple(replace(m, as_bool=True) for m in mask.dense)), "mean"
    if len(masks) == 1 and _absorbs(masks[0]):
        return mask, "mean"
    if any(m.filled and not _absorbs(m) for m in finite):
        return Refusal("masks of different kinds meet; a query with no key would get something else", problem.node)
    rest = explain(tuple(m for m in masks if not math.isfinite(m.drop_value)))
    return replace(rest, dense=(*rest.dense, *finite)), plain
