"""The lowerings: which kernel runs a semantic op, here, at this shape, and why not the others."""

from . import attention, causal_conv1d, gated_delta_rule, mla

__all__ = ["attention", "causal_conv1d", "gated_delta_rule", "mla"]
