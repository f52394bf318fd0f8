"""The routing kernel against the reference in fp64: interpreted here, native where a GPU is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.ops.moe import moe_route

from .test_triton_numerics import run  # noqa: F401 (the fixture)

MODULE = "sm12x_compile.lowering.triton.moe_route"
Runner = Callable[..., Any]
# experts, groups, groups chosen, top-k
SIZES = [(8, 1, 1, 2), (7, 1, 1, 7), (160, 8, 3, 6), (256, 8, 4, 8), (12, 4, 2, 3), (5, 5, 3, 3), (128, 1, 1, 1)]


def logits_of(T: int, E: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(E)
    return (torch.randn(T, E, generator=g) * 4).to(device, dtype), (torch.randn(E, generator=g) / 8).to(device)


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_route(sizes: tuple[int, int, int, int], score: str, group_score: str, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    E, groups, chosen_groups, top_k = sizes
    if groups == 1 and group_score == "max":
        pytest.skip("without groups there is no score of a group")
    for T in (3,) if device == "cpu" else (3, 500):
        logits, bias = logits_of(T, E, device)
        for correction, renormalise in ((None, True), (bias, False), (bias, True)):
            given = (top_k, correction, score, groups, chosen_groups, group_score, renormalise, 2.5)
            ids, weights = run(MODULE, "moe_route", logits, *given)
            wanted_ids, wanted = moe_route.reference(logits.double(), *given)
            assert ids.dtype == torch.int64 and weights.dtype == torch.float32
            same = (ids == wanted_ids).all(1)  # fp32 may tell two scores apart that fp64 orders otherwise
            assert same.float().mean() > 0.99
            assert (weights[same] - wanted[same]).abs().max() <= 4e-6 * wanted.abs().max()


def test_equal_scores_give_different_experts(run: Runner) -> None:  # noqa: F811
    logits = torch.zeros(2, 6, device=run.device)  # type: ignore[attr-defined]
    ids, weights = run(MODULE, "moe_route", logits, 4, None, "softmax", 3, 2, "top2_sum", True)
    assert torch.equal(ids.cpu(), torch.arange(4).expand(2, 4))
    torch.testing.assert_close(weights.cpu(), torch.full((2, 4), 0.25))


def test_small_and_special_logits(run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    logits = torch.tensor([[-40.0, -50, -60, -70]], device=device)
    ids, weights = run(MODULE, "moe_route", logits, 4, None, "sqrt_softplus")
    wanted = moe_route.reference(logits.double(), 4, None, "sqrt_softplus")[1]
    assert ((weights - wanted).abs() <= 1e-5 * wanted).all(), "log(1 + e) where e vanishes beside 1"
    logits = torch.tensor([[1.0, torch.nan, 2, 0]], device=device)
    ids, weights = run(MODULE, "moe_route", logits, 2, None, "sigmoid")
    assert ids.tolist() == [[1, 2]] and weights[0, 0].isnan() and not weights[0, 1].isnan()
    logits = torch.full((2, 5), -torch.inf, device=device)  # a token without a future: in range all the same
    ids, weights = run(MODULE, "moe_route", logits, 3)
    assert ids.tolist() == [[0, 1, 2]] * 2 and weights.isnan().all()


def test_dtypes_strides_and_wrong_arguments(run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    logits, bias = logits_of(9, 16, device, torch.float16)
    logits = logits.mT.contiguous().mT
    ids, weights = run(MODULE, "moe_route", logits, 4, bias.half(), out_dtype=torch.float16)
    wanted_ids, wanted = moe_route.reference(logits.double(), 4, bias.half().double())
    assert torch.equal(ids, wanted_ids) and weights.dtype == torch.float16
    assert (weights - wanted).abs().max() <= 1e-3
    assert run(MODULE, "moe_route", logits[:0], 4)[0].shape == (0, 4)
    with pytest.raises((ValueError, AssertionError), match="cannot take 5 of 16"):
        run(MODULE, "moe_route", logits, 5, None, "softmax", 8, 2)
