"""`sm12x::causal_conv1d` and `sm12x::causal_conv1d_update` → a kernel.

Our Triton kernels register above these (``triton....``, merit 20 and more). Plain PyTorch:

    aten    whole sequences: ``conv1d`` on the inputs with the state in front, traced into the graph; any device
    step    a few tokens against a pool, in place; CPU
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.ops import causal_conv1d_update as update_op
from sm12x_compile.registry import YES, Call, No, Verdict, register_kernel


def _accepts_aten(call: Call, arch: Arch) -> Verdict:
    dtypes = {x.dtype for x in (call.x, call.w, call.bias, call.initial_state) if x is not None}
    return YES if len(dtypes) == 1 else No(f"takes one dtype, not {', '.join(sorted(map(str, dtypes)))}")


@register_kernel("causal_conv1d", "aten", accepts=_accepts_aten, inline=True, merit=10)
def aten_conv1d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "none", initial_state: Tensor | None = None,
    state_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op with PyTorch's depthwise convolution."""
    C, W = w.shape
    T = x.shape[2]
    length = state_len if state_len is not None else W - 1 if initial_state is None else initial_state.shape[2]
    if initial_state is None:
        y = F.conv1d(x, w[:, None], bias, padding=W - 1, groups=C)[..., :T]
        final = F.pad(x, (length, 0))[..., T:]
    else:
        history = torch.cat([initial_state, x], dim=-1)
        before = initial_state.shape[2]
        y = F.conv1d(history[..., before - (W - 1) :], w[:, None], bias, groups=C)
        missing = max(0, length - before)
        final = F.pad(history, (missing, 0))[..., before + missing + T - length :]
    y = F.silu(y) if activation == "silu" else y
    return y.contiguous(), final.clone(memory_format=torch.contiguous_format)


def _accepts_step(call: Call, arch: Arch) -> Verdict:
    if arch.is_cuda:
        return No("looks at the slots on the host")
    dtypes = {call.x.dtype, call.w.dtype, call.state_pool.dtype}
    return YES if len(dtypes) == 1 else No(f"takes one dtype, not {', '.join(sorted(map(str, dtypes)))}")


@register_kernel("causal_conv1d_update", "step", accepts=_accepts_step, merit=10)
def step(
    x: Tensor, w: Tensor, state_pool: Tensor, slots: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """The op's reference with the pool updated in place where every row has its own."""
    B, _, S = x.shape
    W, L = w.shape[1], state_pool.shape[2]
    if state_pool.shape[0] != B or S > L or slots.tolist() != list(range(B)):
        out: Tensor = update_op.reference(x, w, state_pool, slots, bias, activation)
        return out
    history = torch.cat([state_pool, x], dim=-1)
    windows = history[..., L - (W - 1) :].unfold(-1, W, 1)
    y = (windows * w[:, None]).sum(-1)
    y = y if bias is None else y + bias[:, None]
    state_pool.copy_(history[..., S:])
    return F.silu(y) if activation == "silu" else y
