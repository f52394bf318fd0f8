"""A case run through its adapter and compared with the op's reference in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sm12x_compile.arch import CARDS, Arch
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call, kernels

from .cases import Case

# Relative to the largest element; the stand-ins compute in fp64, so what is left is the rounding of the result.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-2}


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def check(case: Case, arch: Arch = CARDS["rtx5090"], device: str = "cpu") -> None:
    """The kernel accepts the call on the card, and gives the reference's result, dtype and strides."""
    kernel = next(k for k in kernels(case.op) if k.name == case.kernel)
    call = case.call(device)
    verdict = kernel.accepts(call, arch)
    assert verdict, verdict
    run = kernel.run if kernel.overload is None else kernel.overload
    agrees(case, run(**call.arguments), call)


def agrees(case: Case, found: Any, call: Call) -> None:
    """The result is the reference's, with the dtype and the strides that the op's fake promises."""
    wide = {name: _wide(value) for name, value in call.arguments.items() if name != "out_dtype"}
    expected = OPS[case.op].reference(**wide)
    fake = OPS[case.op].fake(**call.arguments)
    for mine, true, meta in zip(_all(found), _all(expected), _all(fake), strict=True):
        assert (mine.dtype, mine.shape, _strides(mine)) == (meta.dtype, meta.shape, _strides(meta))
        assert torch.equal(mine.isnan(), true.isnan())
        error = (mine.double() - true).nan_to_num().abs().max() / true.nan_to_num().abs().max()
        assert float(error) < BOUND[mine.dtype], float(error)


def _all(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _strides(t: Tensor) -> list[int]:
    """Those that matter."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
