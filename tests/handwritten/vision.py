"""Attentions of vision models: patches, latents, windows, rows and columns, channels first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Registry

VISION = Registry()
case = VISION.case


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


@case(mask="none")
def vit_unbind():
    class Attention(nn.Module):
        def __init__(self, dim=20, num_heads=4):
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
            self.attn_drop = nn.Dropout(0.0)
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))

        def forward(self, patches):
            x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
            B, N, C = x.shape
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            q = q * self.scale
            attn = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
            return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))

    return Attention(), lambda d: (d.randn(d.B, d.S, 20),)


@case(mask="none")
def perceiver_latents():
    class PerceiverResampler(nn.Module):
        def __init__(self, dim=14, heads=2, dim_head=4, latents=3):
            super().__init__()
            self.heads, self.scale = heads, dim_head**-0.5
            self.latents = nn.Parameter(torch.randn(latents, dim))
            self.norm, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
            self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)

        def forward(self, media):
            latents = self.norm_latents(self.latents.unsqueeze(0).repeat(media.shape[0], 1, 1))
            kv_input = torch.cat((self.norm(media), latents), dim=-2)
            k, v = self.to_kv(kv_input).chunk(2, dim=-1)
            q = self.to_q(latents)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3) for t in (q, k, v))
            sim = torch.einsum("... i d, ... j d -> ... i j", q * self.scale, k)
            sim = sim - sim.amax(dim=-1, keepdim=True).detach()
            return torch.einsum("... i j, ... j d -> ... i d", sim.softmax(dim=-1), v)

    return PerceiverResampler(), lambda d: (d.randn(d.B, d.T, 14),)


@case(bias=True, mask=("none", "dense"))
def swin_windows():
    class WindowAttention(nn.Module):
        def __init__(self, dim=12, window=3, heads=3):
            super().__init__()
            self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
            self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
            rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
            grid = torch.stack((rows, columns)).flatten(1)
            offset = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
            self.register_buffer("index", offset[..., 0] * (2 * window - 1) + offset[..., 1])
            self.qkv = nn.Linear(dim, 3 * dim)

        def forward(self, image):
            B, H, W, C = image.shape
            w = self.window
            x = image.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
            qkv = self.qkv(x).reshape(-1, w * w, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
            attn = (qkv[0] * self.scale) @ qkv[1].transpose(-2, -1)
            bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
            attn = (attn + bias.unsqueeze(0)).softmax(dim=-1)
            x = (attn @ qkv[2]).transpose(1, 2).reshape(B, H // w, W // w, w, w, C)
            return x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)

    return WindowAttention(), lambda d: (d.randn(d.B, 6, 9, 12),)


@case(mask="none")
def windows_in_five_dimensions():
    return softmax_attention, lambda d: tuple(d.randn(d.B, 3, 2, d.S, 5) for _ in range(3))


@case(sites=2, mask="none")
def axial_rows_then_columns():
    class Axial(nn.Module):
        def __init__(self, dim=8, heads=2):
            super().__init__()
            self.heads = heads
            self.rows, self.columns = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)

        def along_last(self, x, projection):
            q, k, v = projection(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            out = softmax_attention(q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3))
            return out.transpose(-2, -3).flatten(-2)

        def forward(self, x):
            x = x + self.along_last(x, self.rows)
            return x + self.along_last(x.transpose(1, 2), self.columns).transpose(1, 2)

    return Axial(), lambda d: (d.randn(d.B, 3, d.S, 8),)


@case(mask="none", scale=1.0)
def convolutional_self_attention():
    # SAGAN: channels first, one head, keys and values to the right of the product are transposed.
    class SelfAttention2d(nn.Module):
        def __init__(self, channels=8):
            super().__init__()
            self.f, self.g, self.h = (nn.Conv2d(channels, c, 1) for c in (2, 2, channels))
            self.gamma = nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            b, c, height, width = x.shape
            query = self.f(x).view(b, -1, height * width).permute(0, 2, 1)
            key = self.g(x).view(b, -1, height * width)
            attention = F.softmax(torch.bmm(query, key), dim=-1)
            value = self.h(x).view(b, -1, height * width)
            out = torch.bmm(value, attention.permute(0, 2, 1)).view(b, c, height, width)
            return self.gamma * out + x

    return SelfAttention2d(), lambda d: (d.randn(d.B, 8, 3, 5),)
