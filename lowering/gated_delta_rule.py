"""`sm12x::gated_delta_rule` and `sm12x::gated_delta_rule_update` → a kernel.

Our Triton kernels register above these (``triton....``, merit 20 and more). Plain PyTorch:

    one token  a single token, traced into the graph for Inductor to fuse; any device
    chunked    whole sequences: everything within a chunk at once, then one scan over the chunks; any device
    step       a few tokens against a pool, in place; CPU

The last two are opaque: a traced loop over chunks would be a graph that grows with the length, and a compile for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.ops import gated_delta_rule_update as update_op
from sm12x_compile.registry import YES, Call, No, Verdict, register_kernel

CHUNK = 64
BLOCK = 16  # within a chunk, where the decay differs by channel
_LOWEST_LOG_DECAY = -1e4  # exp() of it is zero; keeps -inf - -inf out


def _accepts_chunked(call: Call, arch: Arch) -> Verdict:
    if call.cu_seqlens is not None:
        return No("takes one sequence a row, not packed ones")
    if call.q.dtype == torch.float64:
        return No("computes in fp32")
    return YES


@register_kernel("gated_delta_rule", "chunked", accepts=_accepts_chunked, merit=10)
def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None = None,
    qk_l2norm: str = "none", eps: float = 1e-6, cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op's reference in another order: see `ops/gated_delta_rule.py`, `_chunk`, for the formula."""
    B, T, H, V = v.shape
    K, C = q.shape[3], min(CHUNK, _next_power_of_two(T))
    more = -T % C
    N = (T + more) // C
    q, k = (_unit_length(x.float(), qk_l2norm, eps) for x in (q, k))
    # [B H, N, C, D]: one batch of matrices a chunk
    q, k = (_chunks(_repeat(x, H), more, C) for x in (q * scale, k))
    values, rate = _chunks(v.float(), more, C), _chunks(beta.float()[..., None], more, C)
    # In fp64: behind a strong decay the sum has lost the digits of a small g in fp32.
    logs = _chunks(g.double().clamp(min=_LOWEST_LOG_DECAY).reshape(B, T, H, -1), more, C).cumsum(2)
    decay = logs.exp().float()
    rest = (logs[:, :, -1:] - logs).exp().float()
    within, across = _products(k, q, logs)
    right = torch.cat([values, decay * k], dim=-1) * rate
    solved = torch.linalg.solve_triangular(within * rate, right, upper=False, unitriangular=True)
    u, w = solved[..., :V].contiguous(), solved[..., V:].contiguous()
    inter, late = q * decay, (k * rest).mT
    last = decay[:, :, -1, :, None]
    S = q.new_zeros(B * H, K, V) if initial_state is None else initial_state.reshape(B * H, K, V).float()
    out = torch.empty_like(u)
    for n in range(N):
        new = torch.baddbmm(u[:, n], w[:, n], S, alpha=-1)
        torch.baddbmm(torch.bmm(inter[:, n], S), across[:, n], new, out=out[:, n])
        S = torch.baddbmm(S * last[:, n], late[:, n], new)
    o = out.view(B, H, N * C, V)[:, :, :T].transpose(1, 2).to(out_dtype or v.dtype)
    final = S.view(B, H, K, V)
    shared = initial_state is not None and final.untyped_storage()._cdata == initial_state.untyped_storage()._cdata
    return o.contiguous(), final.clone() if shared else final.contiguous()


def _accepts_one_token(call: Call, arch: Arch) -> Verdict:
    if call.cu_seqlens is not None or call.q.dtype == torch.float64:
        return _accepts_chunked(call, arch)
    tokens = call.q.shape[1]
    return YES if isinstance(tokens, int) and tokens == 1 else No("computes a single token")


@register_kernel("gated_delta_rule", "one token", accepts=_accepts_one_token, inline=True, merit=12)
def one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None = None,
    qk_l2norm: str = "none", eps: float = 1e-6, cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence itself, once."""
    q, k = (_unit_length(x.float(), qk_l2norm, eps) for x in (q, k))
    S = None if initial_state is None else initial_state.float()
    return _one_token(q * scale, k, v, g, beta, S, out_dtype or v.dtype)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The recurrence of a single token; the state that is returned is a new tensor."""
    H = v.shape[2]
    q, k = (_repeat(x, H)[:, 0] for x in (q, k))
    u = v[:, 0].float()
    if S is not None:
        decay = g[:, 0].float().exp()
        S = S * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        u = u - (k[:, :, None] @ S)[:, :, 0]
    u = u * beta[:, 0, :, None].float()
    written = k[..., None] * u[:, :, None]
    S = written if S is None else S + written
    return (q[:, :, None] @ S).transpose(1, 2).to(dtype).contiguous(), S


def _products(k: Tensor, q: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """``[i, j] = a_i . e^(G_i - G_j) k_j`` for j <= i, else 0; for a = k and for a = q."""
    C = k.shape[2]
    both = torch.cat([k, q], dim=0)
    if logs.shape[-1] == 1:
        later = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
        gap = (logs - logs.mT).masked_fill_(later, -torch.inf).float().exp_()
        found = both @ torch.cat([k, k], dim=0).mT
        return found[: k.shape[0]].mul_(gap), found[k.shape[0] :].mul_(gap)
    found = both.new_zeros(*both.shape[:3], C)
    twice = [torch.cat([x, x], dim=0) for x in (k, logs)]
    block = min(BLOCK, C)
    later = torch.ones(block, block, dtype=torch.bool, device=k.device).triu(1)[..., None]
    for i in range(0, C, block):
        rows = slice(i, i + block)
        mine = twice[1][:, :, rows]
        gap = (mine[:, :, :, None] - mine[:, :, None]).masked_fill_(later, -torch.inf).float().exp_()
        inner = both[:, :, rows, None] * gap
        found[:, :, rows, rows] = (inner * twice[0][:, :, None, rows]).sum(-1)
        if i:  # e^(G_i - G_j) = e^(G_i - G_first) e^(G_first - G_j), neither above 1
            first = mine[:, :, :1]
            left = both[:, :, rows] * (mine - first).exp().float()
            right = twice[0][:, :, :i] * (first - twice[1][:, :, :i]).exp().float()
            found[:, :, rows, :i] = left @ right.mT
    return found[: k.shape[0]], found[k.shape[0] :]


def _chunks(x: Tensor, more: int, C: int) -> Tensor:
    """``[B, T, H, D]`` → ``[B H, N, C, D]``, padded with zeros."""
    B, T, H, D = x.shape
    x = F.pad(x.transpose(1, 2), (0, 0, 0, more)) if more else x.transpose(1, 2)
    return x.reshape(B * H, (T + more) // C, C, D).contiguous()


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _unit_length(x: Tensor, mode: str, eps: float) -> Tensor:
    if mode == "none":
        return x
    squares = (x * x).sum(-1, keepdim=True) + eps
    return x * torch.rsqrt(squares) if mode == "rsqrt" else x / torch.sqrt(squares)


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# ---------------------------------------------------------------- a few tokens


def _accepts_step(call: Call, arch: Arch) -> Verdict:
    if arch.is_cuda:
        return No("looks at the slots on the host")
    return YES if call.q.dtype != torch.float64 else No("computes in fp32")


@register_kernel("gated_delta_rule_update", "step", accepts=_accepts_step, merit=10)
def step(*args: Any, **kwargs: Any) -> Tensor:
    """The op's reference with the pool updated in place where every row has its own."""
    bound = update_op.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    pool, v = a["state_pool"], a["v"]
    B, S, H = v.shape[:3]
    if pool.dtype != torch.float32 or pool.shape[0] != B or a["slots"].tolist() != list(range(B)):
        out: Tensor = update_op.reference(*args, **kwargs)
        return out
    q, k = (_repeat(_unit_length(a[x].float(), a["qk_l2norm"], a["eps"]), H) for x in ("q", "k"))
    decay = a["g"].float().exp()
    decay = decay[..., None] if decay.dim() == 4 else decay[..., None, None]
    out = v.new_empty(v.shape, dtype=torch.float32)
    for s in range(S):
        pool.mul_(decay[:, s])
        key = k[:, s]
        u = (v[:, s].float() - (key[:, :, None] @ pool)[:, :, 0]) * a["beta"][:, s, :, None].float()
        pool.addcmul_(key[..., None], u[:, :, None])
        out[:, s] = (q[:, s, :, None] @ pool)[:, :, 0]
    return out.mul_(a["scale"]).to(a["out_dtype"] or v.dtype)
