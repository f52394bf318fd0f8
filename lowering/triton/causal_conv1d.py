"""`sm12x::causal_conv1d` and `sm12x::causal_conv1d_update` in Triton: one launch, states in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import device_guard

UPDATE_CHANNELS = 128  # of a program of four warps


def causal_conv1d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "none", initial_state: Tensor | None = None,
    state_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sm12x::causal_conv1d`; see `sm12x_compile.ops.causal_conv1d` for the arguments.

    Returns:
        y in x's order of strides, and the final state.

    Raises:
        ValueError: the shapes do not fit.
    """
    from .conv_kernel import conv_kernel

    y, final, arguments, grid = conv_launch(x, w, bias, activation, initial_state, state_len)
    if all(grid):
        with device_guard(y):
            conv_kernel[grid](**arguments, num_warps=4)
    return y, final


def conv_launch(
    x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "none", initial_state: Tensor | None = None,
    state_len: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any], tuple[int, int, int]]:  # fmt: skip
    """Storage of the results, the kernel's arguments by name, and its grid."""
    B, C, T = x.shape
    W = w.shape[1]
    if w.shape[0] != C or (initial_state is not None and initial_state.shape[:2] != (B, C)):
        raise ValueError(f"x {tuple(x.shape)}, w {tuple(w.shape)} and the initial state do not fit")
    length = W - 1 if initial_state is None else initial_state.shape[2]
    if length < W - 1:
        raise ValueError(f"a state of {length} inputs for a convolution of {W}")
    y = torch.empty_like(x)
    like = x if initial_state is None else initial_state
    final = like.new_empty((B, C, length if state_len is None else state_len))
    channels_last = x.stride(1) == 1
    a = _operands(x, w, bias, activation, y) | dict(
        state=initial_state, final=final, T=T, LENGTH=length, FINAL=final.shape[2],
        BLOCK_C=32 if channels_last else 4, BLOCK_T=64 if channels_last else 256,
    )  # fmt: skip
    start = (None,) * 3 if initial_state is None else initial_state.stride()
    a |= zip(("stride_sb", "stride_sc", "stride_sl"), start, strict=True)
    return y, final, a, (max(1, -(-T // a["BLOCK_T"])), -(-C // a["BLOCK_C"]), B)


def causal_conv1d_update(
    x: Tensor, w: Tensor, state_pool: Tensor, slots: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:  # fmt: skip
    """`sm12x::causal_conv1d_update`; see `sm12x_compile.ops.causal_conv1d` for the arguments.

    Returns:
        y in x's order of strides.

    Raises:
        ValueError: the shapes do not fit.
    """
    from .conv_kernel import conv_update_kernel

    y, arguments, grid = conv_update_launch(x, w, state_pool, slots, bias, activation)
    if all(grid) and x.shape[2]:
        with device_guard(y):
            conv_update_kernel[grid](**arguments, num_warps=UPDATE_CHANNELS // 32)
    return y


def conv_update_launch(
    x: Tensor, w: Tensor, state_pool: Tensor, slots: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> tuple[Tensor, dict[str, Any], tuple[int, int]]:  # fmt: skip
    """Storage of y, the kernel's arguments by name, and its grid."""
    B, C, S = x.shape
    W = w.shape[1]
    if w.shape[0] != C or state_pool.shape[1] != C or state_pool.shape[2] < W - 1 or slots.shape != (B,):
        raise ValueError(
            f"x {tuple(x.shape)}, w {tuple(w.shape)}, state_pool {tuple(state_pool.shape)} and slots "
            f"{tuple(slots.shape)} do not fit"
        )
    y = torch.empty_like(x)
    a = _operands(x, w, bias, activation, y) | dict(
        pool=state_pool, slots=slots, stride_slot=slots.stride(0), TOKENS=S, LENGTH=state_pool.shape[2],
        BLOCK_C=UPDATE_CHANNELS,
    )  # fmt: skip
    a |= zip(("stride_pp", "stride_pc", "stride_pl"), state_pool.stride(), strict=True)
    return y, a, (-(-C // UPDATE_CHANNELS), B)


def _operands(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, y: Tensor) -> dict[str, Any]:
    if activation not in ("none", "silu"):
        raise ValueError(f"activation={activation!r}, not 'none' or 'silu'")
    a: dict[str, Any] = dict(x=x, w=w, bias=bias, y=y, C=x.shape[1], WIDTH=w.shape[1], SILU=activation == "silu")
    a["stride_bias"] = None if bias is None else bias.stride(0)
    a |= zip(("stride_xb", "stride_xc", "stride_xt"), x.stride(), strict=True)
    a |= zip(("stride_wc", "stride_wi"), w.stride(), strict=True)
    a |= zip(("stride_yb", "stride_yc", "stride_yt"), y.stride(), strict=True)
    return a
