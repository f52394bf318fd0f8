"""Mixtures of experts as people write them: gathered, dense, looped, sorted; every way to weigh, gate and store."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Registry
from .expert_parts import D, E, H, K, grouped, routed, tokens, weight

MOES = Registry("moe")
case = MOES.case


@case(form="gathered", experts=E, top_k=K, activation="silu", gate_and_up="apart", layout="enk")
def gathered_weights_and_einsum():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(D, E, bias=False)
            self.w1, self.w2, self.w3 = weight(E, H, D), weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            shape = x.shape
            x = x.view(-1, D)
            scores = F.softmax(self.gate(x), dim=-1)
            p, ids = torch.topk(scores, K, dim=-1)
            p = p / p.sum(dim=-1, keepdim=True)
            w1, w3, w2 = self.w1[ids], self.w3[ids], self.w2[ids]
            x1 = F.silu(torch.einsum("ti,taoi->tao", x, w1))
            x3 = torch.einsum("ti,taoi->tao", x, w3)
            outs = torch.einsum("tao,taio->tai", x1 * x3, w2)
            return torch.einsum("tai,ta->ti", outs, p).view(shape)

    return Feed(), tokens


@case(form="dense", experts=E, top_k=K, activation="silu", layout="ekn")
def all_experts_and_a_scattered_mask():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.gate_up, self.down = weight(E, D, 2 * H), weight(E, H, D)

        def forward(self, x):
            flat = x.reshape(-1, D)
            logits = self.router(flat)
            top, ids = logits.topk(K, dim=-1)
            dense = torch.zeros_like(logits).scatter_(1, ids, top.softmax(-1))
            gate, up = torch.bmm(flat.expand(E, -1, -1), self.gate_up).chunk(2, dim=-1)
            out = torch.bmm(F.silu(gate) * up, self.down)
            return (out * dense.t()[:, :, None]).sum(0).view_as(x)

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="silu", stacked=True)
def module_list_of_mlps():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
            self.w2 = nn.Linear(H, D, bias=False)

        def forward(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(D, E, bias=False)
            self.experts = nn.ModuleList(MLP() for _ in range(E))

        def forward(self, x):
            x = x.view(-1, D)
            p, ids = torch.topk(self.gate(x).softmax(-1, dtype=torch.float32), K)
            p = (p / p.sum(-1, keepdim=True)).to(x.dtype)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                share = torch.where(ids == e, p, 0).sum(-1, keepdim=True)
                out += share * expert(x)
            return out

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="gelu", bias=True, stacked=None)
def loop_over_stacked_experts_with_where():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.up_bias = weight(E, H, D), weight(E, H)
            self.down, self.down_bias = weight(E, D, H), weight(E, D)

        def forward(self, x, ids, p):
            out = torch.zeros_like(x)
            for e in range(E):
                chosen = ids == e
                y = F.linear(F.gelu(F.linear(x, self.up[e], self.up_bias[e])), self.down[e], self.down_bias[e])
                share = (p * chosen).sum(-1, keepdim=True)
                out = torch.where(chosen.any(-1, keepdim=True), out + y * share, out)
            return out

    return Feed(), routed


@case(form="grouped", experts=E, top_k=K, activation="silu")
def sorted_and_scattered_back():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            order = torch.argsort(ids.view(-1), stable=True)
            ends = (ids.view(-1, 1) == torch.arange(E, device=x.device)).sum(0).cumsum(0).to(torch.int32)
            gate, up = grouped(x[order // K], self.w13.mT, ends).chunk(2, -1)
            y = grouped(F.silu(gate) * up, self.w2.mT, ends)
            y = y * p.view(-1)[order].unsqueeze(-1)
            return torch.zeros_like(x).index_add(0, order // K, y)

    return Feed(), routed


@case(form="grouped", experts=E, top_k=K, activation="gelu_tanh", layout="ekn")
def sorted_by_searchsorted_and_written_back():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.v1, self.w2 = weight(E, D, H), weight(E, D, H), weight(E, H, D)

        def forward(self, x, ids, p):
            flat = ids.T.reshape(-1)
            values, order = flat.sort()
            ends = torch.searchsorted(values, torch.arange(E, device=x.device), right=True).int()
            rows = x.repeat(K, 1)[order]
            h = F.gelu(grouped(rows, self.w1, ends), approximate="tanh")
            y = grouped(h * grouped(rows, self.v1, ends), self.w2, ends)
            back = torch.empty_like(y)
            back[order] = y
            return (back.view(K, -1, D) * p.T[..., None]).sum(0)

    return Feed(), routed


@case(form="gathered", experts=E, top_k=1, activation="relu2", gated=False)
def top_one_switch():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.wi, self.wo = weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            p, ids = self.router(x).softmax(-1).max(dim=-1)
            h = torch.matmul(x.unsqueeze(-2), self.wi[ids]).relu().square()
            return torch.matmul(h, self.wo[ids]).squeeze(-2) * p.unsqueeze(-1)

    return Feed(), tokens


@case(form="gathered", experts=E, top_k=K, activation="silu", weight_on="input", layout="ekn")
def weights_on_the_input():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = weight(E, D, 2 * H), weight(E, H, D)

        def forward(self, x, ids, p):
            weighted = x[:, None] * p[..., None]
            gate, up = torch.einsum("tkd,tkdh->tkh", weighted, self.gate_up[ids]).split(H, -1)
            return torch.einsum("tkh,tkhd->td", F.silu(gate) * up, self.down[ids])

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="silu")
def weights_between_the_matrices():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            g, u = (self.w13[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
            h = g * torch.sigmoid(g) * u * p.unsqueeze(-1)
            return (self.w2[ids] @ h.unsqueeze(-1)).squeeze(-1).sum(1)

    return Feed(), routed


@case(form="gathered", activation="swiglu_oai", gate_and_up="interleaved", limit=7.0, alpha=1.702, bias=True)
def interleaved_and_clamped():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.b13 = weight(E, 2 * H, D), weight(E, 2 * H)
            self.w2, self.b2 = weight(E, D, H), weight(E, D)

        def forward(self, x, ids, p):
            h = torch.einsum("tkhd,td->tkh", self.w13[ids], x) + self.b13[ids]
            glu, linear = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
            h = glu * torch.sigmoid(1.702 * glu) * (linear + 1)
            y = torch.einsum("tkdh,tkh->tkd", self.w2[ids], h) + self.b2[ids]
            return torch.einsum("tkd,tk->td", y, p)

    return Feed(), routed


@case(form="gathered", experts=E, activation="silu", gate_and_up="apart")
def up_before_gate():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            up, gate = torch.einsum("tkhd,td->tkh", self.w13[ids], x).chunk(2, -1)
            return torch.einsum("tkdh,tkh,tk->td", self.w2[ids], F.silu(gate) * up, p)

    return Feed(), routed


@case(form="dense", experts=E, top_k=K, activation="silu")
def one_hot_mask_beside_a_shared_expert():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E)
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)
            self.shared_up, self.shared_down = nn.Linear(D, 2 * H, bias=False), nn.Linear(H, D, bias=False)

        def forward(self, x):
            p, ids = self.router(x).sigmoid().topk(K, dim=-1)
            mask = (F.one_hot(ids, E) * p[..., None]).sum(-2)
            h = torch.einsum("bsd,ehd->bseh", x, self.w13)
            h = F.silu(h[..., :H]) * h[..., H:]
            y = torch.einsum("bseh,edh,bse->bsd", h, self.w2, mask.to(h.dtype))
            gate, up = self.shared_up(x).chunk(2, -1)
            return y + self.shared_down(F.silu(gate) * up)

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="silu", stacked=True)
def outputs_stacked_then_weighted():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D)) for _ in range(E))
            self.gate = nn.Linear(D, E)

        def forward(self, x):
            outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
            scores, ids = torch.topk(self.gate(x), K, dim=-1)
            weights = torch.zeros_like(outputs[..., 0]).scatter(-1, ids, scores.softmax(-1))
            return (outputs * weights.unsqueeze(-1)).sum(dim=-2)

    return Feed(), tokens


@case(form="loop", experts=E, top_k=K, activation="silu", stacked=True)
def index_add_over_a_loop():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(D, 2 * H, bias=False) for _ in range(E))
            self.down = nn.ModuleList(nn.Linear(H, D, bias=False) for _ in range(E))

        def forward(self, x, ids, p):
            every = torch.arange(x.shape[0], device=x.device)
            dense = torch.zeros(x.shape[0], E, dtype=p.dtype, device=x.device).scatter_add(1, ids, p)
            out = torch.zeros_like(x)
            for e in range(E):
                gate, up = self.up[e](x).chunk(2, dim=-1)
                out.index_add_(0, every, self.down[e](F.silu(gate) * up) * dense[:, e, None])
            return out

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="silu")
def one_choice_after_the_other():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = weight(E, D, H), weight(E, H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            out = 0
            for k in range(K):
                w1, w2, w3 = (w.index_select(0, ids[:, k]) for w in (self.w1, self.w2, self.w3))
                row = x.unsqueeze(1)
                h = F.silu(row.bmm(w1)) * row.bmm(w3)
                out = out + p[:, k, None] * h.bmm(w2).squeeze(1)
            return out

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="silu")
def every_result_then_the_chosen_ones():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13, self.w2 = weight(E, 2 * H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            gate, up = torch.einsum("td,ehd->teh", x, self.w13).chunk(2, -1)
            every = torch.einsum("teh,edh->ted", F.silu(gate) * up, self.w2)
            chosen = every.gather(1, ids[..., None].expand(-1, -1, D))
            return (chosen * p[..., None]).sum(1)

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="silu")
def looked_up_like_an_embedding():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Embedding(E, D * 2 * H), nn.Embedding(E, H * D)
            self.router = nn.Linear(D, E)

        def forward(self, x):
            x = x.flatten(0, 1)
            p, ids = self.router(x).softmax(-1).topk(K)
            h = torch.einsum("td,tkdh->tkh", x, self.up(ids).view(-1, K, D, 2 * H))
            gate, up = h.tensor_split(2, dim=-1)
            return torch.einsum("tkh,tkhd,tk->td", F.silu(gate) * up, self.down(ids).view(-1, K, H, D), p * 2.5)

    return Feed(), tokens


@case(form="gathered", experts=E, activation="gelu", gated=False)
def ids_counted_from_the_end():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = weight(E, H, D), weight(E, D, H)

        def forward(self, x, ids, p):
            h = torch.einsum("tkhd,td->tkh", self.up[ids - E], x)
            h = 0.5 * h * (1.0 + torch.erf(h / 2**0.5))
            return torch.einsum("tkdh,tkh,tk->td", self.down[ids - E], h, p)

    return Feed(), routed


@case(form="gathered", experts=E, top_k=K, activation="silu", limit=1.5)
def clamped_silu():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = weight(E, H, D), weight(E, D, H), weight(E, H, D)

        def forward(self, x, ids, p):
            column = x[:, None, :, None]
            gate = (self.w1[ids] @ column).squeeze(-1).clamp_max(1.5)
            up = torch.clamp((self.w3[ids] @ column).squeeze(-1), min=-1.5, max=1.5)
            y = (self.w2[ids] @ (F.silu(gate) * up)[..., None]).squeeze(-1)
            return torch.bmm(p.unsqueeze(1), y).squeeze(1)

    return Feed(), routed
