"""Masks, routings and thresholds that hypothesis draws, and random row-wise programs: never a wrong answer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sm12x_compile

from .snippets import COMPILED, D, E, K, T, matrix_and_mask, numbers, routing, same_shape_mask, tokens_and_mask

BY_NAME = {s.name: s for s in COMPILED}
ODD = st.sampled_from([0.0, -0.0, 1.0, -3.5, 1e30, float("inf"), float("-inf"), float("nan")])


def options() -> dict[str, Any]:
    return {"backend": sm12x_compile.sm12x, "options": {"codegen": "eager"}, "fullgraph": True}


@functools.cache
def pair(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A snippet and its compiled form, which is compiled once for all that is drawn."""
    torch.manual_seed(0)
    function = BY_NAME[name].make()
    return function, torch.compile(copy.deepcopy(function), **options())


def assert_same(name: str, inputs: tuple[Tensor, ...]) -> None:
    function, compiled = pair(name)
    with torch.no_grad():
        wanted, got = function(*(x.clone() for x in inputs)), compiled(*(x.clone() for x in inputs))
    bound = {"none": 0.0, "last bit": 1e-6, "sums": 1e-4}[BY_NAME[name].rounding]
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, equal_nan=True)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks(*shape: int) -> st.SearchStrategy[Tensor]:
    count = 1
    for n in shape:
        count *= n
    some = st.lists(st.booleans(), min_size=count, max_size=count)
    return some.map(lambda bits: torch.tensor(bits).reshape(shape))


def names_of(draw: Any) -> list[str]:
    return [s.name for s in COMPILED if s.draw is draw]


drawn = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@drawn
@given(mask=masks(T), seed=st.integers(0, 99), odd=st.lists(ODD, min_size=3, max_size=3), data=st.data())
def test_masks(mask: Tensor, seed: int, odd: list[float], data: st.DataObject) -> None:
    x = random(T, D, seed=seed)
    name = data.draw(st.sampled_from(names_of(tokens_and_mask)))
    if BY_NAME[name].rounding != "sums":
        for value in odd:  # in any row, selected or not
            x[data.draw(st.integers(0, T - 1)), data.draw(st.integers(0, D - 1))] = value
    assert_same(name, (x, mask))


@drawn
@given(mask=masks(3, T), seed=st.integers(0, 99), data=st.data())
def test_masks_of_two_dimensions(mask: Tensor, seed: int, data: st.DataObject) -> None:
    assert_same(data.draw(st.sampled_from(names_of(matrix_and_mask))), (random(3, T, D, seed=seed), mask))


@drawn
@given(mask=masks(T, D), seed=st.integers(0, 99))
def test_masks_of_elements(mask: Tensor, seed: int) -> None:
    assert_same(names_of(same_shape_mask)[0], (random(T, D, seed=seed), mask))


@drawn
@given(shift=st.floats(-6, 6), spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]), seed=st.integers(0, 99), data=st.data())
def test_thresholds(shift: float, spread: float, seed: int, data: st.DataObject) -> None:
    x = random(T, D, seed=seed) * spread + shift
    assert_same(data.draw(st.sampled_from(names_of(numbers))), (x,))


@drawn
@given(
    ids=st.lists(st.integers(0, E - 1), min_size=T * K, max_size=T * K),
    zero=st.lists(st.integers(0, T * K - 1), max_size=4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_routings(ids: list[int], zero: list[int], seed: int, data: st.DataObject) -> None:
    """A token may be sent to one expert twice, to all of them or with weight zero."""
    weights = random(T * K, seed=seed).softmax(0) * T
    weights[zero] = 0.0
    # Of two ids that are the same, `scatter` keeps either weight.
    apart = [n for n in names_of(routing) if n not in ("UniqueLoop", "SortedSlices")]
    inputs = random(T, D, seed=seed + 1), torch.tensor(ids).reshape(T, K), weights.reshape(T, K)
    assert_same(data.draw(st.sampled_from(apart)), inputs)


ROW_WISE: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda r: r * 1.5 - 2,
    "reflected": lambda r: 1 - 3 / (r * r + 1),
    "power": lambda r: 2.0**-r.abs(),
    "compare": lambda r: torch.where(r > 0.5, r, -r) + (r <= 0).to(r.dtype),
    "floor": lambda r: r // 0.5 + r % 0.3,
    "matmul": lambda r: r @ torch.linspace(-1, 1, D * D).view(D, D),
    "linear": lambda r: F.linear(r, torch.linspace(-1, 1, D * D).view(D, D), torch.arange(D) * 0.1),
    "softmax": lambda r: r.softmax(-1),
    "log_softmax": lambda r: F.log_softmax(r, dim=1),
    "layer_norm": lambda r: F.layer_norm(r, (D,)),
    "rms_norm": lambda r: r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + 1e-6),
    "gate": lambda r: torch.cat([F.silu(r[:, : D // 2]) * r[..., D // 2 :], r[:, D // 2 :]], dim=-1),
    "chunk": lambda r: torch.cat([b - a for a, b in [r.chunk(2, dim=-1)]] * 2, -1),
    "stack": lambda r: torch.stack([r, -r], dim=1).sum(1) + r,
    "heads": lambda r: r.view(-1, 2, D // 2).transpose(1, 2).reshape(-1, D),
    "reshape": lambda r: r.reshape(r.shape[0], 2, D // 2).flip(1).flatten(1),
    "cast": lambda r: r.to(torch.bfloat16).float(),
    "in_place": lambda r: (r + 0).mul_(2).add_(1),
    "clamp": lambda r: r.clamp(-1, 1).masked_fill(r > 2, 0.25),
    "feature": lambda r: r * torch.arange(D).to(r.dtype) + r[:, 0].unsqueeze(-1),
    "sorted": lambda r: r.sort(dim=-1)[0] + r.topk(1, dim=-1)[0],
    "maximum": lambda r: r.max(dim=-1, keepdim=True)[0] - r.amin(-1, keepdim=True) + r,
    "cumulative": lambda r: r.cumsum(-1) / D,
}  # fmt: skip


def program(x: Tensor, mask: Tensor, steps: list[Callable[[Tensor], Tensor]]) -> Tensor:
    rows = x[mask]
    for step in steps:
        rows = step(rows)
    out = x.clone()
    out[mask] = rows
    return out


def run_program(names: list[str], mask: Tensor) -> None:
    torch._dynamo.reset()
    steps = [ROW_WISE[n] for n in names]
    x = random(T, D, seed=len(names))
    with torch.no_grad(), sm12x_compile.collect() as report:
        got = torch.compile(program, **options())(x, mask, steps)
        wanted = program(x, mask, steps)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert report.graphs == 1


@pytest.mark.parametrize("name", ROW_WISE)
def test_each_row_wise_operation(name: str) -> None:
    run_program([name], torch.arange(T) % 3 == 0)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(names=st.lists(st.sampled_from([n for n in ROW_WISE if n != "power"]), min_size=2, max_size=5), mask=masks(T))
def test_row_wise_programs(names: list[str], mask: Tensor) -> None:
    run_program(names, mask)


@pytest.mark.nightly
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mask=masks(T), seed=st.integers(0, 10**6), odd=st.lists(ODD, min_size=4, max_size=4), data=st.data()
)
def test_masks_at_length(mask: Tensor, seed: int, odd: list[float], data: st.DataObject) -> None:
    test_masks.hypothesis.inner_test(mask, seed, odd, data)


def test_a_wrong_mask_would_be_noticed() -> None:
    """The comparison fails if a row too many is written."""
    x, mask = random(T, D, seed=0), torch.arange(T) < 3
    function, compiled = pair("clamp_rows")
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(compiled(x, torch.arange(T) < 4), function(x, mask))
