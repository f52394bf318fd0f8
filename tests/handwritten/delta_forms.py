"""The gated delta rule written from its papers: as a product of matrices, with factors, inverses, cells and lists."""

from __future__ import annotations

import torch
from torch import nn

from .cases import Draw, Registry

DELTA_FORMS = Registry("gated_delta_rule")
case = DELTA_FORMS.case
H, K, V = 3, 4, 6


def operands(d: Draw, T: int, *, channels: bool = False, heads: int = H, first: bool = False):
    """q, k ``[B, T, heads, K]``, v, g, beta; with `first` heads stand before tokens."""
    rate = d.randn(d.B, T, H, *((K,) if channels else ())).abs()
    made = (
        d.randn(d.B, T, heads, K), d.randn(d.B, T, heads, K), d.randn(d.B, T, H, V), -rate,
        torch.sigmoid(d.randn(d.B, T, H)),
    )  # fmt: skip
    return tuple(x.transpose(1, 2).contiguous() for x in made) if first else made


@case(decay="head", state="zeros")
def householder():
    """S = a S (I - b k k^T) + b v k^T, as Gated Delta Networks prints it."""

    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            eye = torch.eye(K, dtype=q.dtype)
            state = v.new_zeros(v.shape[0], H, V, K)
            out = []
            for t in range(v.shape[1]):
                kt, vt, bt = k[:, t], v[:, t], beta[:, t, :, None, None]
                reflect = eye - bt * kt[..., :, None] * kt[..., None, :]
                state = g[:, t, :, None, None].exp() * (state @ reflect) + bt * vt[..., :, None] * kt[..., None, :]
                out.append((state @ q[:, t, :, :, None]).squeeze(-1))
            return torch.stack(out, 1)

    return Memory(), lambda d: operands(d, 5)


@case(decay="head", state="given")
def factors_from_a_sigmoid():
    class Memory(nn.Module):
        def forward(self, q, k, v, a, beta, state):
            keep = torch.sigmoid(a)
            out = torch.empty_like(v)
            for t in range(v.shape[1]):
                state = state * keep[:, t, :, None, None]
                wrong = v[:, t] - torch.einsum("bhij,bhi->bhj", state, k[:, t])
                state = state + torch.einsum("bhi,bhj,bh->bhij", k[:, t], wrong, beta[:, t])
                out[:, t] = torch.einsum("bhij,bhi->bhj", state, q[:, t])
            return out, state

    return Memory(), lambda d: (*operands(d, 4), d.randn(d.B, H, K, V))


class Cell(nn.Module):
    """One token; the state is handed from call to call."""

    def forward(self, token, state):
        q, k, v, keep, rate = token
        state = keep[..., None, None] * state
        told = torch.matmul(k[..., None, :], state)[..., 0, :]
        state = torch.addcmul(state, k[..., :, None], (rate[..., None] * (v - told))[..., None, :])
        return torch.matmul(q[..., None, :], state)[..., 0, :], state


@case(decay="head", state="zeros")
def a_cell_called_for_every_token():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell()

        def forward(self, q, k, v, g, beta):
            keep, memory, outs = g.exp(), torch.zeros(q.shape[0], H, K, V, dtype=q.dtype), []
            for token in zip(*(torch.unbind(x, dim=1) for x in (q * K**-0.5, k, v, keep, beta)), strict=True):
                out, memory = self.cell(token, memory)
                outs.append(out.unsqueeze(1))
            return torch.cat(outs, dim=1)

    return Memory(), lambda d: operands(d, 6)


@case(decay="head", state="given")
def beta_in_keys_and_values():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            kb, vb = k * beta[..., None], v * beta[..., None]
            outs = []
            for t in range(q.shape[1]):
                state = torch.exp(g[:, t])[:, :, None, None] * state
                u = vb[:, t] - (kb[:, t].unsqueeze(2) @ state).squeeze(2)
                state = state + k[:, t].unsqueeze(3) * u.unsqueeze(2)
                outs.append((q[:, t].unsqueeze(2) @ state).squeeze(2))
            return torch.stack(outs, dim=1), state

    return Memory(), lambda d: (*operands(d, 4), d.randn(d.B, H, K, V))


def chunked(q, k, v, g, beta, size, solve, state=None):
    """Heads first, whole chunks; `solve` makes u and w of the chunk's system."""
    rows = [x.split(size, dim=2) for x in (q, k, v, g, beta)]
    later = torch.triu(torch.ones(size, size, dtype=torch.bool), diagonal=1)
    state = v.new_zeros(v.shape[0], H, V, K) if state is None else state
    outs = []
    for qc, kc, vc, gc, bc in zip(*rows, strict=True):
        G = torch.cumsum(gc, dim=-1)
        ratio = torch.exp((G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(later, -torch.inf))
        A = torch.tril(torch.einsum("bhid,bhjd->bhij", kc * bc[..., None], kc) * ratio, diagonal=-1)
        right = bc[..., None] * (vc - torch.exp(G)[..., None] * torch.einsum("bhid,bhvd->bhiv", kc, state))
        wide = torch.promote_types(A.dtype, torch.float32)
        u = solve(A.to(wide), right.to(wide)).to(A.dtype)
        scores = torch.einsum("bhid,bhjd->bhij", qc, kc) * ratio
        outs.append(torch.exp(G)[..., None] * torch.einsum("bhid,bhvd->bhiv", qc, state) + scores @ u)
        rest = torch.exp(G[..., -1:] - G)[..., None]
        state = torch.exp(G[..., -1])[..., None, None] * state + torch.einsum("bhiv,bhid->bhvd", u * rest, kc)
    return torch.cat(outs, dim=2), state


@case(decay="head", state="zeros")
def chunks_in_lists_with_an_inverse():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            return chunked(q, k, v, g, beta, 4, lambda A, x: torch.inverse(torch.eye(4, dtype=A.dtype) + A) @ x)[0]

    return Memory(), lambda d: operands(d, 8, first=True)


@case(decay="head", state="given")
def chunks_in_lists_with_a_general_solver():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            return chunked(
                q, k, v, g, beta, 3, lambda A, x: torch.linalg.solve(torch.eye(3, dtype=A.dtype) + A, x), state
            )

    return Memory(), lambda d: (*operands(d, 6, first=True), d.randn(d.B, H, V, K))


@case(decay="head", state="zeros")
def chunks_in_lists_with_a_series():
    """(I + A)^-1 = (I - A)(I + A^2) for four tokens."""

    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            def solve(A, x):
                x = x - A @ x
                return x + A @ (A @ x)

            return chunked(q, k, v, g, beta, 4, solve)[0]

    return Memory(), lambda d: operands(d, 8, first=True)


@case(decay="head", state="given")
def one_sequence_without_a_batch():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            rows = []
            for t in range(q.shape[0]):
                state = state * g[t].exp()[:, None, None]
                u = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
                state = state + torch.einsum("hk,hv->hkv", k[t], u)
                rows.append(torch.einsum("hkv,hk->hv", state, q[t]))
            return torch.stack(rows), state

    def inputs(d: Draw):
        d.B = 1
        return (*(x[0] for x in operands(d, 4)), d.randn(H, K, V))

    return Memory(), inputs


@case(decay="channel", state="given")
def channels_with_a_householder_step():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta, state):
            decayed = g.exp()[..., None] * state
            change = torch.eye(K, dtype=q.dtype) - beta[..., None, None] * (k[..., None] @ k[..., None, :])
            new = change @ decayed + beta[..., None, None] * (k[..., None] @ v[..., None, :])
            return (q[..., None, :] @ new)[..., 0, :], new

    def inputs(d: Draw):
        return (*(x[:, 0] for x in operands(d, 1, channels=True)), d.randn(d.B, H, K, V))

    return Memory(), inputs


@case(decay="head", state="in place")
def a_buffer_written_by_methods():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.zeros(2, H, K, V))

        def forward(self, q, k, v, g, beta):
            q, k, v, g, beta = (x.squeeze(1) for x in (q, k, v, g, beta))
            self.memory.mul_(g.exp()[:, :, None, None])
            u = (v - torch.einsum("bhkv,bhk->bhv", self.memory, k)).mul(beta.unsqueeze(-1))
            self.memory.add_(k.unsqueeze(-1) * u.unsqueeze(-2))
            return torch.einsum("bhkv,bhk->bhv", self.memory, q)

    def inputs(d: Draw):
        d.B = 2
        return [operands(d, 1) for _ in range(3)]

    return Memory(), inputs


@case(decay="head", state="zeros", groups=3)
def fewer_keys_repeated_inside():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            state = torch.zeros(v.shape[0], H, K, V, dtype=v.dtype)
            outs = []
            for t in range(v.shape[1]):
                kt, qt = (x[:, t].expand(-1, H, -1) for x in (k, q))
                state = state * g[:, t].exp()[..., None, None]
                u = beta[:, t, :, None] * (v[:, t] - (state * kt[..., None]).sum(2))
                state = state + kt[..., None] * u[:, :, None]
                outs.append((state * qt[..., None]).sum(2))
            return torch.stack(outs, 1)

    return Memory(), lambda d: operands(d, 4, heads=1)


@case(refused=True)
def decayed_after_the_update():
    class Memory(nn.Module):
        def forward(self, q, k, v, g, beta):
            state = v.new_zeros(v.shape[0], H, K, V)
            outs = []
            for t in range(v.shape[1]):
                u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
                state = (state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)) * g[:, t, :, None, None].exp()
                outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
            return torch.stack(outs, 1)

    return Memory(), lambda d: operands(d, 3)


@case(refused=True)
def factors_that_may_be_negative():
    class Memory(nn.Module):
        def forward(self, q, k, v, keep, beta, state):
            state = state * keep[..., None, None]
            u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
            state = state + torch.einsum("bhk,bhv->bhkv", k, u)
            return torch.einsum("bhkv,bhk->bhv", state, q), state

    return Memory(), lambda d: (*(x[:, 0] for x in operands(d, 1)), d.randn(d.B, H, K, V))
