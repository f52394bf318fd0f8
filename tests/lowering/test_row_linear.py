"""Linear layers of one row: which are joined, what stays as it is, and the kernel against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.arch import by_name
from sm12x_compile.lowering.linear import join_linears
from sm12x_compile.lowering.triton.row_linear import MAX_LAYERS, row_linear, row_tiles
from sm12x_compile.options import Options

from ..cuda_graphs.fakes import Tracer
from .compiled import check_launches
from .test_triton_numerics import run  # noqa: F401 (the fixture)

MODULE = "sm12x_compile.lowering.triton.row_linear"
H200 = by_name("h200")


def joined(
    function: Callable[..., Any], *shapes: tuple[int, ...], arch: str = "h200", dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda", **options: Any,
) -> tuple[list[int], int]:  # fmt: skip
    """How many layers each joined call has, and how many linear layers are left."""
    pytest.importorskip("triton")
    tracer = Tracer()
    gm = tracer.graph(function, *(tracer.tensor(*s, dtype=dtype, device=device) for s in shapes))
    sites = join_linears(gm, Options.parse(options), by_name(arch))
    gm.graph.lint()
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.sm12x_kernels.row_linear.default)
    assert [len(n.args[1]) for n in found] == [s.tags["layers"] for s in sites]
    return [s.tags["layers"] for s in sites], len(
        gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    )


X, W, V, B = (1, 1, 64), (32, 64), (16, 64), (32,)


def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = x.relu()
    return F.linear(x, q), F.linear(x, k), F.linear(x, v)


def test_layers_on_one_row_are_one_call() -> None:
    assert joined(qkv, X, W, V, V) == ([3], 0)
    assert joined(qkv, (64,), W, V, V) == ([3], 0)
    assert joined(lambda x, w, v: (F.linear(x.relu(), w), F.linear(x.sin(), v)), X, W, V) == ([1, 1], 0)
    many = joined(lambda x, *w: [F.linear(x, m) for m in w], X, *[W] * (MAX_LAYERS + 1))
    assert many == ([MAX_LAYERS, 1], 0)


def test_biases() -> None:
    """Layers with and without one are calls of their own."""
    with_bias = joined(lambda x, w, b, v, c: (F.linear(x, w, b), F.linear(x, v), F.linear(x, w, c)), X, W, B, V, B)
    assert with_bias == ([2, 1], 0)


@pytest.mark.parametrize(
    ("function", "shapes", "given"),
    [
        (qkv, ((2, 1, 64), W, V, V), {}),  # two rows
        (qkv, (X, W, V, V), dict(arch="cpu")),
        (qkv, (X, W, V, V), dict(device="cpu")),
        (qkv, (X, W, V, V), dict(patterns=["-linear"])),
        (qkv, (X, W, V, V), dict(kernels=["-triton.row_linear"])),
        (qkv, (X, W, V, V), dict(dtype=torch.float64)),
        (lambda x, w: F.linear(x, w * 2), (X, W), {}),  # the weight is made in the graph
        (lambda x, w: F.linear(x, w.T), (X, (64, 32)), {}),  # not dense
        (lambda x, w: (F.linear(x, w), w.add_(1.0)), (X, W), {}),
    ],
)
def test_what_stays(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], given: dict[str, Any]) -> None:
    calls, left = joined(function, *shapes, **given)
    assert calls == [] and left >= 1


def test_a_kernel_that_may_start_early() -> None:
    """Not the first of a graph: what came before the graph may still write its weights."""
    pytest.importorskip("triton")
    for function, follows in (
        (lambda x, w: F.linear(x, w), False),
        (lambda x, w: F.linear(x.view(1, 64), w), False),
        (lambda x, w: F.linear(x.float().clone().contiguous(), w), False),
        (lambda x, w: F.linear(x.relu(), w), True),
        (lambda x, w: F.linear(x.relu().view(1, 64), w), True),
    ):
        tracer = Tracer()
        gm = tracer.graph(function, tracer.tensor(*X), tracer.tensor(*W))
        join_linears(gm, Options(), H200)
        (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.sm12x_kernels.row_linear.default)
        assert call.args[3] is follows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inner", "outputs"), [(24, (32,)), (1100, (5, 6, 7, 9)), (4100, (40, 7))], ids=str)
def test_the_kernel(inner: int, outputs: tuple[int, ...], dtype: torch.dtype, run: Any) -> None:  # noqa: F811
    g = torch.Generator().manual_seed(inner)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(run.device, dtype)

    x, weights, biases = draw(1, 1, inner), [draw(n, inner) for n in outputs], [draw(n) for n in outputs]
    for given in (biases, []):
        found = run(MODULE, "row_linear", x, weights, given, False)
        for k, (got, w) in enumerate(zip(found, weights, strict=True)):
            want = F.linear(x.double(), w.double(), given[k].double() if given else None)
            assert got.dtype == dtype and got.shape == want.shape
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error <= {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 5e-4}[dtype]


def test_the_fake_promises_what_the_kernel_returns() -> None:
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(1, 1, 64), torch.empty(32, 64)
        (y,) = row_linear(x, [w], [], False)
    assert y.shape == (1, 1, 32) and y.stride() == F.linear(torch.empty(1, 1, 64), torch.empty(32, 64)).stride()


def test_tiles() -> None:
    """Every multiprocessor has several programs, where there are so many rows; a tile is no wider than the row."""
    for card in ("sm120", "sm121", "h200", "a100"):
        arch = by_name(card)
        for outputs in (32, 512, 5120, 128256):
            for inner in (64, 2880, 14336):
                tiles = row_tiles(arch, outputs, inner, 2)
                assert tiles.block_n == 1 or outputs >= 4 * tiles.block_n * arch.sm_count
                assert tiles.block_k < 2 * inner and tiles.block_k & (tiles.block_k - 1) == 0


@pytest.mark.parametrize("card", ["sm120", "sm121"])
@pytest.mark.parametrize("case", ["2880 to (4096, 512, 512), bfloat16, biased", "14336 to (4096,), float32"])
def test_compiles_for_sm12x(card: str, case: str) -> None:
    check_launches(card, "row_linear", case)
