"""The patterns: one file a family, each stating its equation. Importing this package registers them."""

from . import attention, causal_conv1d, gated_delta_rule, mla, moe, mxfp4_linear, routing

__all__ = ["attention", "causal_conv1d", "gated_delta_rule", "mla", "moe", "mxfp4_linear", "routing"]
