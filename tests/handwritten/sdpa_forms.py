"""`F.scaled_dot_product_attention` in all its argument forms, and the modules of torch that end in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

SDPA_FORMS = Registry()
case = SDPA_FORMS.case
sdpa = F.scaled_dot_product_attention


def heads(d: Draw):
    return d.qkv(4, 6)


def cross(d: Draw):
    return d.randn(d.B, 4, d.S, 6), d.randn(d.B, 4, d.T, 6), d.randn(d.B, 4, d.T, 5)


@case(mask="none", form="sdpa")
def plain():
    return lambda q, k, v: sdpa(q, k, v), heads


@case(mask="causal", form="sdpa")
def causal_flag():
    return lambda q, k, v: sdpa(q, k, v, is_causal=True), heads


@case(mask="causal")
def is_causal_top_left():
    # S != T: torch aligns the triangle at the top left.
    return lambda q, k, v: sdpa(q, k, v, is_causal=True), cross


@case(mask="causal")
def is_causal_more_queries_than_keys():
    return lambda q, k, v: sdpa(q, k, v, is_causal=True), lambda d: (
        d.randn(d.B, 4, d.T, 6), d.randn(d.B, 4, 5, 6), d.randn(d.B, 4, 5, 6),
    )  # fmt: skip


@case(mask="none", scale=0.7)
def scale_given():
    return lambda q, k, v: sdpa(q, k, v, scale=0.7), cross


@case(sites=None, mask="none", scale=-0.5)
def scale_negative():
    return lambda q, k, v: sdpa(q, k, v, None, 0.0, False, scale=-0.5), cross


@case(mask="causal", groups=2)
def grouped_flag():
    return lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), lambda d: d.qkv(4, 6, Hkv=2)


@case(mask="none")
def enable_gqa_without_groups():
    return lambda q, k, v: sdpa(q, k, v, enable_gqa=True), heads


@case(mask="dense")
def bool_mask():
    return lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), lambda d: (*cross(d), d.bools(d.B, 1, d.S, d.T))


@case(mask="dense")
def bool_mask_with_empty_rows():
    # SDPA gives zero, not NaN, for a row without keys.
    def inputs(d: Draw):
        mask = d.bools(d.S, d.T)
        mask[1] = False
        return *cross(d), mask

    return lambda q, k, v, m: sdpa(q, k, v, m), inputs


@case(sites=1)
def float_mask():
    return lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), lambda d: (*cross(d), d.randn(d.B, 4, d.S, d.T))


@case(sites=1)
def float_mask_with_minus_infinity():
    def inputs(d: Draw):
        mask = torch.zeros(d.S, d.T).masked_fill(~d.bools(d.S, d.T), float("-inf"))
        mask[2] = float("-inf")
        return *cross(d), mask.to(d.dtype)

    return lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), inputs


@case(mask="padding")
def padding_mask():
    return lambda q, k, v, m: sdpa(q, k, v, attn_mask=m[:, None, None, :]), lambda d: (
        *cross(d),
        d.padding(d.B, d.T),
    )


@case(mask="causal+padding")
def causal_and_padding_mask():
    def attend(q, k, v, m):
        n = q.shape[2]
        keep = torch.ones(n, n, dtype=torch.bool).tril() & m[:, None, None, :]
        return sdpa(q, k, v, attn_mask=keep)

    return attend, lambda d: (*heads(d), d.padding(d.B, d.S, left=True))


@case(mask="window", window=3)
def window_as_bool_mask():
    def attend(q, k, v):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        return sdpa(q, k, v, attn_mask=torch.logical_and(distance >= 0, distance <= 2))

    return attend, heads


@case(sites=1)
def mask_of_one_row():
    return lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), lambda d: (
        *cross(d),
        d.bools(1, d.T) | (torch.arange(d.T) == 0),
    )


@case(mask="none")
def three_dimensions():
    return lambda q, k, v: sdpa(q, k, v), lambda d: tuple(x.flatten(0, 1) for x in cross(d))


@case(mask="none")
def two_dimensions():
    return lambda q, k, v: sdpa(q, k, v), lambda d: tuple(x[0, 0] for x in cross(d))


@case(mask="causal")
def five_dimensions():
    return lambda q, k, v: sdpa(q, k, v, is_causal=True), lambda d: tuple(
        d.randn(d.B, 2, 3, d.S, 4) for _ in range(3)
    )


@case(mask="none")
def batch_of_one_broadcast():
    return lambda q, k, v: sdpa(q, k, v), lambda d: (
        d.randn(d.B, 2, d.S, 4),
        d.randn(1, 2, d.T, 4),
        d.randn(1, 2, d.T, 4),
    )


@case(mask="none")
def dropout_of_zero():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.out = 0.2, nn.Linear(6, 6)

        def forward(self, q, k, v):
            return self.out(sdpa(q, k, v, dropout_p=self.p if self.training else 0.0))

    return Attention(), heads


@case(mask="none")
def multihead_attention():
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    return attention_without_weights(attention), lambda d: (d.randn(d.B, d.S, 12), d.randn(d.B, d.T, 12))


def attention_without_weights(attention):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x, memory):
            return self.attention(x, memory, memory, need_weights=False)[0]

    return Block()


@case(sites=1)
def multihead_attention_with_masks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=10, bias=False)

        def forward(self, x, key, value, padding):
            mask = torch.ones(x.shape[0], key.shape[0], dtype=torch.bool).triu(1)
            out, _ = self.attention(x, key, value, padding, need_weights=False, attn_mask=mask)
            return out

    return Block(), lambda d: (
        d.randn(d.S, d.B, 12), d.randn(d.T, d.B, 8), d.randn(d.T, d.B, 10), ~d.padding(d.B, d.T),
    )  # fmt: skip


@case(sites=None)
def multihead_attention_weights_thrown_away():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(
                12, 3, add_bias_kv=True, add_zero_attn=True, batch_first=True
            )

        def forward(self, x):
            return self.attention(x, x, x)[0]

    return Block(), lambda d: (d.randn(d.B, d.S, 12),)


@case(sites=None)
def transformer_encoder_layer():
    # Without gradients torch takes its own fused fast path here, which holds no SDPA.
    return nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), lambda d: (d.randn(d.B, d.S, 12),)


@case(sites=2)
def transformer_decoder_layer():
    return nn.TransformerDecoderLayer(12, 3, 16, batch_first=True), lambda d: (
        d.randn(d.B, d.S, 12), d.randn(d.B, d.T, 12),
    )  # fmt: skip
