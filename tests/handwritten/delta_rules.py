"""The gated delta rule as people write it: a step, loops over tokens and chunks, states of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Draw, Registry

DELTA_RULES = Registry("gated_delta_rule")
case = DELTA_RULES.case
H, K, V = 3, 4, 6


def operands(d: Draw, T: int, *, channels: bool = False, heads: int = H, first: bool = False):
    """q, k ``[B, T, heads, K]``, v, g, beta; with `first` heads stand before tokens."""
    rate = d.randn(d.B, T, H, *((K,) if channels else ()))
    made = (
        d.randn(d.B, T, heads, K), d.randn(d.B, T, heads, K), d.randn(d.B, T, H, V), -F.softplus(rate),
        torch.sigmoid(d.randn(d.B, T, H)),
    )  # fmt: skip
    return tuple(x.transpose(1, 2).contiguous() for x in made) if first else made


@case(decay="head", qk_l2norm="none", state="zeros")
def loop_over_tokens_stacked():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            state = torch.zeros(q.shape[0], H, K, V, dtype=torch.float32)
            out = []
            for t in range(q.shape[1]):
                state = state * g[:, t, :, None, None].float().exp()
                known = (state * k[:, t, :, :, None].float()).sum(-2)
                new = beta[:, t, :, None].float() * (v[:, t].float() - known)
                state = state + k[:, t, :, :, None].float() * new[:, :, None]
                out.append((state * q[:, t, :, :, None].float()).sum(-2) / K**0.5)
            return torch.stack(out, dim=1).to(q.dtype), state

    return Memory(), lambda d: operands(d, 7)


@case(decay="head", state="given", scale=1.0)
def one_step_that_returns_its_state():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            state = torch.exp(g)[..., None, None] * state
            error = (v - torch.einsum("bhkv,bhk->bhv", state, k)) * beta[..., None]
            state = state + torch.einsum("bhk,bhv->bhkv", k, error)
            return torch.einsum("bhkv,bhk->bhv", state, q), state

    def inputs(d: Draw):
        return (*(x[:, 0] for x in operands(d, 1)), d.randn(d.B, H, K, V))

    return Memory(), inputs


@case(decay="head", state="in place")
def one_step_on_a_buffer():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(2, H, K, V))

        def forward(self, q, k, v, g, beta):
            decayed = self.state * g.exp()[:, 0, :, None, None]
            error = (v[:, 0] - (decayed * k[:, 0, :, :, None]).sum(2)) * beta[:, 0, :, None]
            new = decayed + k[:, 0, :, :, None] * error[:, :, None, :]
            self.state.copy_(new)
            return (new * q[:, 0, :, :, None]).sum(2)

    def inputs(d: Draw):
        d.B = 2
        return [operands(d, 1) for _ in range(4)]

    return Memory(), inputs


@case(decay="head", qk_l2norm="rsqrt", state="zeros")
def loop_with_norms_and_einsum():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
            k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
            memory = q.new_zeros(q.shape[0], H, K, V)
            rows = []
            for qt, kt, vt, gt, bt in zip(*(x.unbind(1) for x in (q, k, v, g, beta)), strict=True):
                memory = memory * gt.exp().view(-1, H, 1, 1)
                error = vt - torch.einsum("bhk,bhkv->bhv", kt, memory)
                memory = memory + torch.einsum("bhk,bhv->bhkv", kt, bt[..., None] * error)
                rows.append(torch.einsum("bhk,bhkv->bhv", qt, memory))
            return torch.stack(rows, 1)

    return Memory(), lambda d: operands(d, 5)


@case(decay="head", qk_l2norm="sqrt", state="zeros")
def chunks_with_a_triangular_solve():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            dtype, (B, T) = q.dtype, q.shape[:2]
            q, k, v, g, beta = (x.transpose(1, 2).float() for x in (q, k, v, g, beta))
            q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
            chunk, pad = 4, -T % 4
            q, k, v = (F.pad(x, (0, 0, 0, pad)).view(B, H, -1, chunk, x.shape[-1]) for x in (q * K**-0.5, k, v))
            g, beta = (F.pad(x, (0, pad)).view(B, H, -1, chunk) for x in (g, beta))
            total = g.cumsum(-1)
            later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
            gap = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
            system = (beta[..., None] * k @ k.mT) * gap
            new = torch.linalg.solve_triangular(system, v * beta[..., None], upper=False, unitriangular=True)
            old = torch.linalg.solve_triangular(
                system, k * (beta * total.exp())[..., None], upper=False, unitriangular=True
            )
            inside = (q @ k.mT) * gap
            state = torch.zeros(B, H, K, V)
            out = torch.zeros_like(new)
            for n in range(new.shape[2]):
                u = new[:, :, n] - old[:, :, n] @ state
                out[:, :, n] = (q[:, :, n] * total[:, :, n, :, None].exp()) @ state + inside[:, :, n] @ u
                rest = (total[:, :, n, -1:] - total[:, :, n]).exp()[..., None]
                state = state * total[:, :, n, -1].exp()[..., None, None] + (k[:, :, n] * rest).mT @ u
            return out.reshape(B, H, -1, V)[:, :, :T].transpose(1, 2).to(dtype), state

    return Memory(), lambda d: operands(d, 11)


@case(decay="head", state="given")
def chunks_heads_first_with_substitution():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            B, _, T, _ = q.shape
            q, k, v = (x.reshape(B, H, T // 3, 3, -1) for x in (q, k, v))
            g, beta = (x.reshape(B, H, T // 3, 3) for x in (g, beta))
            total = g.cumsum(-1)
            lower = torch.ones(3, 3, dtype=q.dtype).tril()
            gap = ((total[..., None] - total[..., None, :]) * lower).exp() * lower
            attn = -((k * beta[..., None]) @ k.transpose(-1, -2) * gap).tril(-1)
            for i in range(1, 3):
                attn[..., i, :i] = attn[..., i, :i] + (attn[..., i, :, None].clone() * attn[..., :, :i].clone()).sum(-2)
            attn = attn + torch.eye(3, dtype=q.dtype)
            fresh = attn @ (v * beta[..., None])
            stale = attn @ (k * (beta * total.exp())[..., None])
            out = []
            for n in range(T // 3):
                u = fresh[:, :, n] - stale[:, :, n] @ state
                mixed = (q[:, :, n] @ k[:, :, n].mT * gap[:, :, n]) @ u
                out.append(q[:, :, n] * total[:, :, n, :, None].exp() @ state + mixed)
                rest = (total[:, :, n, -1:] - total[:, :, n]).exp()[..., None]
                state = total[:, :, n, -1, None, None].exp() * state + (k[:, :, n] * rest).mT @ u
            return torch.cat(out, dim=2), state

    def inputs(d: Draw):
        return (*operands(d, 6, first=True), d.randn(d.B, H, K, V))

    return Memory(), inputs


@case(decay="channel", state="zeros")
def channels_loop_over_tokens():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            memory = torch.zeros(q.shape[0], H, K, V, dtype=q.dtype)
            out = torch.zeros_like(v)
            for t in range(q.shape[1]):
                memory = memory * g[:, t].exp().unsqueeze(-1)
                delta = (v[:, t] - (k[:, t].unsqueeze(-2) @ memory).squeeze(-2)) * beta[:, t].unsqueeze(-1)
                memory = memory + k[:, t].unsqueeze(-1) @ delta.unsqueeze(-2)
                out[:, t] = (q[:, t].unsqueeze(-2) @ memory).squeeze(-2)
            return out

    return Memory(), lambda d: operands(d, 6, channels=True)


@case(decay="head", state="given")
def state_with_values_first():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            for t in range(q.shape[1]):
                state = state * g[:, t, :, None, None].exp()
                error = v[:, t] - (state @ k[:, t, :, :, None])[..., 0]
                state = state + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None, :]
            return (state @ q[:, -1, :, :, None])[..., 0], state

    def inputs(d: Draw):
        return (*operands(d, 1), d.randn(d.B, H, V, K))

    return Memory(), inputs


@case(decay="head", state="zeros")
def negative_eigenvalues_and_gates_of_its_own():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.linspace(-1, 1, H))
            self.bias = nn.Parameter(torch.linspace(0, 1, H))

        def forward(self, q, k, v, a, b):
            g = -self.rate.exp() * F.softplus(a + self.bias)
            beta = 2 * b.sigmoid()
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                memory = memory * g[:, t].exp()[:, :, None, None]
                error = beta[:, t, :, None] * (v[:, t] - (memory * k[:, t, ..., None]).sum(-2))
                memory = memory + k[:, t, ..., None] * error[:, :, None]
                out.append((memory * q[:, t, ..., None]).sum(-2))
            return torch.stack(out, 1)

    return Memory(), lambda d: operands(d, 4)


@case(decay="head", state="zeros", qk_l2norm="none")
def normalised_before():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                memory = memory * g[:, t, :, None, None].exp()
                error = beta[:, t, :, None] * (v[:, t] - (memory * k[:, t, ..., None]).sum(-2))
                memory = memory + k[:, t, ..., None] * error[:, :, None]
                out.append((memory * q[:, t, ..., None]).sum(-2))
            return torch.stack(out, 1)

    return Memory(), lambda d: operands(d, 3)


def pasted(a, b, c, decay, rate, block=4, start=None, with_end=False, unit=False):
    """A pasted reference: other names, the same meaning."""
    kind = a.dtype
    a, b, c, rate, decay = (x.transpose(1, 2).contiguous().to(torch.float32) for x in (a, b, c, rate, decay))
    if unit:
        a = a * torch.rsqrt((a * a).sum(-1, keepdim=True) + 1e-6)
        b = b * torch.rsqrt((b * b).sum(-1, keepdim=True) + 1e-6)
    end = torch.zeros(*b.shape[:2], b.shape[-1], c.shape[-1]) if start is None else start.to(torch.float32)
    made = torch.zeros_like(c)
    for i in range(c.shape[2]):
        end = end * decay[:, :, i].exp()[..., None, None]
        change = (c[:, :, i] - (end * b[:, :, i].unsqueeze(-1)).sum(-2)) * rate[:, :, i].unsqueeze(-1)
        end = end + b[:, :, i].unsqueeze(-1) * change.unsqueeze(-2)
        made[:, :, i] = (end * a[:, :, i].unsqueeze(-1)).sum(-2) * a.shape[-1] ** -0.5
    return made.transpose(1, 2).to(kind), end if with_end else None


@case(decay="head", qk_l2norm="rsqrt", scale=0.5, state="zeros")
def a_pasted_reference():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            return pasted(q, k, v, g, beta, unit=True)[0]

    return Memory(), lambda d: operands(d, 9)


@case(refused=True)
def no_delta_only_decay():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                memory = memory * g[:, t, :, None, None].exp()
                memory = memory + k[:, t, ..., None] * (beta[:, t, :, None] * v[:, t])[:, :, None]
                out.append((memory * q[:, t, ..., None]).sum(-2))
            return torch.stack(out, 1)

    return Memory(), lambda d: operands(d, 3)


@case(refused=True)
def the_memory_is_read_before_it_decays():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                error = beta[:, t, :, None] * (v[:, t] - (memory * k[:, t, ..., None]).sum(-2))
                memory = memory * g[:, t, :, None, None].exp() + k[:, t, ..., None] * error[:, :, None]
                out.append((memory * q[:, t, ..., None]).sum(-2))
            return torch.stack(out, 1)

    return Memory(), lambda d: operands(d, 3)


@case(refused=True)
def the_output_is_that_of_the_token_before():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                memory = memory * g[:, t, :, None, None].exp()
                out.append((memory * q[:, t, ..., None]).sum(-2))
                error = beta[:, t, :, None] * (v[:, t] - (memory * k[:, t, ..., None]).sum(-2))
                memory = memory + k[:, t, ..., None] * error[:, :, None]
            return torch.stack(out, 1), memory

    return Memory(), lambda d: operands(d, 3)


@case(sites=0)
def the_error_is_clamped():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            memory = v.new_zeros(v.shape[0], H, K, V)
            out = []
            for t in range(v.shape[1]):
                memory = memory * g[:, t, :, None, None].exp()
                error = beta[:, t, :, None] * (v[:, t] - (memory * k[:, t, ..., None]).sum(-2)).clamp(-1e3, 1e3)
                memory = memory + k[:, t, ..., None] * error[:, :, None]
                out.append((memory * q[:, t, ..., None]).sum(-2))
            return torch.stack(out, 1), memory

    return Memory(), lambda d: operands(d, 3)
