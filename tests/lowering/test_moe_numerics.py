"""The expert kernels against the reference in fp64: interpreted here, native where a GPU is.

The bound is on ||out - ref|| / ||ref||. fp32 sums a few hundred products. bf16 and fp16 round three times: the hidden
activations, what each expert gives, the result (each to 2^-9 or 2^-12 of its size at most), and twice that is allowed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import by_name, of_device
from sm12x_compile.lowering.triton.expert_tiles import ExpertTiles, PairPlan, PairTiles, Plan, expert_plan, expert_tiles
from sm12x_compile.ops.moe import moe
from sm12x_compile.ops.mxfp4 import dequantize_fp4, mxfp4_linear

from .order_calls import said, tiles_of
from .test_triton_numerics import BOUND, run  # noqa: F401 (the fixture)

EXPERTS = "sm12x_compile.lowering.triton.experts"
LINEAR = "sm12x_compile.lowering.triton.mxfp4_linear"
Runner = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes, a way to route, and attributes of the op by name."""

    name: str
    T: int = 5
    K: int = 2
    E: int = 5
    D: int = 48
    I: int = 24
    routing: str = "random"
    biases: bool = False
    packed: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    operands: str = "plain"


SIZES = [Case(f"{t} tokens", T=t) for t in (1, 3, 16)] + [
    Case("257 tokens", T=257, K=1, D=16, I=8),
    Case("odd sizes", T=7, E=3, D=37, I=19),
    Case("wide", T=4, E=2, K=1, D=160, I=40),
    Case("one expert", T=9, E=1, K=1),
    Case("as many choices as experts", T=3, E=4, K=4),
    Case("no tokens", T=0),
]
ROUTINGS = [
    Case(f"routing: {name}", T=11, E=6, K=2, D=32, I=16, routing=name)
    for name in ("one expert", "last expert", "empty experts", "some outside", "all outside", "same expert twice")
]
FORMS: list[Case] = [
    Case("biases", biases=True),
    Case("interleaved", attributes=dict(interleaved=True), biases=True),
    Case("ekn", attributes=dict(layout="ekn"), biases=True),
    Case("ekn, interleaved", attributes=dict(layout="ekn", interleaved=True), biases=True),
    Case("gelu", attributes=dict(activation="gelu")),
    Case("gelu_tanh", attributes=dict(activation="gelu_tanh")),
    Case("relu2, not gated", attributes=dict(activation="relu2", gated=False), biases=True),
    Case("relu, not gated", attributes=dict(activation="relu", gated=False)),
    Case("silu, not gated, ekn", attributes=dict(gated=False, layout="ekn")),
    Case("gpt-oss", attributes=dict(activation="swiglu_oai", limit=0.7, interleaved=True, layout="ekn"), biases=True),
    Case("limit", attributes=dict(limit=0.5)),
    Case("weights on the input", attributes=dict(weight_on="input"), biases=True, routing="some outside"),
    Case("strided x, ids and weights", operands="strided"),
    Case("int32 ids", operands="int32"),
    Case("up apart", operands="up apart", biases=True),
    Case("up apart, ekn, sorted", T=40, operands="up apart", attributes=dict(layout="ekn")),
]
PACKED = [
    Case("mxfp4", D=64, I=32, packed=True),
    Case("mxfp4, rows of whole words", T=2, E=2, D=128, I=128, packed=True, biases=True, attributes=dict(gated=False)),
    Case("mxfp4, rows of 3 bytes", T=9, E=3, D=96, I=32, packed=True, biases=True, routing="some outside"),
    Case("mxfp4, gpt-oss", D=96, I=64, packed=True, biases=True,
         attributes=dict(activation="swiglu_oai", limit=7.0, interleaved=True)),
    Case("mxfp4, scales above 2", T=3, E=2, K=1, D=64, I=32, packed=True, operands="large scales"),
    Case("mxfp4, rows of 18 scales", T=2, E=2, K=1, D=576, I=32, packed=True),
    Case("mxfp4, scales of 6 bytes in all", T=2, K=1, E=1, D=32, I=32, packed=True, operands="uneven scales",
         attributes=dict(gated=False)),
]  # fmt: skip
EVERY = SIZES + ROUTINGS + FORMS + PACKED
SMALL = ExpertTiles(16, 16, 32, 4, 2)


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    T, K, E, D, inner = case.T, case.K, case.E, case.D, case.I
    N = inner * (2 if case.attributes.get("gated", True) else 1)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(device, dtype)

    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K)
    ids = ids.long()
    if case.routing == "one expert":
        ids[:] = 2
    elif case.routing == "last expert":
        ids[:] = E - 1
    elif case.routing == "empty experts":
        ids = ids % 2 * 3 + 1
    elif case.routing == "some outside":
        ids[::2, 0], ids[1::3, 1] = -1, E
    elif case.routing == "all outside":
        ids[:] = -7
    elif case.routing == "same expert twice":
        ids[:, 1] = ids[:, 0]
    x, weights = randn(T, D), torch.rand(T, K, generator=g).to(device)
    ids = ids.to(device)
    if case.operands == "strided":
        x = randn(D, T + 3).mT[:T]
        ids, weights = ids.mT.contiguous().mT, torch.rand(T, 2 * K, generator=g).to(device)[:, ::2]
    elif case.operands == "int32":
        ids = ids.int()
    attributes = dict(case.attributes)
    if case.biases:
        attributes |= dict(w13_bias=randn(E, N), w2_bias=randn(E, D))
    if case.packed:
        attributes |= dict(format="mxfp4", w13_scale=scales(g, E, N, D).to(device))
        attributes |= dict(w2_scale=scales(g, E, D, inner).to(device))
        sizes = ((N, D), (D, inner))
        packed = [torch.randint(256, (E, n, k // 2), generator=g).to(device, torch.uint8) for n, k in sizes]
        if case.operands == "large scales":
            attributes["w2_scale"][1::2, ::5] += 20
        if case.operands == "uneven scales":
            storage = torch.zeros(attributes["w13_scale"].numel() + 1, dtype=torch.uint8, device=device)
            attributes["w13_scale"] = storage[1:].view(E, N, D // 32).copy_(attributes["w13_scale"])
        return (x, ids, weights, *packed), attributes
    w13, w2 = randn(E, N, D, scale=D**-0.5), randn(E, D, inner, scale=inner**-0.5)
    if case.operands == "up apart":
        w13, attributes["w3"] = (half.clone() for half in w13.chunk(2, 1))
        if case.biases:
            attributes["w13_bias"], attributes["w3_bias"] = (b.clone() for b in attributes["w13_bias"].chunk(2, 1))
    if attributes.get("layout") == "ekn":
        w13, w2 = w13.mT.contiguous(), w2.mT.contiguous()
        if "w3" in attributes:
            attributes["w3"] = attributes["w3"].mT.contiguous()
    return (x, ids, weights, w13, w2), attributes


def scales(g: torch.Generator, *shape: int) -> Tensor:
    """E8M0 bytes that keep activations near 1."""
    *rows, columns = shape
    middle = 126 - (columns.bit_length() + 1) // 2
    return torch.randint(middle - 2, middle + 2, (*rows, columns // 32), generator=g).to(torch.uint8)


def expected(operands: tuple[Any, ...], attributes: dict[str, Any]) -> Tensor:
    def wide(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    return moe.reference(*map(wide, operands), **{k: wide(v) for k, v in attributes.items()})


def assert_close(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == wanted.shape and out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out.isnan().cpu(), wanted.isnan().cpu())
    error, size = (out.double() - wanted).nan_to_num().norm(), wanted.nan_to_num().norm()
    assert error <= BOUND[dtype] * size, f"relative error {error / size:.1e}"


def variants(case: Case, device: str) -> list[tuple[torch.dtype, Plan | PairPlan]]:
    """Small tiles, so that small sizes have edges; on a GPU those that it and an RTX 5090 would choose, in turn."""
    if device == "cpu":
        wide = replace(SMALL, block_n=32, block_k=128, swap=True)
        if case.packed:
            pairs = PairPlan(PairTiles(4, 32, 4), PairTiles(16, 64, 4))
            unpacked = Plan(True, SMALL, wide, unpacked=2)
            return [(torch.float32, plan) for plan in (Plan(True, replace(SMALL, block_k=128), wide), pairs, unpacked)]
        return [(torch.float32, plan) for plan in (Plan(True, SMALL, SMALL), Plan(False, SMALL, wide))]
    made, rows = [], (16, 32, 64, 128)[EVERY.index(case) % 4 if case in EVERY else 0]
    for card in (of_device(0), by_name("rtx5090")):
        made.append((torch.bfloat16, expert_plan(card, case.T, case.K, case.E, torch.bfloat16, case.packed, 1e6)))
        tiles = [expert_tiles(card, rows, torch.bfloat16, case.packed, gated) for gated in (True, False)]
        made.append((torch.bfloat16, Plan(True, *tiles)))
        if case.packed:
            plain = [expert_tiles(card, rows, torch.bfloat16, False, gated) for gated in (True, False)]
            made.append((torch.bfloat16, Plan(True, *plain, unpacked=3)))
    others = [torch.float32] if case.packed else [torch.float32, torch.float16]
    return made + [(d, expert_plan(of_device(0), case.T, case.K, case.E, d, case.packed, 1e6)) for d in others]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_experts(case: Case, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    for dtype, plan in variants(case, device):
        operands, attributes = inputs(case, dtype, device)
        out = run(EXPERTS, "run_experts", plan, *operands, **attributes)
        assert_close(out, expected(operands, attributes), dtype)


def test_the_entry_point_and_its_dtype(run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    for case in (Case("few", T=2), Case("more", T=40)):
        operands, attributes = inputs(case, torch.float32, device)
        out = run(EXPERTS, "moe_experts", *operands, **attributes, out_dtype=torch.float16)
        assert_close(out, expected(operands, attributes), torch.float16)


def test_an_expert_that_nobody_chose_is_not_read(run: Runner) -> None:  # noqa: F811
    """Its weights are NaN, and 0 * NaN would show."""
    device = run.device  # type: ignore[attr-defined]
    case = Case("unread", T=20, E=4, routing="empty experts")
    for dtype, plan in variants(case, device):
        operands, attributes = inputs(case, dtype, device)
        wanted = expected(operands, attributes)
        for w in operands[3:]:
            w[[0, 2, 3]] = torch.nan
        assert_close(run(EXPERTS, "run_experts", plan, *operands, **attributes), wanted, dtype)


def test_a_nan_scale_reaches_the_result(run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    operands, attributes = inputs(Case("nan", D=64, I=32, packed=True), torch.float32, device)
    attributes["w2_scale"][3, 5, 0] = 255
    wanted = expected(operands, attributes)
    assert wanted.isnan().any() and not wanted.isnan().all()
    for _, plan in variants(Case("", packed=True), "cpu"):
        assert_close(run(EXPERTS, "run_experts", plan, *operands, **attributes), wanted, torch.float32)


@pytest.mark.parametrize("shape", [(1,), (2, 9), (0,)], ids=str)
@pytest.mark.parametrize(("N", "K"), [(48, 64), (37, 288), (16, 256)])
def test_mxfp4_linear(shape: tuple[int, ...], N: int, K: int, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(N + K)
    weight = torch.randint(256, (N, K // 2), generator=g).to(device, torch.uint8)
    scale, bias = scales(g, N, K).to(device), torch.randn(N, generator=g).to(device)
    tiles: list[Any] = [replace(SMALL, block_k=128), PairTiles(4, 64, 4)]
    if device == "cuda":
        for card in (of_device(0), by_name("rtx5090")):
            tiles += [expert_tiles(card, rows, torch.bfloat16, True, False) for rows in (16, 128)]
    for dtype in [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]:
        x = torch.randn(*shape, K, generator=g).to(device, dtype)
        wanted = mxfp4_linear.reference(x.double(), weight, scale, bias.double())
        for choice in tiles:
            assert_close(run(LINEAR, "run_linear", choice, x, weight, scale, bias), wanted, dtype)
    if device == "cuda":  # the interpreter's process cannot be sent this dtype
        scale = scale.view(torch.float8_e8m0fnu)
    assert_close(run(LINEAR, "mxfp4_linear", x, weight, scale, bias), wanted, dtype)


@pytest.mark.parametrize("routing", ["random", "one expert", "some outside"])
def test_pairs_in_order(routing: str, run: Runner) -> None:  # noqa: F811
    """Several blocks of pairs, several tiles an expert, and x in planes."""
    device = run.device  # type: ignore[attr-defined]
    (x, ids, *_), _ = inputs(Case("order", T=300, K=3, E=7, D=32, I=8, routing=routing), torch.float32, device)
    module = "tests.lowering.order_calls" if device == "cpu" else f"{__package__}.order_calls"
    order, table, planes = run(module, "ordered", ids, 7, 16, 256, x)
    assert said(order, table) == tiles_of(ids, 7, 16)
    assert torch.equal(planes, x.view(300, 8, 4).mT)


def every_byte_under_every_scale(device: str) -> tuple[Tensor, Tensor, Tensor]:
    each = torch.arange(256, device=device).to(torch.uint8)
    packed = each[None, :].expand(256, 256).reshape(-1, 64).contiguous()
    codes = each[:, None].expand(256, 16).reshape(-1, 4).contiguous()
    return packed, codes, dequantize_fp4("test", packed, codes, "mxfp4")


def test_dequantisation_is_exact(run: Runner) -> None:  # noqa: F811
    """In bf16 too: its exponents are those of fp32, and two bits of mantissa are enough."""
    device = run.device  # type: ignore[attr-defined]
    packed, codes, wanted = every_byte_under_every_scale(device)
    module = "tests.lowering.dequantise_kernel" if device == "cpu" else f"{__package__}.dequantise_kernel"
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    for dtype, first in product(dtypes, (None, 0, 1, 2, 3)):
        out = run(module, "dequantised", packed, codes, dtype, first).float()
        assert torch.equal(out.isnan(), wanted.isnan())
        number = ~wanted.isnan()
        assert torch.equal(out.view(torch.int32)[number], wanted.view(torch.int32)[number])


def test_the_unpacking_instructions() -> None:
    """The inline assembly, which the interpreter cannot run, executed here on all bytes and scales.

    The fast form is exact up to a scale of 2, and beyond neither a number nor its product with anything is finite.
    """
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton import mxfp4_parts as parts

    bytes_ = torch.arange(256)
    other = torch.stack([bytes_.flip(0), bytes_ ^ 0x5A, bytes_ ^ 0x0F])
    words = (bytes_ | other[0] << 8 | other[1] << 16 | other[2] << 24)[:, None]
    packed = words.to(torch.int32).view(torch.uint8).view(256, 4).repeat(1, 4)  # 32 numbers, the first 8 four times
    code, shift = bytes_[None], 8 * (bytes_[None] % 4)
    others = [code ^ 0x5A, code.flip(1), code ^ 0xA5]
    four = [[others[(j + i) % 3] if j != i else code for j in range(4)] for i in range(4)]
    for fast in (False, True):
        name = "FAST" if fast else "E8M0"
        one = getattr(parts, f"ONE_{name}").value
        (scale,) = execute(one, [code << shift | 0x5A5A5A5A & ~(255 << shift), 0x4040 + 0x0101 * shift // 8], 1)
        for i in range(4):
            word = sum(c << 8 * j for j, c in enumerate(four[i]))
            assert torch.equal(execute(getattr(parts, f"FOUR_{name}").value, [word], 4)[i], scale)
        unpack = [getattr(parts, f"{'FAST' if fast else 'UNPACK'}_{i}").value for i in range(4)]
        made = [execute(text, [words, scale, scale], 1)[0] for text in unpack]
        for s in range(256):
            wanted = dequantize_fp4("test", packed, torch.full((256, 1), s, dtype=torch.uint8), "mxfp4")[:, :8].float()
            for k in range(8):
                bits = ((made[k % 4][:, s] >> (16 * (k // 4))) & 0xFFFF) << 16
                found = bits.to(torch.int32).view(torch.float32)
                if fast and s > 128:
                    assert not found.isfinite().any(), s
                else:
                    assert equal_bits(found, wanted[:, k]), (s, k)
    for k in range(8):
        bits = execute(getattr(parts, f"BARE_{k % 4}").value, [words], 1)[0] >> (16 * (k // 4)) & 0xFFFF
        wanted = dequantize_fp4("test", packed, torch.full((256, 1), 127, dtype=torch.uint8), "mxfp4")[:, k]
        assert equal_bits((bits << 16).to(torch.int32).view(torch.float32)[:, 0], wanted.float())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """The same numbers, signs of zeros included, and NaN in the same places."""
    number = ~b.isnan()
    return torch.equal(a.isnan(), ~number) and torch.equal(a.view(torch.int32)[number], b.view(torch.int32)[number])


def execute(assembly: str, inputs: list[Any], outputs: int) -> list[Tensor]:
    """Run straight-line PTX of the few instructions used, on int64 tensors of 32-bit patterns, elementwise."""
    held: dict[str, Any] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def halves(bits: Tensor) -> list[Tensor]:
        return [(((bits >> at) & 0xFFFF) << 16).to(torch.int32).view(torch.float32) for at in (0, 16)]

    def pair(values: list[Tensor]) -> Tensor:
        low, high = (v.bfloat16().view(torch.int16).long() & 0xFFFF for v in values)
        return low | high << 16

    def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
        assert not (selector & 0x8888).any(), "no sign replication here"
        picked = [(selector >> (4 * i)) & 7 for i in range(4)]
        parts = [torch.where(p < 4, a >> (8 * p), b >> (8 * (p - 4))) & 255 for p in picked]
        return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24

    perform: dict[str, Callable[..., Tensor]] = {
        "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "mul.lo.u32": lambda a, b: a * b, "prmt.b32": prmt,
        "shr.u32": lambda a, b: a >> b, "shl.b32": lambda a, b: a << b,
        "max.bf16x2": lambda a, b: pair([torch.fmax(*v) for v in zip(halves(a), halves(b), strict=True)]),
        "fma.rn.bf16x2": lambda a, b, c: pair(
            [(x.double() * y.double() + z.double()).float()
             for x, y, z in zip(halves(a), halves(b), halves(c), strict=True)]
        ),
    }  # fmt: skip
    for line in assembly.split(";"):
        words = line.replace("{", " ").replace("}", " ").split(None, 1)
        if len(words) < 2 or words[0] == ".reg":
            continue
        target, *given = (o.strip() for o in words[1].split(","))
        values = [held[name] if name in held else torch.tensor(int(name, 0)) for name in given]
        held[target] = perform[words[0]](*values) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(outputs)]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "mxfp4"])
@pytest.mark.parametrize("T", [1, 2, 16, 257, 4096])
def test_one_graph_under_many_routings(T: int, packed: bool) -> None:
    """All tokens to one expert, experts without tokens, ids outside: equal to eager and to the reference."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    moe_experts = importlib.import_module(EXPERTS).moe_experts
    E, K = 12, 4
    case = Case(f"graph {T} {packed}", T=T, K=K, E=E, D=256, I=192, packed=packed, biases=True)
    operands, attributes = inputs(case, torch.bfloat16, "cuda")
    x, ids, weights = operands[:3]
    first = moe_experts(*operands, **attributes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe_experts(*operands, **attributes)
    graph.replay()
    assert torch.equal(captured, first), "equal inputs give equal bits"
    routings = [torch.full_like(ids, e) for e in (0, E - 1)]  # all tokens to one expert, all others empty
    routings += [torch.randint_like(ids, E), torch.randint_like(ids, E) % 3, torch.full_like(ids, -1)]
    routings += [torch.where(torch.rand_like(weights) < 0.3, -1, torch.randint_like(ids, E + 2))]
    for routing in routings:
        ids.copy_(routing)
        x.normal_()
        weights.uniform_()
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, moe_experts(*operands, **attributes))
        assert_close(captured, expected(operands, attributes), torch.bfloat16)
