"""Attention written by hand, in three spellings. What is recognised is the equation, not the spelling."""

import math

import torch
from torch import Tensor, nn

import sm12x_compile


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, length, head_dim], a triangle of -inf."""
    future = torch.triu(torch.full((q.shape[2], k.shape[2]), -math.inf), diagonal=1)
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + future, dim=-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, length, heads, head_dim], 4 query heads for each KV head, a sliding window of 5 keys."""
    k, v = (x.repeat_interleave(4, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    scores = scores.masked_fill((key > query) | (key <= query - 5), torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Block(nn.Module):
    """One fused projection, packed tokens without a batch, softmax spelled out, tanh-capped scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 3 * 64)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 3, 4, 16).unbind(1)
        scores = 30.0 * torch.tanh(torch.einsum("qhd,khd->hqk", q, k) * 0.25 / 30.0)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        return self.out(torch.einsum("hqk,khd->qhd", weights, v).reshape(-1, 64))


torch.manual_seed(0)
tall = [torch.randn(2, 4, 12, 16) for _ in range(3)]
wide = torch.randn(2, 12, 8, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
for function, inputs in ((textbook, tall), (einsum, wide), (Block().eval(), [torch.randn(12, 64)])):
    report = sm12x_compile.explain(function, *inputs, options={"codegen": "eager"})
    print(report)
    assert len(report.rewritten) == 1, report
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="sm12x", options={"codegen": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-5, atol=1e-5)
