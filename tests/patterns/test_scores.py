"""Scores read from the outside in: what is read, put together again, is what was computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.index_algebra import Element, Index, Var
from sm12x_compile.index_algebra.predicate import AtMostZero, Holds
from sm12x_compile.match import Refusal
from sm12x_compile.normalize import normalize
from sm12x_compile.patterns.scores import Scores, read_scores, read_sink, read_terms

B, H, S, T, D = 1, 2, 3, 4, 2
INF = math.inf


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


class Reading:
    """The scores of a function, and the values of everything on one set of inputs."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype | None = None) -> None:
        gm = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))
        recorder = _Recorder(gm)
        self.result: Tensor = recorder.run(*inputs)
        self.values = recorder.values
        (self.node,) = gm.graph.output_node().all_input_nodes
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.variables = [Var(name, n) for name, n in zip("bhst", self.result.shape, strict=True)]
        self.key = self.variables[-1]
        self.read = read_scores(Element(self.node, tuple(map(Index.of, self.variables))), self.key, dtype)

    @property
    def scores(self) -> Scores:
        assert isinstance(self.read, Scores), self.read
        return self.read

    @property
    def reason(self) -> str:
        assert isinstance(self.read, Refusal), self.read
        return self.read.reason

    def at(self, index: Index, assigned: dict[Var, int]) -> int:
        return int(index.const) + sum(int(c) * assigned[v] for v, c in index.terms.items())

    def value(self, element: Element, assigned: dict[Var, int]) -> Any:
        return self.values[element.node][tuple(self.at(ix, assigned) for ix in element.index)].item()

    def holds(self, p: Any, assigned: dict[Var, int]) -> bool:
        if isinstance(p, AtMostZero):
            return self.at(p.index, assigned) <= 0
        if isinstance(p, Holds):
            return bool(self.value(p.element, assigned)) == p.expected
        parts = [self.holds(q, assigned) for q in p.parts]
        return all(parts) if type(p).__name__ == "All" else any(parts)

    def rebuilt(self, assigned: dict[Var, int]) -> tuple[float, bool]:
        """The score at a place, without what was subtracted; and whether a mask is on it."""
        read = self.scores
        total = 0.0
        for place in itertools.product(*(range(int(v.extent)) for v in read.summed)):
            inner = {**assigned, **dict(zip(read.summed, place, strict=True))}
            total += self.value(read.q, inner) * self.value(read.k, inner)
        total *= read.scale
        if read.softcap:
            total = read.softcap * math.tanh(total / read.softcap)
        masked = False
        for element, factor in read.biases:
            total += factor * self.value(element, assigned)
        for mask in read.masks:
            if not self.holds(mask.keep, assigned):
                masked = True
                total = mask.drop_value if mask.filled else total + mask.drop_value
        return total, masked

    def check(self) -> Reading:
        """Every row: equal up to one number for the row where nothing is masked, and far below where it is."""
        shape = self.result.shape
        for row in itertools.product(*map(range, shape[:-1])):
            gaps = []
            for t in range(shape[-1]):
                place = (*row, t)
                found, masked = self.rebuilt(dict(zip(self.variables, place, strict=True)))
                real = self.result[place].item()
                if masked:
                    assert found <= -5e3 and real <= -5e3, (place, found, real)
                else:
                    gaps.append(found - real)
            if gaps:
                assert max(gaps) - min(gaps) < 1e-9, (row, gaps)
                if not self.scores.shifts:
                    assert abs(gaps[0]) < 1e-9, (row, gaps)
        return self


def inputs() -> tuple[Tensor, ...]:
    """q, k, a bias for every score, one a head, a mask of scores and one of keys, all in fp64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (randn(B, H, S, D), randn(B, H, T, D), randn(B, H, S, T), randn(H), randn(B, 1, S, T) > 0.6,
            torch.tensor([False, True, False, False]))  # fmt: skip


def read(function: Callable[..., Tensor], **given_: Any) -> Reading:
    return Reading(function, *inputs(), **given_)


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


# ------------------------------------------------------------------ scale and softcap

SCALED: dict[str, tuple[Callable[..., Tensor], float]] = {
    "nothing": (lambda q, k, *_: q @ k.mT, 1.0),
    "multiplied": (lambda q, k, *_: q @ k.mT * 0.5, 0.5),
    "from the left": (lambda q, k, *_: 0.5 * (q @ k.mT), 0.5),
    "divided": (lambda q, k, *_: q @ k.mT / 4, 0.25),
    "q": (lambda q, k, *_: (q * 0.5) @ k.mT, 0.5),
    "k, laid out afterwards": (lambda q, k, *_: q @ (k / 8).mT, 0.125),
    "both": (lambda q, k, *_: (q * 0.5) @ (k * 0.25).mT, 0.125),
    "before and after": (lambda q, k, *_: (q * 3) @ k.mT / 6, 0.5),
    "a power": (lambda q, k, *_: q @ k.mT * D**-0.5, D**-0.5),
    "a root in the graph": (lambda q, k, *_: q @ k.mT / torch.tensor(4.0, dtype=q.dtype).sqrt(), 0.5),
    "negative twice": (lambda q, k, *_: (q * -1) @ k.mT * -0.5, 0.5),
    "einsum": (lambda q, k, *_: torch.einsum("bhsd,bhtd->bhst", q, k) * 2, 2.0),
    "baddbmm": (
        lambda q, k, *_: torch.baddbmm(q.new_zeros(H, S, T), q[0], k[0].mT, beta=0, alpha=0.5)[None], 0.5
    ),
    "multiplied and summed": (lambda q, k, *_: (q[:, :, :, None] * k[:, :, None] * 1.0).sum(-1), 1.0),
    "cast": (lambda q, k, *_: (q @ k.mT).to(torch.float64) * 0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in SCALED if n != "multiplied and summed"])
def test_scales(name: str) -> None:
    function, scale = SCALED[name]
    scores = read(function).check().scores
    assert scores.scale == pytest.approx(scale)
    assert (scores.softcap, scores.masks, scores.biases, scores.shifts) == (0.0, (), (), ())
    assert scores.k.vars() & scores.q.vars() >= set(scores.summed)
    assert scores.product is not None


def test_q_and_k_are_told_apart_by_the_key() -> None:
    reading = read(lambda q, k, *_: (k @ q.mT).mT).check()
    assert reading.key in reading.scores.k.vars() and reading.key not in reading.scores.q.vars()
    assert reading.scores.q.node is reading.inputs[0] and reading.scores.k.node is reading.inputs[1]


@pytest.mark.parametrize(
    ("function", "cap", "scale"),
    [
        (lambda q, k, *_: torch.tanh(q @ k.mT / 5) * 5, 5.0, 1.0),
        (lambda q, k, *_: 3 * torch.tanh(q @ k.mT * 0.5), 3.0, 1.5),
        (lambda q, k, *_: torch.tanh(q @ k.mT), 1.0, 1.0),
        (lambda q, k, *_: torch.tanh((q * 2) @ k.mT / 6) * 6 / 2, 3.0, 1.0),
    ],
)
def test_softcaps(function: Callable[..., Tensor], cap: float, scale: float) -> None:
    scores = read(function).check().scores
    assert (scores.softcap, scores.scale) == (pytest.approx(cap), pytest.approx(scale))


# ------------------------------------------------------------------ masks, biases, shifts


def test_biases() -> None:
    scores = read(lambda q, k, b, h, *_: q @ k.mT * 0.5 + b).check().scores
    assert [f for _, f in scores.biases] == [1.0]
    scores = read(lambda q, k, b, h, *_: b + q @ k.mT + h[:, None, None]).check().scores
    assert [f for _, f in scores.biases] == [1.0, 1.0]
    scores = read(lambda q, k, b, h, *_: (q @ k.mT - b) * 0.25).check().scores
    assert (scores.scale, [f for _, f in scores.biases]) == (0.25, [-0.25])
    scores = read(lambda q, k, b, h, *_: q @ k.mT + (b + h[:, None, None])).check().scores
    assert len(scores.biases) == 2
    scores = read(lambda q, k, b, h, *_: torch.tanh(q @ k.mT) * 2 + b).check().scores
    assert (scores.softcap, len(scores.biases)) == (2.0, 1)
    assert read(lambda q, k, *_: q @ k.mT + 0.0).check().scores.biases == ()


def test_a_constant_is_no_bias() -> None:
    """A number for all keys changes no softmax, so it is read as nothing."""
    reading = read(lambda q, k, *_: q @ k.mT + 3.0)
    assert reading.scores.biases == () and reading.scores.masks == ()


@pytest.mark.parametrize("low", [-INF, -1e9, torch.finfo(torch.float32).min, -4e4])
def test_masks(low: float) -> None:
    filled = read(lambda q, k, b, h, m, p: (q @ k.mT).masked_fill(m, low)).check().scores
    (mask,) = filled.masks
    assert (mask.drop_value, mask.filled, mask.source_keeps) == (low, True, False)
    kept = read(lambda q, k, b, h, m, p: torch.where(~m, q @ k.mT, low)).check().scores
    assert kept.masks[0].source_keeps and kept.masks[0].filled
    added = read(lambda q, k, b, h, m, p: q @ k.mT + torch.where(m, low, 0.0)).check().scores
    (mask,) = added.masks
    assert (mask.drop_value, mask.filled) == (low, False)
    two = read(lambda q, k, b, h, m, p: (q @ k.mT).masked_fill(m, low) + torch.where(p, low, 0.0)).check().scores
    assert [m.filled for m in two.masks] == [False, True]


def test_masks_are_scaled_with_what_follows() -> None:
    (mask,) = read(lambda q, k, b, h, m, p: (q @ k.mT).masked_fill(m, -1e9) * 0.5).check().scores.masks
    assert mask.drop_value == -5e8
    (mask,) = read(lambda q, k, b, h, m, p: (q @ k.mT + torch.where(m, -1e9, 0.0)) * 0.25).check().scores.masks
    assert mask.drop_value == -2.5e8
    (mask,) = read(lambda q, k, b, h, m, p: q @ k.mT - torch.where(m, 1e9, 0.0)).check().scores.masks
    assert mask.drop_value == -1e9
    assert "not low enough" in read(lambda q, k, b, h, m, p: (q @ k.mT).masked_fill(m, -1e5) * 1e-3).reason


def test_small_numbers_are_biases_not_masks() -> None:
    scores = read(lambda q, k, b, h, m, p: q @ k.mT + torch.where(m, -100.0, 0.0)).check().scores
    assert scores.masks == () and len(scores.biases) == 1
    scores = read(lambda q, k, b, h, m, p: q @ k.mT + torch.where(m, -1e9, 1.0)).check().scores
    assert scores.masks == () and len(scores.biases) == 1, "keeps what is not zero"


@pytest.mark.parametrize(
    ("dtype", "value", "at_the_softmax"),
    [
        (torch.float16, -1e5, -INF), (torch.float16, -6e4, -6e4), (torch.float32, -1e39, -INF),
        (torch.bfloat16, -3e38, -3e38), (None, -1e39, -1e39),
    ],
)  # fmt: skip
def test_numbers_beyond_the_softmax_dtype_are_infinite(
    dtype: torch.dtype | None, value: float, at_the_softmax: float
) -> None:
    (mask,) = read(lambda q, k, b, h, m, p: (q @ k.mT).masked_fill(m, value), dtype=dtype).scores.masks
    assert mask.drop_value == at_the_softmax


def test_shifts() -> None:
    reading = read(lambda q, k, *_: (lambda s: s - s.amax(-1, keepdim=True))(q @ k.mT)).check()
    assert [f for f, _ in reading.scores.shifts] == [1.0] and reading.scores.max_subtracted
    reading = read(lambda q, k, *_: (lambda s: (s - s.max(-1, keepdim=True).values) * 0.5)(q @ k.mT)).check()
    assert [f for f, _ in reading.scores.shifts] == [0.5] and reading.scores.max_subtracted
    reading = read(lambda q, k, b, *_: q @ k.mT - b.amax(-1, keepdim=True)).check()
    assert len(reading.scores.shifts) == 1 and not reading.scores.max_subtracted
    reading = read(lambda q, k, b, h, *_: q @ k.mT - h[:, None, None]).check()
    assert len(reading.scores.shifts) == 1 and not reading.scores.max_subtracted
    for other in (
        lambda s: s - s.amax(-2, keepdim=True),  # the maximum of another dimension depends on the key
        lambda s: s - s.amin(-1, keepdim=True),
        lambda s: s - (s * 2).amax(-1, keepdim=True),
    ):
        found = read(lambda q, k, *_, other=other: other(q @ k.mT)).read
        assert isinstance(found, Refusal) or not found.max_subtracted
    reading = read(lambda q, k, b, h, m, p: (lambda s: s - s.amax(-1, keepdim=True))((q @ k.mT).masked_fill(p, -1e9)))
    assert reading.check().scores.max_subtracted and len(reading.scores.masks) == 1
    reading = read(lambda q, k, *_: (lambda s: (s - s.amax(-1, keepdim=True)) * -1.0)((q * -1.0) @ k.mT)).check()
    assert not reading.scores.max_subtracted, "turned over, the greatest is the least"


def test_the_maximum_with_a_sink() -> None:
    def function(q: Tensor, k: Tensor, b: Tensor, h: Tensor, *_: Tensor) -> Tensor:
        s = q @ k.mT
        return s - torch.maximum(s.amax(-1, keepdim=True), h[:, None, None])

    assert read(function).check().scores.max_subtracted


# ------------------------------------------------------------------ sinks and added tensors


def element_of(reading: Reading) -> Element:
    return Element(reading.node, tuple(map(Index.of, reading.variables)))


def test_sinks() -> None:
    plain = read(lambda q, k, b, h, *_: h[None, :, None, None].expand(B, H, S, 1).float())
    found = read_sink(element_of(plain))
    assert isinstance(found, tuple)
    assert found[0].node is plain.inputs[3] and found[1] == ()
    shifted = read(lambda q, k, b, h, *_: h[None, :, None, None] - b.amax(-1, keepdim=True))
    found = read_sink(element_of(shifted))
    assert isinstance(found, tuple)
    assert found[0].node is shifted.inputs[3] and [f for f, _ in found[1]] == [1.0]
    rounded = read(lambda q, k, b, h, *_: h[None, :, None, None].expand(B, H, S, 1).int().double())
    found = read_sink(element_of(rounded))
    assert isinstance(found, tuple) and found[0].node is not rounded.inputs[3]
    number = read(lambda q, k, b, h, *_: 1.0 - h[None, :, None, None].expand(B, H, S, 1))
    assert isinstance(read_sink(element_of(number)), Refusal)


def test_added_tensors() -> None:
    mixed = read(lambda q, k, b, h, m, p: torch.where(m, -INF, 0.0) + b + torch.where(p, -1e9, 0.0))
    found = read_terms(element_of(mixed))
    assert not isinstance(found, Refusal)
    assert [m.drop_value for m in found.masks] == [-INF, -1e9] and len(found.biases) == 1
    zero = read_terms(element_of(read(lambda q, k, b, *_: torch.zeros_like(b))))
    assert not isinstance(zero, Refusal) and (zero.masks, zero.biases) == ((), ())
    infinite = read_terms(element_of(read(lambda q, k, b, *_: torch.full_like(b, -INF))))
    assert isinstance(infinite, Refusal)


# ------------------------------------------------------------------ any order of them

STEPS: dict[str, Callable[..., Tensor]] = {
    "half": lambda s, q, k, b, h, m, p: s * 0.5,
    "divided": lambda s, q, k, b, h, m, p: s / 1.5,
    "from the left": lambda s, q, k, b, h, m, p: 2.0 * s,
    "bias": lambda s, q, k, b, h, m, p: s + b,
    "bias first": lambda s, q, k, b, h, m, p: b * 0.5 + s,
    "minus bias": lambda s, q, k, b, h, m, p: s - h[:, None, None] * b,
    "filled": lambda s, q, k, b, h, m, p: s.masked_fill(m, -INF),
    "filled low": lambda s, q, k, b, h, m, p: s.masked_fill(p, -1e38),
    "where": lambda s, q, k, b, h, m, p: torch.where(~m, s, -1e38),
    "added mask": lambda s, q, k, b, h, m, p: s + torch.where(p, -1e38, 0.0),
    "causal": lambda s, q, k, b, h, m, p: s + torch.full((S, T), -INF, dtype=s.dtype).triu(2),
    "softcap": lambda s, q, k, b, h, m, p: torch.tanh(s / 3.0) * 3.0,
    "maximum": lambda s, q, k, b, h, m, p: s - s.amax(-1, keepdim=True),
    "shift": lambda s, q, k, b, h, m, p: s - h[:, None, None],
    "cast": lambda s, q, k, b, h, m, p: s.double(),
    "transposed": lambda s, q, k, b, h, m, p: s.mT.contiguous().mT,
    "negated": lambda s, q, k, b, h, m, p: -s,
    "tensor": lambda s, q, k, b, h, m, p: s * h[:, None, None],
}  # fmt: skip


def test_random_orders() -> None:
    """Whatever is read is what was computed; what is refused is no harm, unless it is nearly everything."""
    was_read: list[bool] = []

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
    def run(steps: Sequence[str]) -> None:
        def function(*given_: Tensor) -> Tensor:
            s = product(*given_[:2])
            for step in steps:
                s = STEPS[step](s, *given_)
            return s

        reading = read(function)
        was_read.append(isinstance(reading.read, Scores) and not bool(torch.isnan(reading.result).any()))
        if was_read[-1]:
            reading.check()

    run()
    assert sum(was_read) >= 40
