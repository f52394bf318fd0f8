"""Attentions as people write them: the place of the scale, the scores, the spelling of softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

ATTENTIONS = Registry()
case = ATTENTIONS.case


@case(mask=("dense", "causal"), form="softmax")
def nanogpt():
    # A triangle kept as a buffer is data: it can be overwritten, so "causal" would need a proof.
    class CausalSelfAttention(nn.Module):
        def __init__(self, n_embd=24, n_head=4, block_size=32):
            super().__init__()
            self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
            self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
            self.attn_dropout = nn.Dropout(0.1)
            self.n_head, self.n_embd = n_head, n_embd
            triangle = torch.tril(torch.ones(block_size, block_size))
            self.register_buffer("bias", triangle.view(1, 1, block_size, block_size))

        def forward(self, x):
            B, T, C = x.size()
            q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
            k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
            return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    return CausalSelfAttention(), lambda d: (d.randn(d.B, d.S, 24),)


@case(mask="causal", form="softmax")
def annotated_transformer():
    def attention(query, key, value, mask=None, dropout=None):
        d_k = query.size(-1)
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = scores.softmax(dim=-1)
        if dropout is not None:
            p_attn = dropout(p_attn)
        return torch.matmul(p_attn, value)

    class MultiHeadedAttention(nn.Module):
        def __init__(self, h=3, d_model=21, dropout=0.1):
            super().__init__()
            self.d_k, self.h = d_model // h, h
            self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(4)])
            self.dropout = nn.Dropout(p=dropout)

        def forward(self, query, key, value):
            nbatches, length = query.size(0), query.size(1)
            mask = torch.triu(torch.ones(1, 1, length, length), diagonal=1).type(torch.uint8) == 0
            query, key, value = [
                lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
                for lin, x in zip(self.linears, (query, key, value), strict=False)
            ]
            x = attention(query, key, value, mask=mask, dropout=self.dropout)
            x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
            return self.linears[-1](x)

    def inputs(d: Draw):
        x = d.randn(d.B, d.S, 21)
        return x, x, x

    return MultiHeadedAttention(), inputs


@case(mask="none", form="softmax")
def einsum_heads_first():
    def attend(q, k, v):
        sim = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bhkd->bhqd", sim.softmax(dim=-1), v)

    return attend, lambda d: d.qkv(3, 5)


@case(mask="none")
def einsum_tokens_first():
    def attend(q, k, v):
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 5**0.5, -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    return attend, lambda d: (d.randn(d.B, d.S, 3, 5), d.randn(d.B, d.T, 3, 5), d.randn(d.B, d.T, 3, 5))


@case(mask="window", window=4, sinks=True, groups=2)
def einsum_no_batch_sinks():
    # The layout of OpenAI's gpt-oss reference: [tokens, kv heads, group, head_dim], sinks as an extra column.
    def sdpa(Q, K, V, S, sm_scale, sliding_window):
        n_tokens, n_heads, q_mult, _ = Q.shape
        K = K[:, :, None, :].expand(-1, -1, q_mult, -1)
        V = V[:, :, None, :].expand(-1, -1, q_mult, -1)
        S = S.reshape(n_heads, q_mult, 1, 1).expand(-1, -1, n_tokens, -1)
        mask = torch.triu(Q.new_full((n_tokens, n_tokens), -float("inf")), diagonal=1)
        mask += torch.tril(mask.new_full((n_tokens, n_tokens), -float("inf")), diagonal=-sliding_window)
        QK = torch.einsum("qhmd,khmd->hmqk", Q, K)
        QK *= sm_scale
        QK += mask[None, None, :, :]
        QK = torch.cat([QK, S], dim=-1)
        W = torch.softmax(QK, dim=-1)[..., :-1]
        attn = torch.einsum("hmqk,khmd->qhmd", W, V)
        return attn.reshape(n_tokens, -1)

    return (
        lambda q, k, v, s: sdpa(q, k, v, s, 1 / math.sqrt(6), 4),
        lambda d: (d.randn(d.T, 2, 2, 6), d.randn(d.T, 2, 6), d.randn(d.T, 2, 6), d.randn(4)),
    )


@case(mask="none")
def bmm_over_batch_and_heads():
    class BartLikeAttention(nn.Module):
        def __init__(self, embed_dim=20, num_heads=4):
            super().__init__()
            self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
            self.scaling = self.head_dim**-0.5
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
                nn.Linear(embed_dim, embed_dim) for _ in range(4)
            )

        def _shape(self, tensor, seq_len, bsz):
            return tensor.view(bsz, seq_len, self.num_heads, self.head_dim).transpose(1, 2).contiguous()

        def forward(self, hidden_states):
            bsz, tgt_len, embed_dim = hidden_states.size()
            proj_shape = (bsz * self.num_heads, -1, self.head_dim)
            query = self._shape(self.q_proj(hidden_states) * self.scaling, tgt_len, bsz).view(*proj_shape)
            key = self._shape(self.k_proj(hidden_states), -1, bsz).view(*proj_shape)
            value = self._shape(self.v_proj(hidden_states), -1, bsz).view(*proj_shape)
            attn_weights = nn.functional.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)
            attn_probs = nn.functional.dropout(attn_weights, p=0.1, training=self.training)
            attn_output = torch.bmm(attn_probs, value)
            attn_output = attn_output.view(bsz, self.num_heads, tgt_len, self.head_dim).transpose(1, 2)
            return self.out_proj(attn_output.reshape(bsz, tgt_len, embed_dim))

    return BartLikeAttention(), lambda d: (d.randn(d.B, d.S, 20),)


@case(bias=True, mask="causal")
def baddbmm_alibi():
    # The way of the first Bloom port: alibi is the addend of baddbmm, the mask a masked_fill with finfo.min.
    def attend(q, k, v, slopes):
        B, H, S, D = q.shape
        alibi = slopes[None, :, None] * torch.arange(S, dtype=q.dtype)[None, None]
        alibi = alibi.expand(B, H, S).reshape(B * H, 1, S)
        query, key = q.reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2)
        scores = torch.baddbmm(alibi, query, key, beta=1.0, alpha=1 / math.sqrt(D))
        future = torch.arange(S)[None, :] > torch.arange(S)[:, None]
        scores = scores.view(B, H, S, S).masked_fill(future, torch.finfo(scores.dtype).min)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).view(B * H, S, S)
        return torch.bmm(probs, v.reshape(B * H, S, D)).view(B, H, S, D)

    return attend, lambda d: (*d.qkv(4, 6), d.randn(4).abs() / 4)


@case(mask="none")
def broadcast_multiply_and_sum():
    def attend(q, k, v):
        scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * 0.4
        p = torch.softmax(scores, dim=-1)
        return (p[..., None] * v[:, :, None]).sum(-2)

    return attend, lambda d: d.qkv(2, 5)


@case(mask="none")
def scale_on_query():
    return lambda q, k, v: ((q * 0.3) @ k.mT).softmax(-1) @ v, lambda d: d.qkv(2, 7)


@case(mask="none")
def scale_on_key_and_divide():
    return lambda q, k, v: (q @ (k / math.sqrt(7)).mT).softmax(-1) @ v, lambda d: d.qkv(2, 7)


@case(mask="none")
def scale_split_on_both():
    class WhisperLike(nn.Module):
        def __init__(self, n_state=24, n_head=4):
            super().__init__()
            self.n_head = n_head
            self.query, self.value, self.out = (nn.Linear(n_state, n_state) for _ in range(3))
            self.key = nn.Linear(n_state, n_state, bias=False)

        def forward(self, x):
            q, k, v = self.query(x), self.key(x), self.value(x)
            n_state = q.shape[-1]
            scale = (n_state // self.n_head) ** -0.25
            q = q.view(*q.shape[:2], self.n_head, -1).permute(0, 2, 1, 3) * scale
            k = k.view(*k.shape[:2], self.n_head, -1).permute(0, 2, 3, 1) * scale
            v = v.view(*v.shape[:2], self.n_head, -1).permute(0, 2, 1, 3)
            w = F.softmax((q @ k).float(), dim=-1).to(q.dtype)
            return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))

    return WhisperLike(), lambda d: (d.randn(d.B, d.S, 24),)


@case(mask="causal")
def scale_after_mask():
    def attend(q, k, v):
        blocked = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        logits = (q @ k.transpose(2, 3)).masked_fill(blocked, -math.inf)
        return F.softmax(logits / k.shape[-1] ** 0.5, dim=-1) @ v

    return attend, lambda d: d.qkv(3, 6)


@case(mask="none", scale=1.0)
def no_scale():
    return lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v, lambda d: d.qkv(3, 6)


@case(mask="none")
def two_scales_and_a_negative_one():
    return lambda q, k, v: ((-(q * 0.5)) @ (k * 0.7).mT * 1.3).softmax(3) @ v, lambda d: d.qkv(3, 6)


@case(mask="causal", groups=2)
def softmax_in_fp32_and_back():
    class LlamaLikeAttention(nn.Module):
        def __init__(self, dim=24, n_heads=4, n_kv_heads=2):
            super().__init__()
            self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
            self.n_rep, self.head_dim = n_heads // n_kv_heads, dim // n_heads
            self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
            self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)

        def repeat_kv(self, x):
            bs, slen, n_kv_heads, head_dim = x.shape
            x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, self.n_rep, head_dim)
            return x.reshape(bs, slen, -1, head_dim)

        def forward(self, x):
            bsz, seqlen, _ = x.shape
            xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
            xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
            xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
            mask = torch.full((seqlen, seqlen), float("-inf"), device=x.device)
            mask = torch.triu(mask, diagonal=1).type_as(x)
            keys, values = self.repeat_kv(xk).transpose(1, 2), self.repeat_kv(xv).transpose(1, 2)
            xq = xq.transpose(1, 2)
            scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
            scores = scores + mask
            scores = F.softmax(scores.float(), dim=-1).type_as(xq)
            return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    return LlamaLikeAttention(), lambda d: (d.randn(d.B, d.S, 24),)


@case(mask="none")
def softmax_dtype_argument():
    def attend(q, k, v):
        w = F.softmax(q @ k.transpose(-1, -2) * 0.5, dim=-1, dtype=torch.float32)
        return w.to(v.dtype) @ v

    return attend, lambda d: d.qkv(3, 4)


@case(mask="none")
def everything_in_fp32():
    def attend(q, k, v):
        return ((q.float() @ k.float().mT / 2).softmax(-1) @ v.float()).to(q.dtype)

    return attend, lambda d: d.qkv(3, 4)


@case(mask="none", form="softmax")
def subtract_max_first():
    def attend(q, k, v):
        attn = torch.matmul(q, k.transpose(-1, -2)) * 0.4
        attn = attn - attn.amax(dim=-1, keepdim=True).detach()
        return attn.softmax(dim=-1) @ v

    return attend, lambda d: d.qkv(3, 6)


@case(mask="none", form="exp")
def softmax_by_hand():
    def my_softmax(x):
        x = x - x.max(dim=-1, keepdim=True).values
        e = torch.exp(x)
        return e / e.sum(dim=-1, keepdim=True)

    return lambda q, k, v: my_softmax(q @ k.mT * 0.4) @ v, lambda d: d.qkv(3, 6)


@case(mask="causal", form="exp")
def normalise_after_values():
    def attend(q, k, v):
        n = q.size(-2)
        s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.4
        s = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), s, float("-inf"))
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e @ v) / e.sum(-1, keepdim=True)

    return attend, lambda d: d.qkv(3, 6)


@case(mask="none", form="exp")
def logsumexp_form():
    def attend(q, k, v):
        s = q @ k.mT / 6**0.5
        return torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)) @ v

    return attend, lambda d: d.qkv(3, 6)


@case(mask="none")
def log_softmax_then_exp():
    return lambda q, k, v: F.log_softmax(q @ k.mT * 0.4, dim=-1).exp() @ v, lambda d: d.qkv(3, 6)


@case(sites=None, mask="none")
def cosine_with_learned_temperature():
    # A scale that is a tensor can be folded into q; leaving it is fine as well.
    class CosineAttention(nn.Module):
        def __init__(self, heads=3):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.log(10 * torch.rand(heads, 1, 1) + 1))

        def forward(self, q, k, v):
            attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
            return attn.softmax(dim=-1) @ v

    return CosineAttention(), lambda d: d.qkv(3, 6)
