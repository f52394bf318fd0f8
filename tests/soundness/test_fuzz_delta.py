"""Random spellings of the gated delta rule, and random mutations of them: compiled must equal eager.

What is not mutated must be rewritten. What is mutated may be rewritten only if the numbers stay eager's: refusing is
always allowed. Sizes are drawn so that they often coincide, which is where a wrong reading would show.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sm12x_compile

MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "the decay comes late": lambda s: setattr(s, "decay_late", True),
    "beta is applied twice": lambda s: setattr(s, "beta_power", 2),
    "the error keeps no old value": lambda s: setattr(s, "erase", 0.0),
    "the error keeps half of it": lambda s: setattr(s, "erase", 0.5),
    "the output is read before the update": lambda s: setattr(s, "read_first", True),
    "q is not q": lambda s: setattr(s, "query_power", 2),
    "one token differs": lambda s: setattr(s, "odd_token", True),
    "the decay is of one token before": lambda s: setattr(s, "shift_decay", True),
    "only k is normalised": lambda s: setattr(s, "norm_q", False),
    "k is normalised elsewhere": lambda s: setattr(s, "key_eps", 1e-3),
    "the state is halved at the end": lambda s: setattr(s, "end", 0.5),
    "heads are mixed": lambda s: setattr(s, "mix", True),
    "beta is a decay as well": lambda s: setattr(s, "beta_decays", True),
}


@dataclass
class Spelling:
    """How one function is written; the last block is what a mutation changes."""

    B: int
    T: int
    H: int
    K: int
    V: int
    heads_first: bool
    channels: bool
    norm: str
    scale: float
    einsum: bool
    stack: bool
    given: bool
    returns_state: bool
    transposed: bool
    dtype: torch.dtype

    decay_late: bool = False
    beta_power: int = 1
    erase: float = 1.0
    read_first: bool = False
    query_power: int = 1
    odd_token: bool = False
    shift_decay: bool = False
    norm_q: bool = True
    key_eps: float = 1e-6
    end: float = 1.0
    mix: bool = False
    beta_decays: bool = False

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            return (x.transpose(1, 2) if self.heads_first and len(shape) > 2 else x).to(self.dtype)

        B, T, H, K, V = self.B, self.T, self.H, self.K, self.V
        rate = normal(B, T, H, *((K,) if self.channels else ()))
        state = torch.randn(B, H, *((V, K) if self.transposed else (K, V)), generator=generator)
        made = (normal(B, T, H, K), 0.5 * normal(B, T, H, K), normal(B, T, H, V), -F.softplus(rate),
                torch.sigmoid(normal(B, T, H)))  # fmt: skip
        return (*made, state) if self.given else made

    def unit(self, x: Tensor, eps: float) -> Tensor:
        if self.norm == "rsqrt":
            return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps) if self.norm == "sqrt" else x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Any = None) -> Any:
        dim = 2 if self.heads_first else 1
        dtype = q.dtype
        q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
        q = self.unit(q, 1e-6) if self.norm_q else q
        k = self.unit(k, self.key_eps)
        q = q * self.scale
        if self.shift_decay:
            g = g.roll(1, dim)
        if self.mix:
            k = k.flip(1 if self.heads_first else 2)
        if state is None:
            state = torch.zeros(self.B, self.H, *((self.V, self.K) if self.transposed else (self.K, self.V)))
        rows = []
        out = torch.zeros_like(v)
        for t in range(self.T):
            now = [x.select(dim, t) for x in (q, k, v, g, beta)]
            state, row = self.token(state, t, *now)
            rows.append(row)
            if not self.stack:
                out[(slice(None),) * dim + (t,)] = row
        o = torch.stack(rows, dim) if self.stack else out
        state = state * self.end if self.end != 1 else state
        return (o.to(dtype), state) if self.returns_state else o.to(dtype)

    def token(
        self, S: Tensor, t: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        decay = g.exp()[..., None] if self.channels else g.exp()[..., None, None]
        if self.beta_decays:
            decay = decay * beta[..., None, None]
        if self.transposed:
            decay = decay.transpose(-1, -2)
        if self.odd_token and t == self.T // 2:
            v = v * 1.5
        before = S
        S = S if self.decay_late else S * decay
        error = v - self.erase * self.read(S, k)
        error = error * beta[..., None] ** self.beta_power if self.beta_power != 1 else error * beta[..., None]
        update = error[..., None] * k[..., None, :] if self.transposed else k[..., None] * error[..., None, :]
        new = S * decay + update if self.decay_late else S + update
        query = q**self.query_power if self.query_power != 1 else q
        return new, self.read(before if self.read_first else new, query)

    def read(self, S: Tensor, x: Tensor) -> Tensor:
        if self.einsum:
            return torch.einsum("bhvk,bhk->bhv" if self.transposed else "bhkv,bhk->bhv", S, x)
        return (S * x[..., None, :]).sum(-1) if self.transposed else (S * x[..., None]).sum(-2)


def draw(seed: int) -> Spelling:
    r = random.Random(seed)
    sizes = [r.choice([1, 2, 3, 4]) for _ in range(3)]
    return Spelling(
        *sizes, K=r.choice([3, 4, 6]), V=r.choice([3, 4, 5]), heads_first=r.random() < 0.5, channels=r.random() < 0.4,
        norm=r.choice(["none", "rsqrt", "sqrt"]), scale=r.choice([1.0, 0.5, 0.3]), einsum=r.random() < 0.5,
        stack=r.random() < 0.5, given=r.random() < 0.6, returns_state=r.random() < 0.7,
        transposed=r.random() < 0.3, dtype=r.choice([torch.float32, torch.float32, torch.bfloat16]),
    )  # fmt: skip


def check(spelling: Spelling) -> sm12x_compile.Report:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: spelling(*a), backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True
    )
    with torch.no_grad(), sm12x_compile.collect() as report:
        for seed in range(3):
            given = spelling.inputs(seed)
            ours, eager = compiled(*given), spelling(*given)
            pairs = zip(ours, eager, strict=True) if isinstance(ours, tuple) else [(ours, eager)]
            for mine, theirs in pairs:
                assert mine.dtype == theirs.dtype
                rough = 2e-2 if theirs.dtype == torch.bfloat16 else 2e-5
                largest = float(theirs.abs().max())
                torch.testing.assert_close(
                    mine, theirs, rtol=rough, atol=rough * largest, msg=lambda m: f"{m}\n{report}"
                )
    return report


def found(report: sm12x_compile.Report) -> int:
    return report.count("gated_delta_rule")


CI, NIGHT = range(24), range(1000, 1400)


@pytest.mark.parametrize("seed", CI)
def test_a_spelling_is_rewritten(seed: int):
    report = check(draw(seed))
    assert found(report) == 1, report


@pytest.mark.parametrize("seed", CI)
def test_a_mutation_keeps_the_numbers(seed: int):
    spelling = draw(100 + seed)
    MUTATIONS[list(MUTATIONS)[seed % len(MUTATIONS)]](spelling)
    check(spelling)


def test_mutations_are_mostly_refused():
    """The control: were they all rewritten, the test above would compare the op with itself."""
    refused = 0
    for k, mutate in enumerate(MUTATIONS.values()):
        spelling = draw(300 + k)
        spelling.T, spelling.returns_state, spelling.norm = 4, True, "rsqrt"
        mutate(spelling)
        refused += not found(check(spelling))
    assert refused >= 8


@pytest.mark.nightly
@pytest.mark.parametrize("seed", NIGHT)
def test_spellings_and_mutations_all_night(seed: int):
    assert found(check(draw(seed))) == 1
    spelling = draw(seed)
    random.Random(seed).choice(list(MUTATIONS.values()))(spelling)
    check(spelling)
