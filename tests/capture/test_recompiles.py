"""Before Dynamo gives up on a function and runs it in eager, the user hears of it, with the guard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile.report import Report


def scaled(x: Tensor, how: str) -> Tensor:
    return x * len(how)


def of_size(x: Tensor) -> Tensor:
    return x + 1


def run(function: Callable[..., Any], calls: list[tuple[Any, ...]], **settings: Any) -> tuple[Report, list[str]]:
    torch._dynamo.reset()
    backend = settings.pop("backend", sm12x_compile.sm12x)
    options = {"options": {"codegen": "eager"}} if backend is sm12x_compile.sm12x else {}
    with torch._dynamo.config.patch(recompile_limit=3, **settings), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        call = torch.compile(function, backend=backend, **options)
        with sm12x_compile.collect() as report, torch.no_grad():
            for args in calls:
                assert torch.equal(call(*args), function(*args))
    return report, [str(w.message) for w in heard if "sm12x" in str(w.message)]


def written(cache: Tensor, x: Tensor, position: int) -> Tensor:
    cache = cache.clone()
    cache[:, position : position + 1] = x
    return cache * (torch.arange(cache.shape[1]) <= position)[:, None]


def test_positions_as_ints_and_batches_settle_at_a_second_graph() -> None:
    positions = [(torch.zeros(2, 16, 4), torch.ones(2, 1, 4), k) for k in range(3, 12)]
    report, heard = run(written, positions)
    assert report.graphs == 2 and not heard
    assert report.recompiles == ["0/0: position == 3"]
    batches = [(torch.zeros(n, 16, 4), torch.ones(n, 1, 4), 5) for n in range(2, 9)]
    report, heard = run(written, batches)
    assert report.graphs == 2 and not heard
    assert len(report.recompiles) == 1 and "size mismatch at index 0. expected 2, actual 3" in report.recompiles[0]


WORDS = [(torch.ones(2), "a" * n) for n in range(1, 6)]


def test_the_warning_names_function_and_guard_and_says_what_to_do() -> None:
    report, heard = run(scaled, WORDS)
    assert report.graphs == 3
    assert len(heard) >= 1
    for part in ("scaled (", "test_recompiles.py:", "EAGER MODE", "how", "recompile_limit", "Keep it in a tensor"):
        assert part in heard[0], part
    assert heard[0] in report.warnings
    assert len(report.recompiles) >= 2 and all("how" in reason for reason in report.recompiles)


def test_a_size_gets_other_advice() -> None:
    sizes = [(torch.ones(n),) for n in range(2, 8)]
    _, heard = run(of_size, sizes, automatic_dynamic_shapes=False, assume_static_by_default=True)
    assert heard and "mark_dynamic" in heard[0]


def test_below_the_limit_nothing_is_said() -> None:
    report, heard = run(scaled, WORDS[:3])
    assert report.graphs == 3 and not heard and not report.warnings


def test_other_backends_are_not_our_business() -> None:
    _, heard = run(scaled, WORDS, backend="eager")
    assert not heard


@pytest.mark.parametrize("uninstalled", [False, True])
def test_uninstall(uninstalled: bool) -> None:
    from torch._dynamo import convert_frame

    from sm12x_compile.capture import wrap

    if uninstalled:
        wrap.uninstall()
    name = convert_frame.exceeds_recompile_limit.__code__.co_filename
    assert ("sm12x_compile" in name) is not uninstalled
    wrap.install()
