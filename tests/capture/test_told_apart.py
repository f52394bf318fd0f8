"""Copies of a reference are captured, copies with another meaning are not; either way the numbers are eager's."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import sm12x_compile
from sm12x_compile.capture.fingerprint import read
from sm12x_compile.capture.pure_code import Opaque
from sm12x_compile.ops import OPS

from .variants import CAPTURED, CHUNKED, LEFT, changed, load

ORDER = ("query", "key", "value", "g", "beta")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(T: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    B, H, K, V = 2, 3, 6, 4
    return {
        "query": normal(B, T, H, K), "key": 0.4 * normal(B, T, H, K), "value": normal(B, T, H, V),
        "g": -normal(B, T, H).abs(), "beta": torch.sigmoid(normal(B, T, H)), "start": normal(B, H, K, V),
    }  # fmt: skip


def caller(function: Any) -> Any:
    """Code that calls the function: what is compiled itself is not a call that could be captured."""

    def model(**given: Any) -> Any:
        return function(**given)

    return model


def compare(function: Any, *, capture: bool = True) -> sm12x_compile.Report:
    """Compiled against eager at a length that is no multiple of any chunk."""
    torch._dynamo.reset()
    given = operands(19)

    def run(**tensors: torch.Tensor) -> Any:
        return function(**tensors, with_state=True, norm=True)

    with torch.no_grad(), sm12x_compile.collect() as report:
        compiled = torch.compile(run, backend=sm12x_compile.sm12x, options={"codegen": "eager", "capture": capture})
        ours = compiled(**{k: v.clone() for k, v in given.items()})
        eager = run(**{k: v.clone() for k, v in given.items()})
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    return report


@pytest.mark.parametrize("name", CAPTURED)
def test_the_same_meaning_is_captured(name: str, tmp_path: Path):
    report = compare(load(changed(CHUNKED, CAPTURED[name]), tmp_path))
    assert len(report.captures) == 1, f"{name}: {report}"
    assert report.count("gated_delta_rule") == 1


@pytest.mark.parametrize("name", LEFT)
def test_another_meaning_is_left_alone(name: str, tmp_path: Path):
    report = compare(load(changed(CHUNKED, LEFT[name]), tmp_path))
    assert not report.captures, f"{name}: {report}"


def test_names_and_comments_do_not_matter(tmp_path: Path):
    original = load(CHUNKED, tmp_path)
    text = changed(
        CHUNKED,
        [("attn", "mixture"), ("total", "running"), ("unit", "of_length_one"), ('"""Chunk by chunk."""', "# other")],
    )
    assert ast.parse(text)
    renamed = load(text, tmp_path)
    assert read(renamed).fingerprint == read(original).fingerprint
    assert len(compare(renamed).captures) == 1


@pytest.mark.parametrize("name", [n for n in {**CAPTURED, **LEFT} if n != "as it is"])
def test_each_change_has_a_fingerprint_of_its_own(name: str, tmp_path: Path):
    original = load(CHUNKED, tmp_path)
    other = load(changed(CHUNKED, {**CAPTURED, **LEFT}[name]), tmp_path)
    with contextlib.suppress(Opaque):
        assert read(other).fingerprint != read(original).fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path):
    """In bf16 as near to fp64 as eager; fp64, which these references round to fp32, is left alone."""
    function = load(CHUNKED, tmp_path)
    given = {k: v.to(dtype) for k, v in operands(19).items()}
    wide = {k: v.double() for k, v in given.items()}
    with torch.no_grad(), sm12x_compile.collect() as report:
        compiled = torch.compile(caller(function), backend=sm12x_compile.sm12x, options={"codegen": "eager"})
        ours = compiled(**given, with_state=True)
    eager = function(**given, with_state=True)
    q, k, v, g, beta = (wide[x] for x in ORDER)
    truth = OPS["gated_delta_rule"].reference(q, k, v, g, beta, 6**-0.5, wide["start"])
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        bound = 2 * (theirs.double() - exact).abs().max() + 1e-5
        assert (mine.double() - exact).abs().max() <= bound
    assert len(report.captures) == (1 if dtype == torch.bfloat16 else 0)
