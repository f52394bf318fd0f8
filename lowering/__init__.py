"""The lowerings: which kernel runs a semantic op, here, at this shape, and why not the others."""

from . import attention, causal_conv1d, delta_kernels, flashinfer, gated_delta_rule, mla, moe, moe_kernels, mxfp4_linear

__all__ = [
    "attention", "causal_conv1d", "delta_kernels", "flashinfer", "gated_delta_rule", "mla", "moe", "moe_kernels",
    "mxfp4_linear",
]  # fmt: skip
