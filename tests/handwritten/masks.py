"""Masks and biases as people write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

MASKS = Registry()
case = MASKS.case


def scores_of(q, k):
    return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])


def finish(scores, v):
    return torch.softmax(scores, dim=-1) @ v


def heads(d: Draw):
    return d.qkv(2, 6)


@case(mask="causal")
def triu_of_minus_infinity():
    def attend(q, k, v):
        sz = q.shape[-2]
        mask = torch.triu(torch.full((sz, sz), float("-inf"), dtype=q.dtype), diagonal=1)
        return finish(scores_of(q, k) + mask, v)

    return attend, heads


@case(mask="causal")
def tril_of_ones():
    def attend(q, k, v):
        n = q.size(2)
        keep = torch.ones(n, n).tril() == 1
        return finish(torch.where(keep, scores_of(q, k), torch.tensor(float("-inf"))), v)

    return attend, heads


@case(mask="causal")
def arange_comparison():
    def attend(q, k, v):
        i = torch.arange(q.shape[2]).view(-1, 1)
        j = torch.arange(k.shape[2]).view(1, -1)
        s = scores_of(q, k)
        return finish(s.masked_fill(i < j, torch.finfo(s.dtype).min), v)

    return attend, heads


@case(sites=None, mask=("causal", "dense"))
def multiplied_by_ten_thousand():
    # GPT-2's first TensorFlow port: s * m - 1e4 * (1 - m).
    def attend(q, k, v):
        n = q.shape[2]
        m = torch.tril(torch.ones(n, n, dtype=q.dtype))
        return finish(scores_of(q, k) * m - 1e4 * (1 - m), v)

    return attend, heads


@case(mask="causal")
def causal_at_the_bottom_right():
    def attend(q, k, v):
        i, j = q.shape[2], k.shape[2]
        mask = torch.ones((i, j), dtype=torch.bool).triu(j - i + 1)
        return finish(scores_of(q, k).masked_fill(mask, -torch.finfo(q.dtype).max), v)

    return attend, lambda d: (d.randn(d.B, 2, 5, 6), d.randn(d.B, 2, 12, 6), d.randn(d.B, 2, 12, 6))


@case(mask=("window", "dense"))
def anticausal():
    # Upside down: query 0 sees everything. A window that ends on the left, never causal.
    def attend(q, k, v):
        n = q.shape[2]
        return finish(scores_of(q, k).masked_fill(torch.ones(n, n, dtype=torch.bool).tril(-1), -math.inf), v)

    return attend, heads


@case(sites=1)
def additive_mask_argument():
    def inputs(d: Draw):
        mask = torch.zeros(d.B, 1, d.S, d.S).masked_fill(~d.bools(d.B, 1, d.S, d.S), -math.inf)
        mask[..., 0] = 0.0
        return *heads(d), mask.to(d.dtype)

    return lambda q, k, v, mask: finish(scores_of(q, k) + mask, v), inputs


@case(mask="dense")
def bool_mask_argument():
    def attend(q, k, v, mask):
        return finish(scores_of(q, k).masked_fill(~mask, -math.inf), v)

    return attend, lambda d: (*heads(d), d.bools(d.B, 1, d.S, d.S) | torch.eye(d.S, dtype=torch.bool))


def mask_with_an_empty_row(d: Draw):
    mask = d.bools(d.B, 1, d.S, d.S, keep=0.4)
    mask[0, 0, 2] = False
    return *heads(d), mask


@case(mask="dense")
def bool_mask_that_may_empty_a_row():
    # Rows with no key at all: NaN from softmax over -inf, and it must stay NaN.
    def attend(q, k, v, mask):
        return finish(torch.where(mask, scores_of(q, k), -math.inf), v)

    return attend, mask_with_an_empty_row


@case(mask="dense")
def empty_rows_with_the_least_number():
    # The same with finfo.min: the row becomes the mean of all values.
    def attend(q, k, v, mask):
        s = scores_of(q, k)
        return finish(s.masked_fill(mask.logical_not(), torch.finfo(s.dtype).min), v)

    return attend, mask_with_an_empty_row


@case(sites=1)
def key_padding_extended():
    # BERT's get_extended_attention_mask.
    def attend(q, k, v, attention_mask):
        extended = attention_mask[:, None, None, :].to(dtype=q.dtype)
        extended = (1.0 - extended) * torch.finfo(q.dtype).min
        return finish(scores_of(q, k) + extended, v)

    return attend, lambda d: (*heads(d), d.padding(d.B, d.S).long())


@case(mask="padding")
def key_padding_bool():
    def attend(q, k, v, key_padding_mask):
        return finish(scores_of(q, k).masked_fill(key_padding_mask[:, None, None], float("-inf")), v)

    return attend, lambda d: (*heads(d), ~d.padding(d.B, d.S))


@case(mask="padding")
def key_padding_int():
    def attend(q, k, v, mask):
        return finish(scores_of(q, k).masked_fill(mask.unsqueeze(1).unsqueeze(2) == 0, -1e9), v)

    return attend, lambda d: (*heads(d), d.padding(d.B, d.S).int())


@case(mask="causal+padding")
def causal_and_padding():
    def attend(q, k, v, attention_mask):
        n = q.shape[2]
        keep = torch.tril(torch.ones(n, n, dtype=torch.bool))[None, None]
        keep = keep & attention_mask[:, None, None, :].bool()
        return finish(scores_of(q, k).masked_fill(~keep, torch.finfo(q.dtype).min), v)

    return attend, lambda d: (*heads(d), d.padding(d.B, d.S, left=True).long())


@case(mask="causal+padding")
def causal_then_padding_filled_twice():
    def attend(q, k, v, pad):
        n = q.shape[2]
        s = scores_of(q, k).masked_fill(torch.triu(torch.ones(n, n), 1).bool(), float("-inf"))
        return finish(s.masked_fill(pad[:, None, None, :], float("-inf")), v)

    return attend, lambda d: (*heads(d), ~d.padding(d.B, d.S))


@case(mask="causal+packed")
def causal_and_packed():
    def attend(q, k, v, document):
        n = q.shape[2]
        same = document[:, None, :, None] == document[:, None, None, :]
        keep = same & (torch.arange(n)[:, None] >= torch.arange(n))
        return finish(scores_of(q, k).masked_fill(~keep, -math.inf), v)

    return attend, lambda d: (*heads(d), d.ints(0, 3, d.B, d.S).sort(-1).values)


@case(mask="window", window=3)
def sliding_window_by_arange():
    def attend(q, k, v):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
        keep = (distance >= 0) & (distance < 3)
        return finish(scores_of(q, k).masked_fill(~keep, -math.inf), v)

    return attend, heads


@case(mask="window", window=4)
def sliding_window_by_band():
    # mistral-src: tril, then triu(diagonal=-window), then log.
    def attend(q, k, v):
        n = q.shape[2]
        mask = torch.tril(torch.full((n, n), fill_value=1.0, dtype=q.dtype))
        mask = torch.log(torch.triu(mask, diagonal=-3))
        return finish(scores_of(q, k) + mask, v)

    return attend, heads


@case(mask="window")
def window_to_both_sides():
    def attend(q, k, v):
        position = torch.arange(q.shape[2])
        far = (position[:, None] - position[None]).abs() > 2
        return finish(scores_of(q, k).masked_fill(far, torch.finfo(q.dtype).min), v)

    return attend, heads


@case(mask="chunked")
def chunked_causal():
    def attend(q, k, v):
        t = torch.arange(q.shape[2])
        keep = (t[:, None] // 4 == t[None, :] // 4) & (t[:, None] >= t[None, :])
        return finish(torch.where(keep, scores_of(q, k), float("-inf")), v)

    return attend, heads


@case(mask="none")
def local_blocks():
    def attend(q, k, v):
        q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % 4)).unflatten(2, (-1, 4)) for x in (q, k, v))
        return finish(scores_of(q, k), v).flatten(2, 3)

    return attend, heads


@case(mask="dense")
def dilated():
    def attend(q, k, v):
        t = torch.arange(q.shape[2])
        distance = t[:, None] - t[None, :]
        return finish(scores_of(q, k).masked_fill((distance % 2 != 0) | (distance < 0), -math.inf), v)

    return attend, heads


@case(mask="dense")
def prefix_lm():
    def attend(q, k, v):
        t = torch.arange(q.shape[2])
        keep = (t[None, :] <= t[:, None]) | (t[None, :] < 3)
        return finish(scores_of(q, k).masked_fill(~keep, -math.inf), v)

    return attend, heads


@case(mask="causal", bias=True)
def alibi():
    def attend(q, k, v, slopes):
        t = torch.arange(q.shape[2])
        relative = (t[None, :] - t[:, None]).to(q.dtype)
        s = scores_of(q, k) + slopes[:, None, None] * relative
        return finish(s.masked_fill(relative > 0, -math.inf), v)

    return attend, lambda d: (*heads(d), torch.tensor([0.5, 0.25], dtype=d.dtype))


@case(mask="none", bias=True, scale=1.0)
def t5_relative_bias():
    class RelativeAttention(nn.Module):
        def __init__(self, dim=10, heads=2, buckets=8):
            super().__init__()
            self.relative_attention_bias = nn.Embedding(buckets, heads)
            self.qkv, self.heads, self.buckets = nn.Linear(dim, 3 * dim, bias=False), heads, buckets

        def forward(self, x):
            n = x.shape[1]
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            relative = torch.arange(n)[None, :] - torch.arange(n)[:, None]
            bucket = relative.clamp(-self.buckets // 2, self.buckets // 2 - 1) + self.buckets // 2
            position_bias = self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)
            scores = torch.matmul(q, k.transpose(3, 2))
            scores += position_bias
            w = F.softmax(scores.float(), dim=-1).type_as(scores)
            return torch.matmul(w, v).transpose(1, 2).flatten(2)

    return RelativeAttention(), lambda d: (d.randn(d.B, d.S, 10),)


@case(mask="causal", sinks=True)
def sinks_as_a_column():
    def attend(q, k, v, sinks):
        b, n = q.shape[0], q.shape[2]
        s = scores_of(q, k).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min)
        combined = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(b, -1, n, -1)], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ v

    return attend, lambda d: (*heads(d), d.randn(2))


@case(mask="none", sinks=True, form="exp")
def sinks_in_the_denominator():
    def attend(q, k, v, sinks):
        s = scores_of(q, k)
        sink = sinks[None, :, None, None]
        top = torch.maximum(s.amax(-1, keepdim=True), sink)
        e = torch.exp(s - top)
        return (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))) @ v

    return attend, lambda d: (*heads(d), d.randn(2))


@case(sites=None, mask="none")
def softmax_plus_one():
    # "Off by one": a sink whose logit is 0.
    def attend(q, k, v):
        e = torch.exp(scores_of(q, k))
        return (e / (1 + e.sum(dim=-1, keepdim=True))) @ v

    return attend, heads


@case(mask="causal", softcap=5.0)
def softcap():
    def attend(q, k, v):
        n = q.shape[2]
        s = scores_of(q, k)
        s = torch.tanh(s / 5.0) * 5.0
        return finish(s.masked_fill(torch.ones(n, n).triu(1) > 0, -2.3819763e38), v)

    return attend, heads
