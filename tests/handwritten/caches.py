"""Hand-rolled KV caches: grown by cat, preallocated, fused, circular; prefill and decode in a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

CACHES = Registry()
case = CACHES.case


def softmax_attention(q, k, v, keep=None):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def decode_steps(d: Draw, H: int = 2, D: int = 6, steps: int = 3, first: int = 0):
    """(q, k, v, position as a 0-d tensor) for tokens that come one by one."""
    return [(*(d.randn(d.B, H, 1, D) for _ in range(3)), torch.tensor(first + i)) for i in range(steps)]


@case(mask=("causal", "none"))
def cache_grown_by_cat():
    class Attention(nn.Module):
        def __init__(self, n_embd=12, n_head=2):
            super().__init__()
            self.n_head = n_head
            self.c_attn = nn.Linear(n_embd, 3 * n_embd)

        def forward(self, x, layer_past):
            q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
            k, v = torch.cat((layer_past[0], k), dim=-2), torch.cat((layer_past[1], v), dim=-2)
            nd, ns = q.shape[-2], k.shape[-2]
            i, j = torch.arange(nd)[:, None], torch.arange(ns)
            w = (q @ k.mT * 6**-0.5).masked_fill(i < j - ns + nd, float("-inf"))
            return torch.softmax(w, dim=-1) @ v, (k, v)

    def inputs(d: Draw):
        def past(t: int):
            return d.randn(d.B, 2, t, 6), d.randn(d.B, 2, t, 6)

        return [
            (d.randn(d.B, 5, 12), past(3)),
            (d.randn(d.B, 1, 12), past(8)),
            (d.randn(d.B, 1, 12), past(9)),
        ]

    return Attention(), inputs


@case(mask=("causal", "length", "none"))
def cache_sliced_at_a_python_position():
    # The way of llama's own generation code: write rows, attend to what is filled.
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache_k", torch.zeros(3, 16, 2, 6))
            self.register_buffer("cache_v", torch.zeros(3, 16, 2, 6))

        def forward(self, xq, xk, xv, start_pos):
            bsz, seqlen = xq.shape[:2]
            self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
            self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
            keys = self.cache_k[:bsz, : start_pos + seqlen].transpose(1, 2)
            values = self.cache_v[:bsz, : start_pos + seqlen].transpose(1, 2)
            mask = torch.full((seqlen, seqlen), float("-inf")).triu(diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos)), mask]).type_as(xq)
            scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / 6**0.5 + mask
            return (torch.softmax(scores.float(), dim=-1).type_as(xq) @ values).transpose(1, 2)

    def inputs(d: Draw):
        def tokens(n: int):
            return tuple(d.randn(d.B, n, 2, 6) for _ in range(3))

        return [(*tokens(5), 0), (*tokens(1), 5), (*tokens(1), 6)]

    return Attention(), inputs


@case(mask=("causal", "length"))
def cache_written_by_index_copy():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k_cache", torch.zeros(2, 2, 9, 6))
            self.register_buffer("v_cache", torch.zeros(2, 2, 9, 6))

        def forward(self, q, k, v, input_pos):
            position = input_pos.view(1)
            k_cache = self.k_cache.index_copy_(2, position, k)
            v_cache = self.v_cache.index_copy_(2, position, v)
            keep = torch.arange(9)[None, :] <= position[:, None]
            return softmax_attention(q, k_cache, v_cache, keep)

    return Cache(), lambda d: decode_steps(Draw(d.dtype, d.seed, B=2))


@case(mask=("causal", "dense", "padding"))
def cache_with_a_mask_table():
    # gpt-fast: the triangle is a buffer, its rows are picked by input_pos.
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("causal_mask", torch.tril(torch.ones(9, 9, dtype=torch.bool)))
            self.register_buffer("k_cache", torch.zeros(2, 2, 9, 6))
            self.register_buffer("v_cache", torch.zeros(2, 2, 9, 6))

        def forward(self, q, k, v, input_pos):
            mask = self.causal_mask[None, None, input_pos]
            self.k_cache[:, :, input_pos] = k
            self.v_cache[:, :, input_pos] = v
            return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)

    def inputs(d: Draw):
        def call(*position: int):
            return *(d.randn(2, 2, len(position), 6) for _ in range(3)), torch.tensor(position)

        return [call(0, 1, 2), call(3), call(4)]

    return Attention(), inputs


@case(mask="length")
def cache_with_a_length_mask():
    def decode(q, k, v, pos, k_cache, v_cache):
        k_cache[:, :, pos] = k[:, :, 0]
        v_cache[:, :, pos] = v[:, :, 0]
        keep = torch.arange(k_cache.shape[2]) < pos + 1
        return softmax_attention(q, k_cache, v_cache, keep)

    def inputs(d: Draw):
        k_cache, v_cache = d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6)
        return [(*step, k_cache.clone(), v_cache.clone()) for step in decode_steps(d, first=1)]

    return decode, inputs


@case(mask="length")
def lengths_differ_in_the_batch():
    def decode(q, k_cache, v_cache, lengths):
        keep = torch.arange(k_cache.shape[2])[None, :] < lengths[:, None]
        return softmax_attention(q, k_cache, v_cache, keep[:, None, None, :])

    def inputs(d: Draw):
        cache = d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6)
        return d.randn(d.B, 2, 1, 6), *cache, d.ints(1, d.T + 1, d.B)

    return decode, inputs


@case(mask="length")
def positions_differ_in_the_batch():
    def decode(q, k, v, k_cache, v_cache, positions):
        rows = torch.arange(q.shape[0])
        k_cache[rows, :, positions] = k[:, :, 0]
        v_cache[rows, :, positions] = v[:, :, 0]
        keep = torch.arange(k_cache.shape[2]) <= positions[:, None, None, None]
        return softmax_attention(q, k_cache, v_cache, keep)

    def inputs(d: Draw):
        step = tuple(d.randn(d.B, 2, 1, 6) for _ in range(3))
        return *step, d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6), d.ints(0, d.T, d.B)

    return decode, inputs


@case(mask=("length", "dense"))
def ring_buffer():
    class Ring(nn.Module):
        def __init__(self, window=4):
            super().__init__()
            self.window = window
            self.register_buffer("k_ring", torch.zeros(2, 2, window, 6))
            self.register_buffer("v_ring", torch.zeros(2, 2, window, 6))

        def forward(self, q, k, v, pos):
            slot = (pos % self.window).view(1)
            self.k_ring.index_copy_(2, slot, k)
            self.v_ring.index_copy_(2, slot, v)
            return softmax_attention(q, self.k_ring, self.v_ring, torch.arange(self.window) <= pos)

    return Ring(), lambda d: decode_steps(Draw(d.dtype, d.seed, B=2), steps=6)


@case(mask="length")
def keys_and_values_in_one_buffer():
    def decode(q, k, v, pos, kv):
        kv[0].index_copy_(2, pos.view(1), k)
        kv[1].index_copy_(2, pos.view(1), v)
        k, v = kv.unbind(0)
        return softmax_attention(q, k, v, torch.arange(kv.shape[3]) <= pos)

    def inputs(d: Draw):
        kv = d.randn(2, d.B, 2, d.T, 6)
        return [(*step, kv.clone()) for step in decode_steps(d, first=2)]

    return decode, inputs


@case(mask="none")
def cache_shifted_by_cat():
    # The window moves: the oldest key drops out, the buffer is overwritten as a whole.
    def decode(q, k, v, pos, k_cache, v_cache):
        keys = torch.cat((k_cache[:, :, 1:], k), dim=2)
        values = torch.cat((v_cache[:, :, 1:], v), dim=2)
        k_cache.copy_(keys)
        v_cache.copy_(values)
        return softmax_attention(q, keys, values)

    def inputs(d: Draw):
        k_cache, v_cache = d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6)
        return [(*step, k_cache.clone(), v_cache.clone()) for step in decode_steps(d)]

    return decode, inputs


@case(mask="none")
def cache_rolled():
    def decode(q, k, v, pos, k_cache, v_cache):
        k_cache = k_cache.roll(-1, dims=2)
        v_cache = v_cache.roll(-1, dims=2)
        k_cache[:, :, -1:] = k
        v_cache[:, :, -1:] = v
        return softmax_attention(q, k_cache, v_cache), k_cache, v_cache

    return decode, cache_shifted_by_cat()[1]


@case(mask="length", groups=2)
def grouped_decode_reads_the_cache_in_place():
    def decode(q, k_cache, v_cache, pos):
        k = k_cache.repeat_interleave(2, dim=1)
        v = v_cache.repeat_interleave(2, dim=1)
        return softmax_attention(q, k, v, torch.arange(k.shape[2])[None, None, None] <= pos)

    return decode, lambda d: (
        d.randn(d.B, 4, 1, 6), d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6), torch.tensor(d.T // 2),
    )  # fmt: skip


@case(mask="causal")
def several_tokens_at_a_tensor_offset():
    def attend(q, k_cache, v_cache, start):
        query = start + torch.arange(q.shape[2])
        keep = torch.arange(k_cache.shape[2])[None, :] <= query[:, None]
        return softmax_attention(q, k_cache, v_cache, keep)

    return attend, lambda d: (
        d.randn(d.B, 2, 3, 6), d.randn(d.B, 2, d.T, 6), d.randn(d.B, 2, d.T, 6), torch.tensor(2),
    )  # fmt: skip


@case(mask="none")
def beams_reordered():
    def attend(q, k, v, beam_idx):
        return softmax_attention(q, k.index_select(0, beam_idx), v.index_select(0, beam_idx))

    return attend, lambda d: (*d.qkv(2, 6), d.ints(0, d.B, d.B))


@case(mask=("length", "dense"))
def paged_cache_gathered():
    def attend(q, k_pages, v_pages, block_table, lengths):
        k, v = (pages[block_table].flatten(1, 2).transpose(1, 2) for pages in (k_pages, v_pages))
        keep = torch.arange(k.shape[2]) < lengths[:, None, None, None]
        return softmax_attention(q, k, v, keep)

    def inputs(d: Draw):
        pages = d.randn(5, 4, 2, 6), d.randn(5, 4, 2, 6)
        return d.randn(d.B, 2, 1, 6), *pages, d.ints(0, 5, d.B, 3), d.ints(1, 13, d.B)

    return attend, inputs


@case(mask="none")
def int8_cache():
    def attend(q, k_int, k_scale, v_int, v_scale):
        k, v = k_int.to(q.dtype) * k_scale, v_int.to(q.dtype) * v_scale
        return softmax_attention(q, k, v)

    def inputs(d: Draw):
        def quantised():
            return d.ints(-127, 128, d.B, 2, d.T, 6).to(torch.int8), d.randn(d.B, 2, d.T, 1).abs() / 64

        return d.randn(d.B, 2, d.S, 6), *quantised(), *quantised()

    return attend, inputs
