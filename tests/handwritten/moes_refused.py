"""Code that looks like a mixture of experts, and must be left alone or rewritten in part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Registry
from .expert_parts import D, E, H, K, grouped, routed, tokens, weight

MOES_REFUSED = Registry("moe")
case = MOES_REFUSED.case


@case(refused=True)
def expert_choice():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.w1, self.w2 = weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            x = x.flatten(0, 1)
            scores = self.router(x).softmax(-1)
            p, chosen = scores.T.topk(3, dim=-1)
            y = torch.bmm(F.silu(torch.bmm(x[chosen], self.w1)), self.w2) * p[..., None]
            return torch.zeros_like(x).index_add(0, chosen.flatten(), y.flatten(0, 1))

    return Feed(), tokens


@case(refused=True)
def added_where_one_of_the_first_choices_is_the_expert():
    def feed(x, router, up, down):
        p, ids = (x.flatten(0, 1) @ router).softmax(-1).topk(3)
        out = torch.zeros_like(x.flatten(0, 1))
        for e in range(E):
            y = F.silu(x.flatten(0, 1) @ up[e]) @ down[e]
            share = (p * (ids == e)).sum(-1, keepdim=True)
            out = torch.where((ids[:, :2] == e).any(-1, keepdim=True), out + y * share, out)
        return out

    return feed, lambda d: (*tokens(d), d.randn(D, E), d.randn(E, D, H), d.randn(E, H, D))


@case(refused=True)
def last_expert_for_the_first_choices_only():
    def feed(x, router, up, down):
        p, ids = (x.flatten(0, 1) @ router).softmax(-1).topk(3)
        out = torch.zeros_like(x.flatten(0, 1))
        for e in range(E):
            chosen = torch.where(ids == e, p, 0)
            share = chosen[:, : 2 if e == E - 1 else 3].sum(-1, keepdim=True)
            out = out + share * (F.silu(x.flatten(0, 1) @ up[e]) @ down[e])
        return out

    return feed, lambda d: (*tokens(d), d.randn(D, E), d.randn(E, D, H), d.randn(E, H, D))


@case(sites=None)
def all_experts_and_the_first_two_again():
    def feed(x, ids, p, up, down):
        chosen = (ids[..., None] == torch.arange(E)).to(p.dtype)
        shares, again = torch.einsum("tke,tk->te", chosen, p), torch.einsum("tke,tk->te", chosen[..., :2], p)
        h = F.silu(torch.einsum("td,ehd->teh", x, up))
        first = F.silu(torch.einsum("td,ehd->teh", x, up[:2]))
        return torch.einsum("teh,edh,te->td", h, down, shares) + torch.einsum("teh,edh,te->td", first, down[:2], again)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, D, H))


@case(refused=True)
def tokens_beyond_the_capacity_dropped():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.up, self.down = weight(E, D, H), weight(E, H, D)

        def forward(self, x):
            x = x.flatten(0, 1)
            p, ids = self.router(x).softmax(-1).max(dim=-1)
            capacity = max(1, x.shape[0] // E)
            chosen = F.one_hot(ids, E)
            place = (chosen.cumsum(0) - 1) * chosen
            kept = (place < capacity) & (chosen > 0)
            dispatch = (F.one_hot(place.clamp(0, capacity - 1), capacity) * kept[..., None]).to(x.dtype)
            rows = torch.einsum("tec,td->ecd", dispatch, x)
            y = torch.einsum("ech,ehd->ecd", F.relu(torch.einsum("ecd,edh->ech", rows, self.up)), self.down)
            return torch.einsum("tec,ecd->td", dispatch * p[:, None, None], y)

    return Feed(), tokens


@case(refused=True)
def unknown_activation():
    def feed(x, ids, p, up, down):
        h = torch.einsum("tkhd,td->tkh", up[ids], x)
        return torch.einsum("tkdh,tkh,tk->td", down[ids], torch.tanh(h), p)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, D, H))


@case(refused=True)
def sorted_in_descending_order():
    def feed(x, ids, p, w1, w2):
        order = ids.view(-1).argsort(descending=True)
        ends = torch.histc(ids.float(), bins=E, min=0, max=E - 1).cumsum(0).int()
        y = grouped(F.silu(grouped(x[order // K], w1, ends)), w2, ends)[order.argsort()].view(-1, K, D)
        return (y * p[..., None]).sum(1)

    return feed, lambda d: (*routed(d), d.randn(E, D, H), d.randn(E, H, D))


@case(refused=True)
def first_matrix_of_the_next_expert():
    def feed(x, ids, p, up, down):
        h = F.silu(torch.einsum("tkhd,td->tkh", up[(ids + 1) % E], x))
        return torch.einsum("tkdh,tkh,tk->td", down[ids], h, p)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, D, H))


@case(refused=True)
def scattered_without_proof_that_choices_differ():
    def feed(x, ids, p, up, down):
        dense = torch.zeros(x.shape[0], E, dtype=p.dtype).scatter(1, ids, p)
        h = F.silu(torch.einsum("td,ehd->teh", x, up))
        return torch.einsum("teh,edh,te->td", h, down, dense)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, D, H))


@case(refused=True)
def inputs_weighed_by_experts_with_a_bias():
    def feed(x, ids, p, up, bias, down):
        shares = torch.zeros(x.shape[0], E, dtype=p.dtype).scatter_add(1, ids, p)
        chosen = torch.zeros_like(shares).scatter(1, shares.topk(K).indices, 1.0)
        h = F.silu(torch.einsum("te,td,ehd->teh", chosen, x, up) + bias)
        return torch.einsum("teh,edh->td", h, down)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, H), d.randn(E, D, H))


@case(refused=True)
def inputs_weighed_without_proof_that_choices_differ():
    def feed(x, ids, p, up, down):
        shares = torch.zeros(x.shape[0], E, dtype=p.dtype).scatter_add(1, ids, p)
        h = F.silu(torch.einsum("te,td,ehd->teh", shares, x, up))
        return torch.einsum("teh,edh->td", h, down)

    return feed, lambda d: (*routed(d), d.randn(E, H, D), d.randn(E, D, H))


@case(sites=0)
def logits_filled_with_less_than_infinity():
    def feed(x, router, up, down):
        logits = x.flatten(0, 1) @ router
        best, ids = logits.topk(K, dim=-1)
        gates = torch.full_like(logits, -5.0).scatter(-1, ids, best).softmax(-1)
        h = F.silu(torch.einsum("td,ehd->teh", x.flatten(0, 1), up))
        return torch.einsum("teh,edh,te->td", h, down, gates)

    return feed, lambda d: (*tokens(d), d.randn(D, E), d.randn(E, H, D), d.randn(E, D, H))
