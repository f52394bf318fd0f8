"""`sm12x::causal_conv1d` and `sm12x::causal_conv1d_update`: short depthwise convolutions that look back only.

For every batch b, channel c, position t (inputs before position 0 come from the state)::

    y[b,c,t] = activation(bias[c] + sum_i w[c,i] * x[b,c,t - (W - 1) + i])

The state of a sequence is its last L inputs, L >= W - 1: L = W - 1 is all that is needed, Hugging Face keeps
L = W. Source: Mamba (Gu and Dao, 2023), whose short convolution this is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_one_of, read_slots, wide_dtype, write_slots
from ._define import Cost, semantic_op

ACTIVATIONS = ("none", "silu")


def _convolve(context: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The op's equation on ``[context, x]``; the result has the positions of x."""
    C, W = w.shape
    wide = wide_dtype(x)
    inputs = torch.cat([context.to(wide), x.to(wide)], dim=-1)
    inputs = inputs[..., context.shape[-1] - (W - 1) :]
    y = F.conv1d(inputs, w.to(wide)[:, None], None if bias is None else bias.to(wide), groups=C)
    return torch.empty_like(x).copy_(F.silu(y) if activation == "silu" else y)


def _check(op: str, x: Tensor, w: Tensor, state: Tensor | None, activation: str) -> None:
    check_one_of(op, "activation", activation, ACTIVATIONS)
    C, W = w.shape
    if x.ndim != 3 or x.shape[1] != C:
        raise ValueError(f"sm12x::{op}: x {tuple(x.shape)} and w {tuple(w.shape)} do not fit")
    if state is not None and (state.ndim != 3 or state.shape[1] != C or state.shape[2] < W - 1):
        raise ValueError(f"sm12x::{op}: state {tuple(state.shape)}, need {C} channels of at least {W - 1}")


def causal_conv1d_fake(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    initial_state: Tensor | None = None,
    state_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    length: Any = w.shape[1] - 1 if initial_state is None else initial_state.shape[2]
    like = x if initial_state is None else initial_state
    final = like.new_empty((x.shape[0], x.shape[1], length if state_len is None else state_len))
    return torch.empty_like(x), final


def causal_conv1d_cost(a: dict[str, Any]) -> Cost:
    x, w = a["x"], a["w"]
    B, C, T = x.shape
    W = w.shape[1]
    moved = (2 * B * C * T + 2 * B * C * (W - 1)) * x.element_size() + C * W * w.element_size()
    return Cost(bytes=moved, flops=2.0 * B * C * T * W)


@semantic_op(fake=causal_conv1d_fake, cost=causal_conv1d_cost)
def causal_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    initial_state: Tensor | None = None,
    state_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of whole sequences, eager reference (fp32 inside; fp64 for fp64 inputs).

    Args:
        x: ``[B, C, T]``, any strides, floating point.
        w: ``[C, W]``.
        bias: ``[C]``.
        activation: ``none`` or ``silu``.
        initial_state: ``[B, C, L]``, ``L >= W - 1``: the inputs before x, the latest last; default zeros.
        state_len: length of the final state; default that of ``initial_state``, else ``W - 1``.

    Returns:
        y ``[B, C, T]`` in x's dtype and order of strides (channels last stay last), and the final state
        ``[B, C, state_len]``: the last inputs of ``[initial_state, x]``, zeros in front where there are fewer, in
        ``initial_state``'s dtype, else x's.

    Raises:
        ValueError: the shapes or ``activation`` are not as above.
    """
    _check("causal_conv1d", x, w, initial_state, activation)
    B, C, _ = x.shape
    if initial_state is not None and initial_state.shape[0] != B:
        raise ValueError(f"sm12x::causal_conv1d: initial_state for {initial_state.shape[0]} rows, x has {B}")
    W = w.shape[1]
    state = x.new_zeros((B, C, W - 1)) if initial_state is None else initial_state
    length = state.shape[2] if state_len is None else state_len
    history = torch.cat([state, x.to(state.dtype)], dim=-1)
    missing = max(0, length - history.shape[-1])
    final = F.pad(history, (missing, 0))[..., history.shape[-1] + missing - length :]
    return _convolve(state, x, w, bias, activation), final.clone(memory_format=torch.contiguous_format)


def causal_conv1d_update_fake(
    x: Tensor,
    w: Tensor,
    state_pool: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    return torch.empty_like(x)


def causal_conv1d_update_cost(a: dict[str, Any]) -> Cost:
    x, w, state_pool = a["x"], a["w"], a["state_pool"]
    B, C, S = x.shape
    W = w.shape[1]
    state = 2 * B * C * (W - 1) * state_pool.element_size()
    moved = 2 * B * C * S * x.element_size() + state + C * W * w.element_size()
    return Cost(bytes=moved, flops=2.0 * B * C * S * W)


@semantic_op(fake=causal_conv1d_update_fake, cost=causal_conv1d_update_cost, mutates=("state_pool",))
def causal_conv1d_update(
    x: Tensor,
    w: Tensor,
    state_pool: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """One or a few tokens against a pool of states, which is updated in place; eager reference.

    Args:
        x: ``[B, C, S]``, any strides, floating point.
        w: ``[C, W]``.
        state_pool: ``[P, C, L]``, ``L >= W - 1``: the last L inputs, newest last. **Mutated.**
        slots: int64 ``[B]``: where row b's state lies in the pool; no slot twice. Rows with a negative slot
            are skipped: their output is zero, no state changes.
        bias: ``[C]``.
        activation: ``none`` or ``silu``.

    Returns:
        y ``[B, C, S]`` in x's dtype and order of strides.

    Raises:
        ValueError: the shapes or ``activation`` are not as above.
    """
    _check("causal_conv1d_update", x, w, state_pool, activation)
    if slots.shape != x.shape[:1]:
        raise ValueError(f"sm12x::causal_conv1d_update: slots {tuple(slots.shape)} for {x.shape[0]} rows")
    state = read_slots(state_pool, slots)
    y = _convolve(state, x, w, bias, activation)
    write_slots(state_pool, slots, torch.cat([state, x.to(state_pool.dtype)], dim=-1)[..., x.shape[2] :])
    return y.masked_fill_((slots < 0)[:, None, None], 0.0)
