"""The Triton convolutions against the references in fp64: interpreted here, native where a GPU is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sm12x_compile.ops import causal_conv1d, causal_conv1d_update

from .test_triton_numerics import Runner, run  # noqa: F401 (the fixture)

MODULE = "sm12x_compile.lowering.triton.causal_conv1d"
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert (a.double() - b).norm() <= BOUND[dtype] * b.norm().clamp(min=1e-30)


def sizes(run: Runner) -> tuple[int, list[torch.dtype]]:  # noqa: F811
    """Channels and dtypes: not a multiple of any tile."""
    if run.device == "cpu":  # type: ignore[attr-defined]
        return 5, [torch.float32]
    return 517, [torch.float32, torch.bfloat16]


def made(run: Runner, dtype: torch.dtype, *shape: int) -> Tensor:  # noqa: F811
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(run.device, dtype)  # type: ignore[attr-defined]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("T", [1, 3, 37, 300])
@pytest.mark.parametrize("W", [1, 2, 3, 4])
def test_sequences(W: int, T: int, channels_last: bool, run: Runner) -> None:  # noqa: F811
    C, dtypes = sizes(run)
    for dtype, past, state_len in itertools.product(dtypes, (None, 0, 2), (None, 1, 7)):
        if past is not None and W - 1 + past == 0:
            continue
        x = made(run, dtype, 2, T, C).mT if channels_last else made(run, dtype, 2, C, T)
        w, bias = made(run, dtype, C, W), made(run, dtype, C) if T % 2 else None
        state = None if past is None else made(run, dtype, 2, C, W - 1 + past)
        activation = "silu" if T > 1 else "none"
        got = run(MODULE, "causal_conv1d", x, w, bias, activation, state, state_len)
        assert got[0].stride() == x.stride()
        x_, w_, bias_, state_ = wide(x, w, bias, state)
        assert x_ is not None and w_ is not None
        check(got, causal_conv1d.reference(x_, w_, bias_, activation, state_, state_len), dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("S", [1, 2, 5])
@pytest.mark.parametrize("W", [2, 4])
def test_steps(W: int, S: int, channels_last: bool, run: Runner) -> None:  # noqa: F811
    C, dtypes = sizes(run)
    for dtype, past in itertools.product(dtypes, (0, 1, 3)):
        x = made(run, dtype, 3, S, C).mT if channels_last else made(run, dtype, 3, C, S)
        w, bias, pool = made(run, dtype, C, W), made(run, dtype, C), made(run, dtype, 6, C, W - 1 + past)
        slots = torch.tensor([4, -1, 0], device=x.device)
        x_, w_, bias_, pool_ = wide(x, w, bias, pool)
        assert x_ is not None and w_ is not None and pool_ is not None
        want = causal_conv1d_update.reference(x_, w_, pool_, slots, bias_, "silu")
        got = run("tests.lowering.delta_calls", "conv_update", x, w, pool, slots, bias, "silu")
        check(got, (want, pool_), dtype)
