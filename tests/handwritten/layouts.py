"""Attentions in many layouts: grouped heads, no batch, packed tokens, fused projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

LAYOUTS = Registry()
case = LAYOUTS.case


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def grouped(d: Draw):
    return d.qkv(6, 5, Hkv=2)


@case(mask="none", groups=3)
def gqa_repeat_interleave():
    def attend(q, k, v):
        return softmax_attention(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1))

    return attend, grouped


@case(mask="none", groups=3)
def gqa_expand_reshape():
    def repeat_kv(x, n_rep):
        batch, num_kv, slen, head_dim = x.shape
        x = x[:, :, None].expand(batch, num_kv, n_rep, slen, head_dim)
        return x.reshape(batch, num_kv * n_rep, slen, head_dim)

    return lambda q, k, v: softmax_attention(q, repeat_kv(k, 3), repeat_kv(v, 3)), grouped


@case(mask="none", groups=3)
def gqa_group_axis_in_einsum():
    def attend(q, k, v):
        b, h, n, d = q.shape
        q = q.view(b, 2, h // 2, n, d).transpose(1, 2)
        scores = torch.einsum("bghnd,bhsd->bghns", q, k) / d**0.5
        out = torch.einsum("bghns,bhsd->bghnd", F.softmax(scores, dim=-1), v)
        return out.transpose(1, 2).reshape(b, h, n, d)

    return attend, grouped


@case(mask="none", groups=3)
def gqa_view_of_query():
    def attend(q, k, v):
        b, h, n, d = q.shape
        out = softmax_attention(q.view(b, 2, 3, n, d), k.unsqueeze(2), v.unsqueeze(2))
        return out.view(b, h, n, d)

    return attend, grouped


@case(mask="none")
def gqa_queries_of_a_group_as_rows():
    def attend(q, k, v):
        b, h, n, d = q.shape
        return softmax_attention(q.reshape(b, 2, 3 * n, d), k, v).reshape(b, h, n, d)

    # A group's queries become rows of the kv head's own attention: "no groups" says the same.
    return attend, grouped


@case(mask="none", groups=4)
def mqa_broadcast():
    return softmax_attention, lambda d: d.qkv(4, 5, Hkv=1)


@case(mask="none", groups=4)
def mqa_einsum_without_head_axis():
    def attend(q, k, v):
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k) * 0.4
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        return torch.einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)

    return attend, lambda d: (d.randn(d.B, 4, d.S, 5), d.randn(d.B, d.T, 5), d.randn(d.B, d.T, 5))


@case(sites=None, mask="none")
def gqa_repeat_whole():
    # Head h reads kv head h % Hkv, not h // G: a wrong head map if taken for repeat_interleave.
    return lambda q, k, v: softmax_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)), grouped


@case(sites=None, mask="none")
def keys_grouped_values_not():
    return lambda q, k, v: softmax_attention(q, k.repeat_interleave(2, 1), v), lambda d: (
        d.randn(d.B, 4, d.S, 5), d.randn(d.B, 2, d.S, 5), d.randn(d.B, 4, d.S, 5),
    )  # fmt: skip


@case(mask="none")
def cross_attention():
    class CrossAttention(nn.Module):
        def __init__(self, query_dim=15, context_dim=10, heads=3, dim_head=4):
            super().__init__()
            inner = heads * dim_head
            self.heads, self.scale = heads, dim_head**-0.5
            self.to_q = nn.Linear(query_dim, inner, bias=False)
            self.to_k = nn.Linear(context_dim, inner, bias=False)
            self.to_v = nn.Linear(context_dim, inner, bias=False)
            self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.1))

        def to_batch(self, t):
            b, n, _ = t.shape
            return t.reshape(b, n, self.heads, -1).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

        def forward(self, x, context):
            q, k, v = map(self.to_batch, (self.to_q(x), self.to_k(context), self.to_v(context)))
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
            out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
            out = out.reshape(x.shape[0], self.heads, -1, out.shape[-1]).permute(0, 2, 1, 3).flatten(2)
            return self.to_out(out)

    return CrossAttention(), lambda d: (d.randn(d.B, d.S, 15), d.randn(d.B, d.T, 10))


@case(mask="none")
def no_batch_tokens_first():
    def attend(q, k, v):
        w = torch.einsum("qhd,khd->hqk", q, k).mul(0.3).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", w, v)

    return attend, lambda d: (d.randn(d.S, 3, 5), d.randn(d.T, 3, 5), d.randn(d.T, 3, 5))


@case(mask="none")
def no_batch_heads_first():
    return softmax_attention, lambda d: (d.randn(3, d.S, 5), d.randn(3, d.T, 5), d.randn(3, d.T, 5))


@case(mask="none")
def one_head_no_batch():
    return softmax_attention, lambda d: (d.randn(d.S, 5), d.randn(d.T, 5), d.randn(d.T, 4))


@case(mask=("packed", "dense"))
def packed_tokens_with_segments():
    def attend(q, k, v, segment):
        scores = torch.einsum("qhd,khd->hqk", q, k) / 5**0.5
        scores = scores.masked_fill(segment[:, None] != segment[None, :], float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    def inputs(d: Draw):
        n = d.B * d.S
        return (*(d.randn(n, 3, 5) for _ in range(3)), d.ints(0, 3, n).sort().values)

    return attend, inputs


@case(mask="none")
def fused_qkv_chunk():
    class Attention(nn.Module):
        def __init__(self, dim=18, heads=2, dim_head=5):
            super().__init__()
            self.heads, self.scale = heads, dim_head**-0.5
            self.attend = nn.Softmax(dim=-1)
            self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
            self.to_out = nn.Linear(heads * dim_head, dim)

        def forward(self, x):
            qkv = self.to_qkv(x).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
            attn = self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale)
            return self.to_out(torch.matmul(attn, v).transpose(1, 2).flatten(2))

    return Attention(), lambda d: (d.randn(d.B, d.S, 18),)


@case(mask="none")
def fused_qkv_interleaved_per_head():
    class NeoXLike(nn.Module):
        def __init__(self, hidden=18, heads=3):
            super().__init__()
            self.heads, self.size = heads, hidden // heads
            self.query_key_value = nn.Linear(hidden, 3 * hidden)

        def forward(self, hidden_states):
            qkv = self.query_key_value(hidden_states)
            qkv = qkv.view(*qkv.shape[:-1], self.heads, 3 * self.size)
            q, k, v = (qkv[..., i * self.size : (i + 1) * self.size].permute(0, 2, 1, 3) for i in range(3))
            return softmax_attention(q, k, v).permute(0, 2, 1, 3).flatten(2)

    return NeoXLike(), lambda d: (d.randn(d.B, d.S, 18),)


@case(mask="causal", groups=2)
def qk_norm_and_rope():
    class RopeAttention(nn.Module):
        def __init__(self, dim=24, heads=4, kv_heads=2):
            super().__init__()
            self.d = dim // heads
            self.q = nn.Linear(dim, dim)
            self.k, self.v = nn.Linear(dim, kv_heads * self.d), nn.Linear(dim, kv_heads * self.d)
            self.q_norm, self.k_norm = nn.RMSNorm(self.d), nn.RMSNorm(self.d)

        def rotate(self, x):
            half = x.shape[-1] // 2
            freq = 100.0 ** (-torch.arange(half, dtype=torch.float32) / half)
            angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * freq
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            a, b = x[..., :half], x[..., half:]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            n = x.shape[1]
            bias = torch.zeros(n, n, dtype=x.dtype)
            bias = bias.masked_fill(torch.ones(n, n, dtype=torch.bool).tril().logical_not(), float("-inf"))
            return ((q @ k.mT) * self.d**-0.5 + bias).softmax(-1) @ v

    return RopeAttention(), lambda d: (d.randn(d.B, d.S, 24),)


@case(mask="none")
def rope_with_complex_numbers():
    def rotate(x, freqs):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs[None, :, None]).flatten(3).type_as(x)

    def attend(q, k, v):
        angle = torch.outer(torch.arange(q.shape[1]), 1.0 / 50.0 ** (torch.arange(0, 6, 2) / 6))
        freqs = torch.polar(torch.ones_like(angle), angle)
        q, k = rotate(q, freqs).transpose(1, 2), rotate(k, freqs).transpose(1, 2)
        return softmax_attention(q, k, v.transpose(1, 2)).transpose(1, 2)

    return attend, lambda d: tuple(d.randn(d.B, d.S, 2, 6) for _ in range(3))


@case(mask="none")
def value_head_dim_differs():
    return softmax_attention, lambda d: d.qkv(3, 5, Dv=9)


@case(mask="none")
def scores_transposed():
    # scores[b, h, key, query]: softmax along dim 2, values contracted with it.
    def attend(q, k, v):
        scores = torch.einsum("bhkd,bhqd->bhkq", k, q) * 0.4
        return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(dim=2), v)

    return attend, lambda d: d.qkv(2, 5)


@case(mask="none")
def pooling_by_one_learned_query():
    class AttentionPool(nn.Module):
        def __init__(self, dim=12, heads=3):
            super().__init__()
            self.seed = nn.Parameter(torch.randn(1, heads, 1, dim // heads))
            self.kv, self.heads = nn.Linear(dim, 2 * dim), heads

        def forward(self, x):
            k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return softmax_attention(self.seed.expand(x.shape[0], -1, -1, -1), k, v).flatten(1)

    return AttentionPool(), lambda d: (d.randn(d.B, d.T, 12),)


@case(sites=2, mask="none")
def two_layers_sharing_code():
    class Layer(nn.Module):
        def __init__(self, dim=12):
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return x + softmax_attention(q, k, v).transpose(1, 2).flatten(2)

    return nn.Sequential(Layer(), Layer()), lambda d: (d.randn(d.B, d.S, 12),)
