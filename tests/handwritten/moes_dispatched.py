"""Mixtures of experts whose choices are filled, dispatched or weighed in rarer ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Registry
from .expert_parts import D, E, H, K, routed, tokens, weight

MOES_DISPATCHED = Registry("moe")
case = MOES_DISPATCHED.case


@case(form="dense", experts=E, top_k=K, activation="relu", gated=False)
def noisy_top_k_of_filled_logits():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.noise = nn.Linear(D, E), nn.Linear(D, E)
            self.up, self.down = weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            logits = self.router(x)
            if self.training:
                logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
            best, ids = logits.topk(K, dim=-1)
            gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1)
            y = torch.einsum("bseh,ehd->bsed", F.relu(torch.einsum("bsd,edh->bseh", x, self.up)), self.down)
            return torch.einsum("bsed,bse->bsd", y, gates)

    return Feed(), tokens


@case(form="dense", experts=E, top_k=1, activation="silu", weight_on="input", layout="ekn")
def all_experts_on_inputs_weighed_by_sigmoid():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.gate_up, self.down = weight(E, D, 2 * H), weight(E, H, D)

        def forward(self, x):
            flat = x.view(-1, D)
            logits = self.router(flat)
            best, ids = logits.topk(1, dim=1)
            scores = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, ids, best).float()).to(x.dtype)
            rows = (flat.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(E, -1, D)
            gate, up = torch.bmm(rows, self.gate_up).chunk(2, dim=-1)
            return torch.bmm(up * F.silu(gate), self.down).sum(0).view_as(x)

    return Feed(), tokens


@case(form="dense", experts=E, top_k=K, activation="gelu", gated=False, bias=True)
def dispatched_and_combined_by_einsum():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.up, self.up_bias = weight(E, D, H), weight(E, 1, H)
            self.down, self.down_bias = weight(E, H, D), weight(E, 1, D)

        def forward(self, x, ids, p):
            chosen = F.one_hot(ids, E).to(x.dtype)
            combine = torch.einsum("tke,tk->te", chosen, p)
            rows = torch.einsum("te,td->etd", chosen.amax(1), x)
            h = F.gelu(torch.einsum("etd,edh->eth", rows, self.up) + self.up_bias)
            y = torch.einsum("eth,ehd->etd", h, self.down) + self.down_bias
            return torch.einsum("etd,te->td", y, combine)

    return Feed(), routed


@case(form="dense", experts=E, top_k=K, activation="silu", gate_and_up="apart")
def dispatched_where_the_combining_weight_is_not_zero():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.w1, self.w3, self.w2 = weight(E, D, H), weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            x = x.flatten(0, 1)
            p, ids = self.router(x).softmax(-1).topk(K, dim=-1)
            combine = torch.einsum("tke,tk->te", F.one_hot(ids, E).to(x.dtype), p / p.sum(-1, keepdim=True))
            rows = torch.einsum("te,td->etd", (combine > 0).to(x.dtype), x)
            h = F.silu(torch.einsum("etd,edh->eth", rows, self.w1)) * torch.einsum("etd,edh->eth", rows, self.w3)
            return torch.einsum("eth,ehd,te->td", h, self.w2, combine)

    return Feed(), tokens


@case(form="gathered", experts=E, top_k=K, activation="silu")
def experts_by_a_hash_of_the_token():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Buffer(torch.stack([torch.randperm(E)[:K] for _ in range(32)]))
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)

        def forward(self, x, token, p):
            ids = self.table[token]
            gate, up = torch.einsum("bskhd,bsd->bskh", self.w13[ids], x).chunk(2, -1)
            return torch.einsum("bskdh,bskh,bsk->bsd", self.w2[ids], F.silu(gate) * up, p)

    return Feed(), lambda d: (d.randn(d.B, d.S, D), d.ints(0, 32, d.B, d.S), d.randn(d.B, d.S, K).softmax(-1))


@case(form="dense", experts=E, top_k=K, activation="silu", gate_and_up="apart")
def all_scores_times_a_mask_renormalised():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.w1, self.w3, self.w2 = weight(E, D, H), weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            scores = self.router(x).softmax(-1)
            p = scores * torch.zeros_like(scores).scatter_(-1, scores.topk(K).indices, 1.0)
            p = p / p.sum(-1, keepdim=True)
            h = F.silu(torch.einsum("bsd,edh->bseh", x, self.w1)) * torch.einsum("bsd,edh->bseh", x, self.w3)
            return torch.einsum("bseh,ehd,bse->bsd", h, self.w2, p)

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="gelu", gated=False)
def loop_over_experts_and_all_scores():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.up, self.down = weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            scores = self.router(x).softmax(-1)
            ids = scores.topk(K).indices
            out = 0
            for e in range(E):
                chosen = (ids == e).any(-1, keepdim=True)
                out = out + chosen * scores[..., e : e + 1] * (F.gelu(x @ self.up[e]) @ self.down[e])
            return out

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="relu", gated=False, bias=True)
def loop_over_experts_and_their_choices():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.up_bias = weight(E, H, D), weight(E, H)
            self.down, self.down_bias = weight(E, D, H), weight(E, D)

        def forward(self, x, ids, p):
            out = torch.zeros_like(x)
            for e in range(E):
                y = F.relu(x @ self.up[e].T + self.up_bias[e]) @ self.down[e].T + self.down_bias[e]
                for k in range(K):
                    out = out + torch.where((ids[:, k] == e)[:, None], p[:, k, None] * y, 0)
            return out

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="gelu_tanh", gate_and_up="apart")
def gelu_written_out():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3, self.w2 = weight(E, D, H), weight(E, D, H), weight(E, H, D)

        def forward(self, x, ids, p):
            g, u = (torch.einsum("td,tkdh->tkh", x, w[ids]) for w in (self.w1, self.w3))
            g = 0.5 * g * (1.0 + torch.tanh(0.7978845608 * (g + 0.044715 * torch.pow(g, 3))))
            return torch.einsum("tkh,tkhd,tk->td", g * u, self.w2[ids], p)

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="relu")
def relu_gate_and_a_norm_behind():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.w2, self.norm = weight(E, 2 * H, D), weight(E, D, H), weight(D)

        def forward(self, x, ids, p):
            g, u = (self.w13[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
            y = torch.einsum("tkdh,tkh,tk->td", self.w2[ids], F.relu(g) * u, p)
            return x + self.norm * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))

    return Feed(), routed
