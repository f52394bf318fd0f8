"""Code that looks like attention and is not, or shows more of itself than the op can give back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

REFUSED = Registry()
case = REFUSED.case


def scores_of(q, k):
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def heads(d: Draw):
    return d.qkv(3, 6)


@case(refused=True)
def talking_heads_after_softmax():
    def attend(q, k, v, mix):
        p = torch.einsum("bhqk,gh->bgqk", scores_of(q, k).softmax(-1), mix)
        return p @ v

    return attend, lambda d: (*heads(d), d.randn(3, 3))


@case(sites=0)
def talking_heads_before_softmax():
    class TalkingHeads(nn.Module):
        def __init__(self, heads=3):
            super().__init__()
            self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

        def forward(self, q, k, v):
            attn = self.proj_l(scores_of(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            attn = self.proj_w(attn.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return attn @ v

    return TalkingHeads(), heads


@case(refused=True)
def returns_its_weights():
    def attend(q, k, v):
        p = scores_of(q, k).softmax(-1)
        return p @ v, p

    return attend, heads


@case(sites=None)
def returns_its_scores():
    def attend(q, k, v):
        s = scores_of(q, k)
        return s.softmax(-1) @ v, s

    return attend, heads


@case(sites=0)
def linear_attention():
    def attend(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhkd,bhkv->bhdv", k, v)
        z = 1 / (torch.einsum("bhqd,bhd->bhq", q, k.sum(dim=2)) + 1e-6)
        return torch.einsum("bhqd,bhdv,bhq->bhqv", q, kv, z)

    return attend, heads


@case(sites=0)
def efficient_attention():
    # Softmax over features for q and over keys for k: two softmaxes, no score matrix.
    def attend(q, k, v):
        return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)

    return attend, heads


@case(refused=True)
def softmax_over_queries():
    return lambda q, k, v: scores_of(q, k).softmax(dim=-2) @ v, heads


@case(refused=True)
def softmax_over_heads():
    return lambda q, k, v: scores_of(q, k).softmax(dim=1) @ v, heads


@case(refused=True)
def slot_attention():
    def attend(q, k, v):
        p = scores_of(q, k).softmax(dim=-2) + 1e-8
        return (p / p.sum(dim=-1, keepdim=True)) @ v

    return attend, heads


@case(sites=0)
def sigmoid_attention():
    return lambda q, k, v: torch.sigmoid(scores_of(q, k) - 2.0) @ v, heads


@case(sites=0)
def router():
    class Router(nn.Module):
        def __init__(self, dim=12, experts=5):
            super().__init__()
            self.gate = nn.Linear(dim, experts, bias=False)

        def forward(self, x):
            weights = F.softmax(self.gate(x), dim=1, dtype=torch.float)
            weights, chosen = torch.topk(weights, 2, dim=-1)
            return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), chosen

    return Router(), lambda d: (d.randn(d.T, 12),)


@case(sites=None, mask="none")
def soft_codebook():
    # softmax(x W^T) E is attention over a table of parameters, by meaning.
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Linear(6, 9, bias=False), nn.Parameter(torch.randn(9, 4))

        def forward(self, x):
            return F.softmax(self.keys(x), dim=-1) @ self.values

    return Codebook(), lambda d: (d.randn(d.T, 6),)


@case(refused=True)
def scale_after_softmax_by_a_matrix():
    return lambda q, k, v, decay: (scores_of(q, k).softmax(-1) * decay) @ v, lambda d: (
        *heads(d),
        d.randn(d.S, d.S),
    )


@case(refused=True)
def mask_after_softmax():
    def attend(q, k, v):
        n = q.shape[2]
        return scores_of(q, k).softmax(-1).tril() @ v[:, :, :n]

    return attend, heads


@case(refused=True)
def sharpened_weights():
    def attend(q, k, v):
        p = scores_of(q, k).softmax(-1) ** 2
        return (p / p.sum(-1, keepdim=True)) @ v

    return attend, heads


@case(sites=None)
def differential_attention():
    def attend(q, k, v, other_q, other_k):
        return (scores_of(q, k).softmax(-1) - 0.3 * scores_of(other_q, other_k).softmax(-1)) @ v

    return attend, lambda d: (*heads(d), d.randn(d.B, 3, d.S, 6), d.randn(d.B, 3, d.S, 6))


@case(refused=True)
def convolution_over_scores():
    class ConvolvedScores(nn.Module):
        def __init__(self, heads=3):
            super().__init__()
            self.conv = nn.Conv2d(heads, heads, 3, padding=1, groups=heads)

        def forward(self, q, k, v):
            return self.conv(scores_of(q, k)).softmax(-1) @ v

    return ConvolvedScores(), heads


@case(sites=None)
def top_k_of_scores():
    # A mask made of the scores themselves: dense, for all the op knows.
    def attend(q, k, v):
        s = scores_of(q, k)
        least = s.topk(3, dim=-1).values[..., -1:]
        return s.masked_fill(s < least, float("-inf")).softmax(-1) @ v

    return attend, heads


@case(sites=None)
def additive_attention():
    # Bahdanau: the score is not a contraction of q and k.
    def attend(q, k, v, w):
        s = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * w).sum(-1)
        return s.softmax(-1) @ v

    return attend, lambda d: (*heads(d), d.randn(6))


@case(sites=None)
def euclidean_distance():
    # -|q - k|^2 expands to 2 q.k - |q|^2 - |k|^2: a bias that depends on the key.
    def attend(q, k, v):
        distance = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
        return (-distance / 4).softmax(-1) @ v

    return attend, heads


@case(sites=0)
def squared_relu_weights():
    def attend(q, k, v):
        p = F.relu(scores_of(q, k)) ** 2
        return (p / (p.sum(-1, keepdim=True) + 1e-6)) @ v

    return attend, heads
