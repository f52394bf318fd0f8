"""`sm12x::moe_route`'s reference against one token at a time, and Hugging Face's routers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import moe_route


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(
    logits: list[float], top_k: int, bias: list[float], score: str, n_group: int, topk_group: int,
    group_score: str, renormalise: bool, scaling: float,
) -> list[tuple[int, float]]:  # fmt: skip
    """The (expert, weight) pairs of one token, best first."""
    if score == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    elif score == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]

    def quality(group: list[int]) -> float:
        best = sorted((choice[e] for e in group), reverse=True)
        return sum(best[:2]) if group_score == "top2_sum" else best[0]

    allowed = sorted(groups, key=quality, reverse=True)[:topk_group]
    chosen = sorted((e for group in allowed for e in group), key=lambda e: choice[e], reverse=True)[:top_k]
    divisor = sum(scores[e] for e in chosen) if renormalise else 1.0
    return [(e, scores[e] / divisor * scaling) for e in chosen]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    T=st.integers(0, 4),
    grouping=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (8, 3)]),
    top_k=st.integers(1, 3),
    score=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
    group_score=st.sampled_from(["top2_sum", "max"]),
    biased=st.booleans(),
    renormalise=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
)
def test_one_token_at_a_time(
    seed: int, T: int, grouping: tuple[int, int], top_k: int, score: str, group_score: str, biased: bool,
    renormalise: bool, scaling: float,
) -> None:  # fmt: skip
    # A bias below the scores' range: groups left out must stay out even where their choice is larger than 0.
    logits, bias = randn(T, 8, seed=seed), randn(8, seed=seed + 1) - 2 if biased else None
    attributes = (score, *grouping, group_score, renormalise, scaling)
    ids, weights = moe_route.reference(logits, top_k, bias, *attributes)
    assert ids.dtype == torch.int64 and ids.shape == weights.shape == (T, top_k)
    for t in range(T):
        want = oracle(logits[t].tolist(), top_k, [0.0] * 8 if bias is None else bias.tolist(), *attributes)
        assert ids[t].tolist() == [e for e, _ in want]
        assert weights[t].tolist() == pytest.approx([w for _, w in want], rel=1e-12)


def test_softmax_of_the_best_logits() -> None:
    """gpt-oss takes the softmax after the choice, Qwen3 before it and renormalises: the same numbers."""
    logits = randn(5, 16).float() * 5
    best, ids = logits.topk(4)
    got_ids, weights = moe_route.reference(logits, 4, renormalise=True)
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(weights, best.softmax(-1))


def modeling(family: str) -> Any:
    return pytest.importorskip(f"transformers.models.{family}.modeling_{family}")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "deepseek_v4", "qwen3_moe"])
def test_against_hugging_face(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    Router: Any
    common: dict[str, Any] = dict(hidden_size=32, num_experts_per_tok=4)
    attributes: dict[str, Any]
    if family == "deepseek_v3":
        Router = modeling(family).DeepseekV3TopkRouter
        config = transformers.DeepseekV3Config(**common, n_routed_experts=16, n_group=4, topk_group=2)
        attributes = dict(score="sigmoid", n_group=4, topk_group=2, renormalise=True)
        attributes["scaling"] = config.routed_scaling_factor
    elif family == "deepseek_v2":
        Router = modeling(family).DeepseekV2TopkRouter
        config = transformers.DeepseekV2Config(
            **common, n_routed_experts=16, n_group=4, topk_group=2, topk_method="group_limited_greedy"
        )
        attributes = dict(n_group=4, topk_group=2, group_score="max", scaling=config.routed_scaling_factor)
    elif family == "deepseek_v4":
        Router = modeling(family).DeepseekV4TopKRouter
        config = transformers.DeepseekV4Config(**common, n_routed_experts=16)
        attributes = dict(score="sqrt_softplus", renormalise=True, scaling=config.routed_scaling_factor)
    else:
        Router = modeling(family).Qwen3MoeTopKRouter
        config = transformers.Qwen3MoeConfig(**common, num_experts=16, norm_topk_prob=True)
        attributes = dict(renormalise=True)
    router = Router(config)
    x = randn(6, 32).float()
    bias = None
    with torch.no_grad():
        router.weight.copy_(randn(16, 32, seed=1))
        if hasattr(router, "e_score_correction_bias"):
            bias = router.e_score_correction_bias.copy_(randn(16, seed=2) / 4)
        _, weights, ids = router(x)
        got_ids, got = moe_route.reference(x @ router.weight.T, 4, bias, **attributes)
    order, got_order = ids.sort(-1), got_ids.sort(-1)
    assert torch.equal(order.values, got_order.values)
    torch.testing.assert_close(got.gather(1, got_order.indices), weights.gather(1, order.indices).float())


def test_groups_left_out_stay_out_when_all_scores_are_negative() -> None:
    logits = torch.zeros(1, 4)
    bias = torch.tensor([-3.0, -2.0, -9.0, -9.0])
    ids, _ = moe_route.reference(logits, 2, bias, "sigmoid", n_group=2, topk_group=1)
    assert ids.tolist() == [[1, 0]]


def test_dtypes() -> None:
    logits = randn(3, 8).bfloat16()
    assert moe_route.overload(logits, 2)[1].dtype == torch.float32
    assert moe_route.overload(logits.double(), 2)[1].dtype == torch.float64
    assert moe_route.overload(logits, 2, out_dtype=torch.bfloat16)[1].dtype == torch.bfloat16


def test_bad_operands() -> None:
    logits = torch.zeros(3, 8)
    for kwargs, message in (
        (dict(score="relu"), "score='relu', not one of"),
        (dict(group_score="mean"), "group_score='mean', not one of"),
        (dict(n_group=3), "3 groups"),
        (dict(n_group=4, topk_group=5), "5 of 4 groups"),
        (dict(n_group=8, topk_group=1), "2 of 8 experts from 1 of 8 groups"),
        (dict(topk_group=0), "0 of 1 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_route.overload(logits, 2, **kwargs)
    for top_k in (0, 9):
        with pytest.raises(ValueError, match=f"take {top_k} of 8 experts"):
            moe_route.overload(logits, top_k)


def test_schema_and_fake(check_op: Any) -> None:
    logits = randn(3, 8).bfloat16()
    check_op(moe_route, logits, 2)
    check_op(
        moe_route,
        logits,
        2,
        randn(8),
        "sigmoid",
        4,
        2,
        renormalise=True,
        scaling=2.5,
        out_dtype=torch.bfloat16,
    )
