"""The delta rule's Triton kernels against the recurrence, token by token in fp64: interpreted, and native on a GPU.

The bound is the relative error of a whole result. Interpreted runs are in fp32, where sums of a few hundred products
stay below 5e-6; native ones are in bf16, where the state, the keys and the inverse are rounded before every product.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import by_name, of_device
from sm12x_compile.lowering.triton.delta_tiles import ChunkTiles, StepTiles, Tile, chunk_tiles, keys_fit, step_tiles

from .test_triton_numerics import Runner, run  # noqa: F401 (the fixture)

CHUNKED = "sm12x_compile.lowering.triton.delta_chunked"
CALLS = "tests.lowering.delta_calls"
BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NORMS = ("none", "rsqrt", "sqrt")


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of a call. `beta` None is random in (0, 1); `layout` is how q, k and v lie in memory."""

    name: str
    B: int = 1
    T: int = 100
    Hk: int = 1
    Hv: int = 2
    K: int = 16
    V: int = 16
    kda: bool = False
    decay: float = 0.1
    beta: float | None = None
    alike: float = 0.0  # how much of every key is the same
    state: torch.dtype | None = torch.float32
    norm: str = "rsqrt"
    bounds: tuple[int, ...] | None = None
    layout: str = "contiguous"
    parts: int = 1

    @property
    def loose(self) -> float:
        """A factor of the bound: running sums of strong decays have fewer digits, nearly equal keys cancel."""
        return 100.0 if self.decay > 5 else 8.0 if self.alike else 1.0


PLAIN = [
    *(Case(f"{T} tokens", T=T) for T in (1, 63, 64, 65, 130)),
    Case("packed q, k, v", layout="packed", T=70, Hv=1),
    Case("heads first", layout="heads first", T=70),
    Case("strided", layout="strided", T=70),
    Case("groups of three", Hk=2, Hv=6, T=70),
    Case("two rows, no initial state", B=2, T=70, state=None, norm="none"),
    Case("bf16 state, wide keys", K=32, state=torch.bfloat16, norm="sqrt"),
    Case("wide values", V=32, decay=1e-3),
    Case("256 channels", T=70, Hv=1, K=256),
    Case("strong decay", decay=30.0),
    Case("decay that underflows", decay=3000.0),
    Case("beta near 0", beta=1e-4),
    Case("beta 1, keys alike", beta=1.0, alike=0.95, decay=1e-3),
    Case("beta 2, keys alike", beta=2.0, alike=0.95, decay=1e-3),
    Case("packed sequences", T=200, bounds=(0, 3, 3, 67, 200)),
    Case("parts", T=300, parts=3, decay=0.01),
    Case("parts of two rows", B=2, T=260, parts=5, decay=0.01),
    Case("parts of packed sequences", T=300, parts=2, bounds=(0, 5, 5, 130, 300), decay=0.01),
]
EVERY = [replace(case, name=f"{'kda' if kda else 'gdn'}, {case.name}", kda=kda) for case in PLAIN for kda in (0, 1)]


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """q, k, v, g, beta."""
    B, T, Hk, Hv, K, V = case.B, case.T, case.Hk, case.Hv, case.K, case.V
    generator = torch.Generator().manual_seed(T + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid(x: Tensor) -> Tensor:
        if case.layout == "heads first":
            return x.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "strided":
            return x.to(device, dtype).repeat_interleave(3, dim=-1)[..., ::3]
        return x.to(device, dtype).contiguous()

    q, k, v = randn(B, T, Hk, K), randn(B, T, Hk, K), randn(B, T, Hv, V)
    k = (case.alike * k[:, :1] + (1 - case.alike) * k) if case.alike else k
    if case.norm == "none":
        k = k / k.norm(dim=-1, keepdim=True)
    g = -case.decay * torch.rand((B, T, Hv, K) if case.kda else (B, T, Hv), generator=generator, dtype=torch.float64)
    beta = torch.rand(B, T, Hv, generator=generator, dtype=torch.float64)
    beta = beta if case.beta is None else torch.full_like(beta, case.beta)
    if case.layout == "packed":
        sizes = [Hk * K, Hk * K, Hv * V]
        packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1).to(device, dtype).split(sizes, -1)
        q, k, v = (x.unflatten(-1, (-1, width)) for x, width in zip(packed, (K, K, V), strict=True))
    else:
        q, k, v = laid(q), laid(k), laid(v)
    return q, k, v, g.to(device, torch.float32), beta.to(device, dtype)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor | None, norm: str,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: one token after the other, in fp64."""
    if bounds is not None:
        starts = [None if state is None else state[i : i + 1] for i in range(len(bounds) - 1)]
        done = [
            recurrence(*(x[:, a:b] for x in (q, k, v, g, beta)), scale, start, norm)
            for (a, b), start in zip(pairwise(bounds), starts, strict=True)
        ]
        return torch.cat([o for o, _ in done], 1), torch.cat([S for _, S in done])
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    G = v.shape[2] // k.shape[2]
    q, k = ((x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if norm != "none" else x) for x in (q, k))
    q, k = (x.repeat_interleave(G, 2) for x in (q * scale, k))
    S = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if state is None else state.double()
    o = torch.zeros_like(v)
    for t in range(v.shape[1]):
        S = S * torch.exp(g[:, t].reshape(*g.shape[:1], g.shape[2], -1))[..., None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * u[:, :, None, :]
        o[:, t] = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
    return o, S


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], bound: float) -> None:
    for name, a, b in zip(("o", "state"), got, want, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        error = (a.double().to(b.device) - b).norm() / b.norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: relative error {error:.1e}"


def check_chunked(case: Case, dtype: torch.dtype, tiles: ChunkTiles, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    operands = inputs(case, dtype, device)
    N = case.B if case.bounds is None else len(case.bounds) - 1
    state = None
    if case.state is not None:
        generator = torch.Generator().manual_seed(1)
        state = torch.randn(N, case.Hv, case.K, case.V, generator=generator).to(device, case.state)
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, device=device)
    scale = case.K**-0.5
    got = run(CHUNKED, "run_chunked", tiles, case.parts, *operands, scale, state, case.norm, 1e-6, cu_seqlens)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    check(got, recurrence(*operands, scale, state, case.norm, case.bounds), BOUND[dtype] * case.loose)


def variants(case: Case, run: Runner) -> Iterator[tuple[Case, torch.dtype, ChunkTiles]]:  # noqa: F811
    """Cases, dtypes and tiles for a device."""
    if run.device == "cpu":  # type: ignore[attr-defined]
        small = Tile(16, 4, 1)
        for dtype in (torch.float32, torch.float16)[: 2 if case.T == 130 else 1]:
            yield case, dtype, ChunkTiles(small, small, small)
        return
    if case.alike and case.beta == 2:
        pytest.skip("reflections keep every error, so that 8 bits a product are not enough for nearly equal keys")
    large = replace(case, K=min(128, max(64, 4 * case.K)), V=max(64, 4 * case.V))
    for card in (of_device(0), by_name("rtx5090")):
        for parts in {1, case.parts}:
            tiles = chunk_tiles(card, large.K, large.V, case.kda, case.B * case.Hv, case.T // 64)
            yield replace(large, parts=parts), torch.bfloat16, tiles


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_chunked(case: Case, run: Runner) -> None:  # noqa: F811
    for variant in variants(case, run):
        check_chunked(*variant, run)


GPU_CASES = [
    Case(f"{'kda' if kda else 'gdn'}, {T} tokens, {K} by {V}, {state}", T=T, Hk=2, Hv=4, K=K, V=V, kda=kda, state=state)
    for kda in (False, True)
    for K in (64, 128, 256)
    for V in (64, 128, 256)
    for T, state in ((4097, torch.float32), (65, torch.bfloat16))
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_the_entry_point_at_real_sizes(case: Case) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if case.kda and not keys_fit(of_device(0), case.K):
        pytest.skip("declined")
    operands = inputs(case, torch.bfloat16, "cuda")
    state = torch.randn(1, 4, case.K, case.V, device="cuda").to(case.state)
    got = importlib.import_module(CHUNKED).gated_delta_rule_chunked(*operands, 0.1, state, "rsqrt")
    check(got, recurrence(*operands, 0.1, state, "rsqrt"), BOUND[torch.bfloat16])


def steps(kda: bool, device: str, K: int, dtype: torch.dtype, S: int) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """q to beta of three rows, a pool of five states, and the rows' slots, one of which is skipped."""
    case = Case("steps", B=3, T=S, Hk=1, Hv=2, K=K, V=2 * K if K < 64 else K, kda=kda, decay=0.5)
    pool = torch.randn(5, 2, K, case.V, generator=torch.Generator().manual_seed(2)).to(device)
    return inputs(case, dtype, device), pool, torch.tensor([3, -1, 0], device=device)


def step_variants(run: Runner) -> Iterator[tuple[torch.dtype, int, StepTiles]]:  # noqa: F811
    if run.device == "cpu":  # type: ignore[attr-defined]
        yield torch.float32, 16, StepTiles(16, 1)
        return
    for K in (64, 128, 256):
        for tiles in {step_tiles(of_device(0), K, K, rows) for rows in (1, 1 << 20)}:
            yield torch.bfloat16, K, tiles


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
def test_update(kda: bool, S: int, pool_dtype: torch.dtype, run: Runner) -> None:  # noqa: F811
    for dtype, K, tiles in step_variants(run):
        operands, pool, slots = steps(kda, run.device, K, dtype, S)  # type: ignore[attr-defined]
        pool = pool.to(pool_dtype)
        before = pool.clone()
        o, after = run(CALLS, "update", tiles, *operands, pool, slots, 0.25, "rsqrt")
        want = recurrence(*operands, 0.25, before[[3, 1, 0]], "rsqrt")
        rounding = 4e-3 if torch.bfloat16 in (dtype, pool_dtype) else 1e-6
        check((o[[0, 2]], after[[3, 0]]), tuple(x[[0, 2]] for x in want), rounding)
        assert not o[1].any() and torch.equal(after[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
def test_rejected_drafts_leave_no_trace(kda: bool, run: Runner) -> None:  # noqa: F811
    """Rounds of drafts, of which some are accepted, against the recurrence over the accepted ones alone."""
    for dtype, K, tiles in step_variants(run):
        device = run.device  # type: ignore[attr-defined]
        operands, pool, slots = steps(kda, device, K, dtype, 12)
        V = operands[2].shape[3]
        start = pool.clone()
        journal = torch.full((5, 2, 4, 2, K + V + (K if kda else 1)), math.nan, device=device)
        at, accepted, turn = torch.zeros(3, 3, dtype=torch.int64, device=device)
        turn[2] = 1
        bound = 4e-3 if dtype == torch.bfloat16 else 1e-6
        for drafts in (3, 2, 3):
            rows = at[:, None] + torch.arange(drafts, device=device)
            given = [x[torch.arange(3)[:, None], rows.cpu()] for x in operands]
            args = (tiles, *given, pool, journal, slots, accepted, turn, 0.25, "rsqrt")
            o, pool, journal = run(CALLS, "verify", *args)
            for row in (0, 2):
                done = int(at[row])
                told = [x[row : row + 1, : done + drafts] for x in operands]
                want, _ = recurrence(*told, 0.25, start[slots[row]][None], "rsqrt")
                _, state = recurrence(*(x[:, :done] for x in told), 0.25, start[slots[row]][None], "rsqrt")
                check((o[row], pool[slots[row]]), (want[0, done:], state[0]), bound)
            assert not o[1].any()
            accepted = torch.tensor([1, 2, 3], device=device).clamp(max=drafts)
            at, turn = at + accepted, 1 - turn
        assert torch.equal(pool[[1, 2, 4]], start[[1, 2, 4]])


@pytest.mark.gpu
def test_deterministic_and_capturable() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = importlib.import_module(CHUNKED)
    operands = inputs(Case("graph", T=4096, Hk=1, Hv=2, K=128, V=128), torch.bfloat16, "cuda")
    first = module.gated_delta_rule_chunked(*operands, 0.1, None, "rsqrt")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = module.gated_delta_rule_chunked(*operands, 0.1, None, "rsqrt")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
