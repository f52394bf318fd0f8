"""Sizes, weights and inputs that hand-written mixtures of experts share."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  (defines an opaque grouped matmul for any dtype)
from torch import nn

from .cases import Draw

E, K, D, H = 4, 2, 16, 24


def weight(*shape):
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def grouped(rows, weights, ends):
    """Rows sorted by group times the group's matrix; PyTorch compiles its own for bf16 alone."""
    if rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weights, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)


def tokens(d: Draw):
    return (d.randn(d.B, d.S, D),)


def routed(d: Draw):
    """Tokens, distinct expert numbers and weights from outside of the graph."""
    T = d.B * d.S
    ids = torch.rand(T, E, generator=d.generator).topk(K).indices
    return d.randn(T, D), ids, d.randn(T, K).softmax(-1)
