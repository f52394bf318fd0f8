"""Short causal convolutions as people write them, and some that look ahead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Registry

CONVOLUTIONS = Registry("causal_conv1d")
case = CONVOLUTIONS.case
C, W = 6, 4


@case(window=4, activation="silu", bias=True)
def module_with_padding_cut_off():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, groups=C, padding=W - 1)

        def forward(self, x):
            return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    return Short(), lambda d: (d.randn(d.B, d.S, C),)


@case(window=3, activation="none")
def padded_by_hand():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, 1, 3))

        def forward(self, x):
            return F.conv1d(F.pad(x, (2, 0)), self.weight, groups=C)

    return Short(), lambda d: (d.randn(d.B, C, d.S),)


@case(window=4, activation="silu", state="given")
def state_in_front():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, W))

        def forward(self, x, state):
            joined = torch.cat([state, x], dim=-1)
            return F.silu(F.conv1d(joined, self.weight[:, None], groups=C)), joined[..., -(W - 1) :]

    return Short(), lambda d: (d.randn(d.B, C, d.S), d.randn(d.B, C, W - 1))


@case(window=4, activation="silu", state="in place")
def window_shifted_by_roll():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(C, W)), nn.Parameter(torch.randn(C))
            self.register_buffer("state", torch.zeros(2, C, W))

        def forward(self, x):
            self.state.copy_(torch.roll(self.state, shifts=-1, dims=-1))
            self.state[:, :, -1] = x
            return F.silu(torch.sum(self.state * self.weight, dim=-1))

    return Short(), lambda d: [(d.randn(2, C),) for _ in range(5)]


@case(window=4, activation="none", state="in place")
def window_shifted_by_cat():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, W))
            self.register_buffer("state", torch.zeros(2, C, W))

        def forward(self, x):
            self.state.copy_(torch.cat([self.state[..., 1:], x[..., None]], dim=-1))
            return (self.state * self.weight).sum(-1)

    return Short(), lambda d: [(d.randn(2, C),) for _ in range(5)]


@case(window=4, activation="none")
def unfolded_tokens_first():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, W))

        def forward(self, x):
            return (F.pad(x, (0, 0, W - 1, 0)).unfold(1, W, 1) * self.weight).sum(-1)

    return Short(), lambda d: (d.randn(d.B, d.S, C),)


@case(window=4, activation="silu")
def prompt_shorter_than_the_window():
    """The zeros in front come from two paddings; the padded inputs are kept as the state."""

    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, groups=C, padding=W - 1, bias=False)

        def forward(self, x):
            window = F.pad(x, (W - x.shape[-1], 0))
            return F.silu(self.conv(window)[..., :W])[..., -x.shape[-1] :], window

    return Short(), lambda d: (d.randn(d.B, C, 2),)


@case(refused=True)
def state_shorter_than_the_window():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, groups=C, padding=W - 1)

        def forward(self, x, state):
            return self.conv(torch.cat([state, x], dim=-1))[..., 2 : 2 + x.shape[-1]]

    return Short(), lambda d: (d.randn(d.B, C, d.S), d.randn(d.B, C, 2))


@case(refused=True)
def looks_ahead():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, groups=C, padding=W - 1)

        def forward(self, x):
            return self.conv(x)[..., W - 1 :]

    return Short(), lambda d: (d.randn(d.B, C, d.S),)


@case(refused=True)
def dilated_convolution():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, groups=C, dilation=2)

        def forward(self, x):
            return self.conv(F.pad(x, (2 * (W - 1), 0)))

    return Short(), lambda d: (d.randn(d.B, C, d.S),)


@case(sites=0)
def mixes_channels():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(C, C, W, padding=W - 1)

        def forward(self, x):
            return self.conv(x)[..., : x.shape[-1]]

    return Short(), lambda d: (d.randn(d.B, C, d.S),)


@case(sites=None)
def the_state_is_also_returned():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, W))
            self.register_buffer("state", torch.zeros(2, C, W))

        def forward(self, x):
            before = self.state.sum()
            self.state.copy_(torch.cat([self.state[..., 1:], x[..., None]], dim=-1))
            return (self.state * self.weight).sum(-1), before, self.state.clone()

    return Short(), lambda d: [(d.randn(2, C),) for _ in range(3)]


@case(sites=None)
def the_state_keeps_something_else():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, W))
            self.register_buffer("state", torch.zeros(2, C, W))

        def forward(self, x):
            window = torch.cat([self.state[..., 1:], x[..., None]], dim=-1)
            self.state.copy_(2 * window)
            return (window * self.weight).sum(-1)

    return Short(), lambda d: [(d.randn(2, C),) for _ in range(3)]


