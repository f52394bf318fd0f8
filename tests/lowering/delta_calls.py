"""Calls of ops that write into their arguments, with what they wrote returned: the interpreter runs elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sm12x_compile.lowering.triton import causal_conv1d, delta_update
from sm12x_compile.lowering.triton.delta_tiles import StepTiles


def update(tiles: StepTiles, *args: Any) -> tuple[Tensor, Tensor]:
    """o and the pool; arguments as `sm12x::gated_delta_rule_update` has them."""
    return delta_update.run_update(tiles, *args), args[5]


def verify(tiles: StepTiles, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o, the pool and the journal; arguments as `sm12x::gated_delta_rule_verify` has them."""
    return delta_update.run_verify(tiles, *args), args[5], args[6]


def conv_update(*args: Any) -> tuple[Tensor, Tensor]:
    """y and the pool; arguments as `sm12x::causal_conv1d_update` has them."""
    return causal_conv1d.causal_conv1d_update(*args), args[2]
