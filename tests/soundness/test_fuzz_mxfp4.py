"""Random decodings of four-bit weights, right ones and mutated ones: compiled must equal eager; refusing is allowed.

A decoding is drawn as independent choices: how nibbles are taken and joined, what a code means, what a scale means, in
which order these are applied, how the weight is stored and used. A mutation changes one of them into something that is
not MXFP4. The report counts how many right ones were recognised, so that refusing everything fails as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sm12x_compile

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
N, K = 12, 96

LOW: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda b: b & 15,
    "remainder": lambda b: b % 16,
    "wide": lambda b: torch.bitwise_and(b.to(torch.int64), 0x0F),
    "subtract": lambda b: b.int() - (b.int() // 16) * 16,
    "seven_bits": lambda b: b & 7,  # wrong
    "high": lambda b: b >> 4,  # wrong
}
HIGH: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda b: b >> 4,
    "divide": lambda b: torch.div(b, 16, rounding_mode="floor"),
    "wide": lambda b: (b.to(torch.int32) >> 4) & 15,
    "shift_three": lambda b: (b >> 3) & 15,  # wrong
    "low": lambda b: b & 15,  # wrong
}
JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stack": lambda a, b: torch.stack([a, b], -1).flatten(-2),
    "cat": lambda a, b: torch.cat([a.unsqueeze(-1), b.unsqueeze(-1)], -1).view(*a.shape[:-1], -1),
    "where": lambda a, b: torch.where(
        torch.arange(2 * a.shape[-1]) % 2 == 0, a.repeat_interleave(2, -1), b.repeat_interleave(2, -1)
    ),
    "written": lambda a, b: _written(a, b),
    "halves": lambda a, b: torch.cat([a, b], -1),  # wrong
    "swapped": lambda a, b: torch.stack([b, a], -1).flatten(-2),  # wrong
    "rolled": lambda a, b: torch.stack([a, b], -1).flatten(-2).roll(1, -1),  # wrong
}
CODE: dict[str, Callable[[Tensor], Tensor]] = {
    "table": lambda c: torch.tensor(VALUES)[c.long()],
    "embedding": lambda c: F.embedding(c.int(), torch.tensor(VALUES)[:, None]).squeeze(-1),
    "sign_and_magnitude": lambda c: torch.tensor(VALUES[:8])[(c % 8).long()] * (1 - 2 * (c // 8).float()),
    "formula": lambda c: _formula(c),
    "doubled": lambda c: torch.tensor([2 * v for v in VALUES])[c.long()] / 2,
    "int4": lambda c: c.float() - 8,  # wrong
    "five": lambda c: torch.tensor([5.0 if v == 6 else v for v in VALUES])[c.long()],  # wrong
    "unsigned": lambda c: torch.tensor(VALUES)[c.long()].abs(),  # wrong
}
SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp2": lambda s: torch.exp2(s.float() - 127),
    "ldexp": lambda s: torch.ldexp(torch.ones_like(s, dtype=torch.float32), s.int() - 127),
    "power": lambda s: 2.0 ** (s.double() - 127).float(),
    "bits": lambda s: (s.int() << 23).view(torch.float32),
    "dtype": lambda s: s.view(torch.float8_e8m0fnu).to(torch.float32),
    "product": lambda s: torch.exp2(s.float() - 137) * 2.0**10,
    "bias_128": lambda s: torch.exp2(s.float() - 128),  # wrong
    "e4m3": lambda s: s.view(torch.float8_e4m3fn).float(),  # wrong
    "linear": lambda s: s.float() / 127,  # wrong
    "clamped": lambda s: torch.exp2(s.float().clamp(120, 130) - 127),  # wrong
    "odd_rounded": lambda s: torch.exp2((s & 254).float() - 127),  # wrong
}
SPREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda f: f.repeat_interleave(32, -1),
    "expand": lambda f: f.unsqueeze(-1).expand(*f.shape, 32).flatten(-2),
    "tiled": lambda f: f.repeat(*[1] * (f.dim() - 1), 32),  # wrong
    "flipped": lambda f: f.flip(-1).repeat_interleave(32, -1),  # wrong
    "other_rows": lambda f: f.roll(1, 0).repeat_interleave(32, -1),  # wrong
    "shifted": lambda f: f.repeat_interleave(32, -1).roll(16, -1),  # wrong
}
USE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.mT,
    "einsum": lambda x, w: torch.einsum("...k,nk->...n", x, w),
    "two_halves": lambda x, w: F.linear(x, w[: N // 2]) + F.linear(x, w[N // 2 :]),
    "column_slice": lambda x, w: F.linear(x[..., :32], w[:, :32]),  # right, but may be refused
    "transposed": lambda x, w: F.linear(x[..., :N], w.mT),  # right, but not along the blocks
}
CHOICES = {"low": LOW, "high": HIGH, "join": JOIN, "code": CODE, "scale": SCALE, "spread": SPREAD, "use": USE}
WRONG = {
    "low": ("seven_bits", "high"), "high": ("shift_three", "low"), "join": ("halves", "swapped", "rolled"),
    "code": ("int4", "five", "unsigned"), "scale": ("bias_128", "e4m3", "linear", "clamped", "odd_rounded"),
    "spread": ("tiled", "flipped", "other_rows", "shifted"), "use": ("column_slice", "transposed"),
}  # fmt: skip


def _written(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(*a.shape[:-1], 2 * a.shape[-1], dtype=a.dtype)
    out[..., 1::2] = b
    out[..., ::2] = a
    return out


def _formula(c: Tensor) -> Tensor:
    c = c.int()
    exponent, mantissa = (c >> 1) & 3, (c & 1).float()
    value = torch.where(exponent > 0, torch.exp2(exponent.float() - 1) * (1 + mantissa / 2), mantissa / 2)
    return torch.where(c >= 8, -value, value)


@dataclass(frozen=True)
class Drawn:
    """A decoding and its use.

    Attributes:
        names: the choice for each part.
        codes_first: codes are looked up before the nibbles are joined.
        dtype: of the weight.
        blocks: stored as ``[N, K / 32, 16]``.
    """

    names: tuple[tuple[str, str], ...]
    codes_first: bool
    dtype: torch.dtype
    blocks: bool

    @property
    def right(self) -> bool:
        return all(name not in WRONG[part] for part, name in self.names)

    def weight(self, packed: Tensor, scales: Tensor) -> Tensor:
        c = {part: CHOICES[part][name] for part, name in self.names if part != "use"}
        packed = packed.flatten(-2) if self.blocks else packed
        low, high = c["low"](packed), c["high"](packed)
        if self.codes_first:
            values = c["join"](c["code"](low), c["code"](high))
        else:
            values = c["code"](c["join"](low.int(), high.int()))
        return (values * c["spread"](c["scale"](scales))).to(self.dtype)


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)
    names = {part: rng.choice([n for n in of if n not in WRONG[part]]) for part, of in CHOICES.items()}
    if rng.random() < 0.6:
        part = rng.choice(list(WRONG))
        names[part] = rng.choice(WRONG[part])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return Drawn(tuple(names.items()), rng.random() < 0.5, dtype, rng.random() < 0.5)


class Layer(nn.Module):
    def __init__(self, drawn: Drawn, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
        self.register_buffer("packed", packed.unflatten(-1, (-1, 16)) if drawn.blocks else packed)
        scales = torch.randint(110, 125, (N, K // 32), dtype=torch.uint8, generator=generator)
        self.register_buffer("scales", scales)
        self.drawn, self.use = drawn, USE[dict(drawn.names)["use"]]

    def forward(self, x: Tensor) -> Tensor:
        w = self.drawn.weight(self.packed, self.scales)
        return self.use(x.to(w.dtype), w)


def check(seed: int) -> tuple[bool, int]:
    """Whether the decoding is right, and how many products were given packed weights."""
    drawn = draw(seed)
    layer, x = Layer(drawn, seed), torch.randn(2, 3, K, generator=torch.Generator().manual_seed(seed))
    torch._dynamo.reset()
    with torch.no_grad(), sm12x_compile.collect() as report:
        ours = torch.compile(layer, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(x)
        eager = layer(x)
    assert not report.warnings, (drawn, report.warnings)
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    bound = 8 * torch.finfo(eager.dtype).eps * eager.abs().nan_to_num(0).max().item()
    torch.testing.assert_close(ours, eager, rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"{drawn}: {m}")
    found = report.count("mxfp4_linear")
    if dict(drawn.names)["use"] not in WRONG["use"]:
        assert drawn.right or not found, f"recognised what is not MXFP4: {drawn}"
    return drawn.right, found


def run(seeds: range) -> None:
    outcomes = [check(seed) for seed in seeds]
    right = [found for is_right, found in outcomes if is_right]
    assert len(right) > len(outcomes) // 5
    assert sum(f > 0 for f in right) >= 0.95 * len(right), f"{sum(f > 0 for f in right)} of {len(right)} recognised"


def test_drawn_decodings() -> None:
    run(range(25))


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(1000, 2000, 100))
def test_many_drawn_decodings(start: int) -> None:
    run(range(start, start + 100))
