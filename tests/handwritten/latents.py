"""Latent attention as people write it: expanded at every step, absorbed by its author, with caches of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

LATENTS = Registry("mla")
case = LATENTS.case


def rotate(x, position):
    """Interleaved pairs as complex numbers."""
    half = x.shape[-1] // 2
    angle = position[:, None].double() * 10.0 ** -torch.arange(half, dtype=torch.float64)
    turned = torch.view_as_complex(x.double().unflatten(-1, (half, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@case(mask=("causal", "none"), form="expanded", latent=12, rope=4)
def latents_cached_by_cat():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wkv_a = nn.Linear(16, 4 * 12, bias=False), nn.Linear(16, 12 + 4, bias=False)
            self.kv_norm = nn.RMSNorm(12)
            self.wkv_b = nn.Linear(12, 4 * (8 + 6), bias=False)
            self.wo = nn.Linear(24, 16)

        def forward(self, x, kv_cache, pe_cache):
            bsz, seqlen, _ = x.shape
            start = kv_cache.shape[1]
            position = torch.arange(start, start + seqlen)
            q_nope, q_pe = self.wq(x).view(bsz, seqlen, 4, 12).split([8, 4], dim=-1)
            q_pe = rotate(q_pe.transpose(1, 2), position).transpose(1, 2)
            kv, k_pe = self.wkv_a(x).split([12, 4], dim=-1)
            kv_cache = torch.cat([kv_cache, self.kv_norm(kv)], dim=1)
            pe_cache = torch.cat([pe_cache, rotate(k_pe, position)], dim=1)
            q = torch.cat([q_nope, q_pe], dim=-1)
            k_nope, v = self.wkv_b(kv_cache).view(bsz, -1, 4, 14).split([8, 6], dim=-1)
            k = torch.cat([k_nope, pe_cache[:, :, None].expand(-1, -1, 4, -1)], dim=-1)
            scores = torch.einsum("bshd,bthd->bsht", q, k) * 12**-0.5
            late = torch.arange(start + seqlen) > position[:, None]
            scores = scores.masked_fill(late[None, :, None], float("-inf"))
            out = torch.einsum("bsht,bthd->bshd", scores.softmax(dim=-1), v)
            return self.wo(out.flatten(2)), kv_cache, pe_cache

    def inputs(d: Draw):
        return [(d.randn(d.B, n, 16), d.randn(d.B, t, 12), d.randn(d.B, t, 4)) for n, t in ((5, 3), (1, 8), (1, 9))]

    return Attention(), inputs


@case(mask=("causal", "length"), form="absorbed", latent=12, rope=4)
def absorbed_by_the_author():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wkv_a = nn.Linear(16, 4 * 12, bias=False), nn.Linear(16, 12 + 4, bias=False)
            self.wkv_b = nn.Linear(12, 4 * (8 + 6), bias=False)
            self.register_buffer("kv_cache", torch.zeros(2, 16, 12), persistent=False)
            self.register_buffer("pe_cache", torch.zeros(2, 16, 4), persistent=False)

        def forward(self, x, start):
            bsz, seqlen, _ = x.shape
            position = start + torch.arange(seqlen)
            q_nope, q_pe = self.wq(x).view(bsz, seqlen, 4, 12).split([8, 4], dim=-1)
            kv, k_pe = self.wkv_a(x).split([12, 4], dim=-1)
            self.kv_cache[:bsz].index_copy_(1, position, kv)
            self.pe_cache[:bsz].index_copy_(1, position, k_pe)
            wkv_b = self.wkv_b.weight.view(4, 14, 12)
            q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :8])
            scores = (
                torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:bsz])
                + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:bsz])
            ) * 12**-0.5
            late = torch.arange(16) > position[:, None]
            scores = scores.masked_fill(late[None, :, None], float("-inf")).softmax(dim=-1)
            x = torch.einsum("bsht,btc->bshc", scores, self.kv_cache[:bsz])
            return torch.einsum("bshc,hdc->bshd", x, wkv_b[:, -6:]).flatten(2)

    def inputs(d: Draw):
        return [(d.randn(d.B, n, 16), torch.tensor(t)) for n, t in ((5, 0), (1, 5), (1, 6))]

    return Attention(), inputs


@case(mask="padding", form="joined", latent=12, rope=4)
def one_cache_for_both_parts():
    def decode(q, cache, alive):
        scores = q @ cache[:, None].mT * 0.3
        weights = scores.masked_fill(~alive[:, None, None], float("-inf")).softmax(-1)
        return weights @ cache[:, None, :, :12]

    return decode, lambda d: (d.randn(d.B, 8, 1, 16), d.randn(d.B, d.T, 16), d.padding(d.B, d.T))


@case(mask="none", form="joined", latent=12, rope=4)
def rotary_part_first():
    def decode(q, cache):
        return F.scaled_dot_product_attention(q, *(c[:, None].expand(-1, 8, -1, -1) for c in (cache, cache[..., 4:])))

    return decode, lambda d: (d.randn(d.B, 8, 1, 16), d.randn(d.B, d.T, 16))


@case(mask="causal", form="expanded", latent=6, rope=None)
def no_rotary_part():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.down = nn.Linear(16, 4 * 8), nn.Linear(16, 6)
            self.up_k, self.up_v = nn.Linear(6, 4 * 8, bias=False), nn.Linear(6, 4 * 8, bias=False)

        def forward(self, x):
            c = F.silu(self.down(x))
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (self.q(x), self.up_k(c), self.up_v(c)))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Attention(), lambda d: (d.randn(d.B, d.S, 16),)


@case(mask="none", form="expanded", latent=10, rope=4)
def projections_by_einsum():
    def attend(q, latent, k_rope, w_k, w_v):
        k = torch.einsum("btl,hln->bhtn", latent, w_k)
        v = torch.einsum("hlv,btl->bhtv", w_v, latent)
        k = torch.cat((k_rope[:, None].expand(-1, 3, -1, -1), k), dim=-1)  # rotary part first
        return (torch.einsum("bhsd,bhtd->bhst", q, k) / 12**0.5).softmax(-1) @ v

    def inputs(d: Draw):
        shapes = (d.B, 3, d.S, 12), (d.B, d.T, 10), (d.B, d.T, 4), (3, 10, 8), (3, 10, 5)
        return tuple(d.randn(*s) for s in shapes)

    return attend, inputs


@case(mask="length", form="expanded", latent=10, rope=4, groups=2)
def grouped_heads_and_a_static_cache():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8 + 5, 10) * 0.3)

        def forward(self, q, cache, rope_cache, new, new_rope, length):
            cache = cache.index_copy(1, length - 1, new)
            rope_cache = rope_cache.index_copy(1, length - 1, new_rope)
            both = cache[:, None] @ self.up.mT
            k, v = both[..., :8], both[..., 8:]
            k = torch.cat((k, rope_cache[:, None].expand(-1, 3, -1, -1)), dim=-1).repeat_interleave(2, dim=1)
            keep = torch.arange(cache.shape[1]) < length
            return F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, dim=1), attn_mask=keep[None])

    def inputs(d: Draw):
        shapes = (d.B, 6, 1, 12), (d.B, 16, 10), (d.B, 16, 4), (d.B, 1, 10), (d.B, 1, 4)
        return [(*(d.randn(*s) for s in shapes), torch.tensor([t])) for t in (5, 6)]

    return Attention(), inputs


@case(mask="none", form="expanded", latent=10, rope=4)
def biased_projections_and_keys_written_in_parts():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_k, self.up_v = nn.Linear(10, 3 * 8), nn.Linear(10, 3 * 5)

        def forward(self, q, latent, k_rope):
            B, T, _ = latent.shape
            k = q.new_empty(B, 3, T, 12)
            k[..., :8] = self.up_k(latent).view(B, T, 3, 8).transpose(1, 2)
            k[..., 8:] = k_rope.unsqueeze(1)
            v = self.up_v(latent).view(B, T, 3, 5).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, scale=0.25)

    return Attention(), lambda d: (d.randn(d.B, 3, d.S, 12), d.randn(d.B, d.T, 10), d.randn(d.B, d.T, 4))


@case(mask="packed", form="expanded", latent=10, rope=4)
def packed_sequences_without_a_batch():
    def attend(q, latent, k_rope, w, document):
        T = latent.shape[0]
        k, v = (latent @ w).view(T, 3, 13).split([8, 5], -1)
        k = torch.cat([k, k_rope[:, None].expand(T, 3, 4)], -1)
        scores = torch.einsum("shd,thd->hst", q, k) * 0.3
        same = document[:, None] == document[None]
        return torch.einsum("hst,thv->shv", torch.where(same, scores, float("-inf")).softmax(-1), v).flatten(1)

    def inputs(d: Draw):
        document = torch.arange(d.T).ge(d.T // 3).long() + torch.arange(d.T).ge(d.T // 2).long()
        return (*(d.randn(*s) for s in ((d.T, 3, 12), (d.T, 10), (d.T, 4), (10, 39))), document)

    return attend, inputs


@case(mask="causal", form="expanded", latent=10, rope=4)
def half_split_rotary_shared_by_heads():
    def attend(q, latent, k_pe, w, cos, sin):
        B, S = latent.shape[:2]

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q = torch.cat((q[..., :8], turn(q[..., 8:])), -1)
        kv = F.linear(latent, w).view(B, S, 3, 13).permute(0, 2, 1, 3)
        k = torch.cat((kv[..., :8], turn(k_pe)[:, None].repeat(1, 3, 1, 1)), -1)
        mask = torch.full((S, S), float("-inf"), dtype=q.dtype).triu(1)
        return ((q @ k.mT) * 12**-0.5 + mask).softmax(-1) @ kv[..., 8:]

    def inputs(d: Draw):
        shapes = (d.B, 3, d.S, 12), (d.B, d.S, 10), (d.B, d.S, 4), (39, 10), (d.S, 2), (d.S, 2)
        return tuple(d.randn(*s) for s in shapes)

    return attend, inputs


# ------------------------------------------------------------ not latent attention, or not quite


@case(sites=0)
def values_of_another_latent():
    def attend(q, a, b, k_rope, w_k, w_v):
        k = torch.cat([torch.einsum("btl,hln->bhtn", a, w_k), k_rope[:, None].expand(-1, 3, -1, -1)], -1)
        return F.scaled_dot_product_attention(q, k, torch.einsum("btl,hlv->bhtv", b, w_v))

    def inputs(d: Draw):
        shapes = (d.B, 3, d.S, 12), (d.B, d.T, 10), (d.B, d.T, 10), (d.B, d.T, 4), (3, 10, 8), (3, 10, 5)
        return tuple(d.randn(*s) for s in shapes)

    return attend, inputs


@case(sites=0)
def a_softcap_around_one_of_two_products():
    def attend(q, q_rope, latent, k_rope):
        capped = 2.0 * torch.tanh(torch.einsum("bhsl,btl->bhst", q, latent) / 2.0)
        scores = capped + torch.einsum("bhsr,btr->bhst", q_rope, k_rope)
        return torch.einsum("bhst,btl->bhsl", scores.softmax(-1), latent)

    return attend, lambda d: tuple(
        d.randn(*s) for s in ((d.B, 3, d.S, 10), (d.B, 3, d.S, 4), (d.B, d.T, 10), (d.B, d.T, 4))
    )


@case(sites=0)
def rotary_part_of_every_head():
    def attend(q, latent, k_rope, w_k, w_v):
        k = torch.cat([torch.einsum("btl,hln->bhtn", latent, w_k), k_rope], -1)
        return F.scaled_dot_product_attention(q, k, torch.einsum("btl,hlv->bhtv", latent, w_v))

    def inputs(d: Draw):
        shapes = (d.B, 3, d.S, 12), (d.B, d.T, 10), (d.B, 3, d.T, 4), (3, 10, 8), (3, 10, 5)
        return tuple(d.randn(*s) for s in shapes)

    return attend, inputs


@case(sites=0)
def ordinary_projections_of_hidden_states():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    return Attention(), lambda d: (d.randn(d.B, d.S, 16),)


@case(refused=True)
def expanded_keys_in_the_cache():
    def attend(q, latent, k_rope, w, k_cache, v_cache):
        k, v = (latent @ w).unflatten(-1, (3, 13)).transpose(1, 2).split([8, 5], -1)
        k = torch.cat([k, k_rope[:, None].expand(-1, 3, -1, -1)], -1)
        k, v = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
        return F.scaled_dot_product_attention(q, k, v)

    def inputs(d: Draw):
        shapes = (d.B, 3, 1, 12), (d.B, 1, 10), (d.B, 1, 4), (10, 39), (d.B, 3, d.T, 12), (d.B, 3, d.T, 5)
        return tuple(d.randn(*s) for s in shapes)

    return attend, inputs
