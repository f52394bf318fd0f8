"""The semantic ops: what a subgraph *is*, before anyone asks which kernel runs it."""

from ._define import OPS, Cost, SemanticOp, define_custom_op, semantic_op
from .attention import attention
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_update, gated_delta_rule_verify
from .mla import mla
from .moe import moe, moe_route
from .mxfp4 import mxfp4_linear, mxfp4_weight

__all__ = [
    "OPS",
    "Cost",
    "SemanticOp",
    "attention",
    "causal_conv1d",
    "causal_conv1d_update",
    "define_custom_op",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_delta_rule_verify",
    "mla",
    "moe",
    "moe_route",
    "mxfp4_linear",
    "mxfp4_weight",
    "semantic_op",
]
