"""Rewritten or refused, code that invites a mistake gives what it gives in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sm12x_compile

from .traps import TRAPS, D, T

# Rewritten, though it looks dangerous.
IN_ONE_GRAPH = {
    "inplace_on_rows", "setcol", "twice", "twice_indexadd", "half", "ifelse_alias", "if_inplace_arg", "deep",
    "returns_early", "py_number_result", "intfloat", "floor_mod", "cmp_numbers", "where_1d_of_2d", "perm_gather",
    "shifted_index", "loopbody_reuse", "attr_dyn", "mean_rows", "aug_int_loop", "count_hits", "mask_changed",
    "rounded_rows", "row_is_a_copy",
}  # fmt: skip


def inputs(kind: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kind)
    x = torch.randn(T, D, generator=generator)
    masks = torch.rand(T, generator=generator) > 0.5, torch.zeros(T).bool(), torch.ones(T).bool()
    return x, masks[kind % 3]


def outcome(function: Callable[..., Any], kind: int) -> Any:
    own = inputs(kind)
    try:
        with torch.no_grad():
            result = function(*own)
    except Exception:
        return "an error"
    return [v if isinstance(v, Tensor) else torch.tensor(v) for v in tree_leaves([result, *own])]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda f: f.__name__)
def test_traps(trap: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    call = torch.compile(trap, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        for kind in range(6):
            got, wanted = outcome(call, kind), outcome(trap, kind)
            if isinstance(wanted, str):
                assert got == wanted
            else:
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    if trap.__name__ in IN_ONE_GRAPH:
        assert report.graphs == 1, report.code_rewrites
