"""The Triton attention kernels against the eager reference in fp64: interpreted here, native where a GPU is.

The bound is the relative error of the whole result, ||out - ref|| / ||ref||. fp32 accumulates a few hundred products
(2e-6 leaves tf32, at 3e-4, far outside); fp16 and bf16 round the weights, the values and the result once each.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import Arch, by_name, of_device
from sm12x_compile.lowering.triton.tiles import DecodeTiles, Tiles, decode_tiles, prefill_tiles
from sm12x_compile.ops.attention import attention

BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PREFILL = "sm12x_compile.lowering.triton.attention_prefill"
DECODE = "sm12x_compile.lowering.triton.attention_decode"
Runner = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and, by name, masks that `inputs` makes."""

    name: str
    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    S: int = 45
    T: int = 71
    D: int = 64
    DV: int | None = None
    layout: str = "bhsd"
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    chunk: int | None = None
    q_shift: int = 0
    scale: float | None = None
    softcap: float = 0.0
    empty_rows: str = "zero"
    tensors: tuple[str, ...] = field(default=())


MASKS = [
    Case("none"),
    Case("causal", causal=True),
    Case("causal, offset", causal=True, q_shift=26),
    Case("causal, run-time offsets", causal=True, q_shift=1, tensors=("q_offset[B]",)),
    Case("causal, the first rows empty", causal=True, q_shift=-9, empty_rows="nan"),
    Case("window", causal=True, window_left=10, q_shift=26),
    Case("wide window", causal=True, window_left=65, q_shift=26),
    Case("window past the end", window_left=9, q_shift=60, empty_rows="mean"),
    Case("two-sided window", window_left=5, window_right=3),
    Case("negative windows", window_left=-2, window_right=12),
    Case("unlimited windows", window_left=2**40, window_right=2**40, causal=True),
    Case("chunks", causal=True, chunk=20),
    Case("chunks, negative positions", chunk=20, q_shift=-30, empty_rows="mean"),
    Case("length", tensors=("kv_len",)),
    Case("lengths, one of them 0", tensors=("kv_len[B]",), empty_rows="mean"),
    Case("length and causal offset", causal=True, tensors=("kv_len", "q_offset")),
    Case("padding", causal=True, tensors=("key_padding",)),
    Case("padding of everything", tensors=("key_padding=0",), empty_rows="nan"),
    Case("packed", causal=True, tensors=("segments",)),
    Case("bias", tensors=("bias",)),
    Case("bias of finfo.min", tensors=("bias=min",)),
    Case("bias of -inf", tensors=("bias=-inf",), empty_rows="mean"),
    Case("keep mask", tensors=("keep",)),
    Case("sinks", causal=True, tensors=("sinks",)),
    Case("sinks, empty rows", q_shift=-40, causal=True, tensors=("sinks",), empty_rows="nan"),
    Case("softcap", causal=True, softcap=5.0),
    Case("softcap and sinks", softcap=5.0, tensors=("sinks",)),
    Case("negative scale", causal=True, scale=-0.2),
    Case("zero scale", causal=True, scale=0.0),
    Case(
        "everything", causal=True, window_left=40, chunk=64, q_shift=9, softcap=9.0, empty_rows="mean",
        tensors=("q_offset[B]", "kv_len[B]", "key_padding", "segments", "bias", "sinks"),
    ),
]  # fmt: skip
HEADS = [
    Case(f"head dims {d} and {dv}", S=19, T=37, D=d, DV=dv, causal=True, q_shift=18)
    for d, dv in [(d, d) for d in (8, 32, 40, 48, 72, 80, 96, 112, 192, 256)] + [(72, 40), (64, 128), (192, 128)]
]
SHAPES = [Case(f"S {s}, T {t}", S=s, T=t, causal=True, q_shift=t - s) for s in (1, 7, 63, 65) for t in (1, 7, 63, 65)]
STRIDES = [
    Case("[B, S, H, D] in memory", layout="bshd", causal=True),
    Case("strided last dim", layout="bhds", causal=True),
    Case("[B, S, H, D], rows not aligned", layout="bshd", causal=True, D=40, Hq=6, Hkv=3),
    Case("one KV head expanded", layout="expanded", causal=True),
    Case("keys far apart", layout="far", S=2, T=3),
    Case("16 heads a KV head", B=1, Hq=16, Hkv=1, S=5, causal=True, q_shift=60),
    Case("one head a KV head", Hq=3, Hkv=3, S=5),
]
EVERY = MASKS + HEADS + SHAPES + STRIDES
GROWN = {case.name for case in MASKS + HEADS}


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, float, dict[str, Any]]:
    torch.manual_seed(zlib.crc32(case.name.encode()))
    B, Hq, Hkv, S, T, D = case.B, case.Hq, case.Hkv, case.S, case.T, case.D
    DV = case.DV or D

    def states(H: int, N: int, W: int) -> Tensor:
        if case.layout == "bshd":
            return torch.randn(B, N, H, W, device=device, dtype=dtype).transpose(1, 2)
        if case.layout == "bhds":
            return torch.randn(B, H, W, N + 3, device=device, dtype=dtype)[..., :N].transpose(2, 3)
        if case.layout == "far" and Hkv == H:
            far = torch.empty(N << 23, device=device, dtype=dtype).as_strided((B, H, N, W), (H * W, W, 1 << 23, 1))
            return far.copy_(torch.randn(B, H, N, W, device=device, dtype=dtype))
        if case.layout == "expanded" and Hkv == H:
            return torch.randn(B, 1, N, W, device=device, dtype=dtype).expand(B, H, N, W)
        return torch.randn(B, H, N, W, device=device, dtype=dtype)

    q, k, v = states(Hq, S, D), states(Hkv, T, D), states(Hkv, T, DV)
    masks: dict[str, Any] = {
        name: getattr(case, name)
        for name in ("causal", "window_left", "window_right", "chunk", "q_shift", "softcap", "empty_rows")
    }
    floor = torch.finfo(dtype).min
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "q_offset": lambda: {"q_offset": torch.tensor(T - S - 4)},
        "q_offset[B]": lambda: {"q_offset": torch.tensor([3, -5][:B])},
        "kv_len": lambda: {"kv_len": torch.tensor(T * 2 // 3)},
        "kv_len[B]": lambda: {"kv_len": torch.tensor([0, T + 9][:B])},
        "key_padding": lambda: {"key_padding": torch.rand(B, T) > 0.4},
        "key_padding=0": lambda: {"key_padding": torch.zeros(1, T, dtype=torch.bool)},
        "segments": lambda: {
            "q_segments": torch.arange(S)[None] * 3 // S,
            "k_segments": (torch.arange(T)[None] * 3 // T).expand(B, T),
        },
        "bias": lambda: {"bias": torch.randn(Hq, S, T).to(dtype)},
        "bias=min": lambda: {"bias": torch.where(torch.rand(B, 1, S, 1) > 0.5, 0.0, floor).to(dtype)},
        "bias=-inf": lambda: {"bias": torch.where(torch.rand(S, T) > 0.9, 0.0, -torch.inf).to(dtype)},
        "keep": lambda: {"bias": torch.rand(B, 1, S, T) > 0.9},
        "sinks": lambda: {"sinks": torch.randn(Hq).to(dtype)},
    }
    for name in case.tensors:
        masks |= {key: tensor.to(device) for key, tensor in makers[name]().items()}
    return q, k, v, D**-0.5 if case.scale is None else case.scale, masks


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: dict[str, Any]) -> Tensor:
    exact = {name: m.double() if isinstance(m, Tensor) and m.is_floating_point() else m for name, m in masks.items()}
    return attention.reference(q.double(), k.double(), v.double(), scale, **exact)


def check(out: Tensor, reference: Tensor, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> None:
    assert out.shape == reference.shape and out.dtype == (out_dtype or dtype)
    assert out.transpose(1, 2).is_contiguous()
    out = out.double()
    assert torch.equal(out.isnan(), reference.isnan())
    error = (out - reference).nan_to_num().norm()
    assert error <= BOUND[dtype] * reference.nan_to_num().norm(), f"relative error {error / reference.norm():.1e}"


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Runner:
    """A function that runs one of our entry points on `run.device`."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

        def native(module: str, function: str, *args: Any, **kwargs: Any) -> Tensor:
            # What the allocator hands out next held NaN: an element that no one writes shows.
            torch.full((1 << 22,), torch.nan, device="cuda")
            return getattr(importlib.import_module(module), function)(*args, **kwargs)

        native.device = "cuda"  # type: ignore[attr-defined]
        return native
    interpreter = request.getfixturevalue("interpreter")

    def interpreted(*args: Any, **kwargs: Any) -> Tensor:
        return interpreter(*args, **kwargs)

    interpreted.device = "cpu"  # type: ignore[attr-defined]
    return interpreted


# Small tiles, so that small shapes have left edges, middles and right edges. A GPU also gets the tiles that the
# entry points would choose, at sizes that fill them.
SMALL, SMALL_DECODE = Tiles(32, 16, 4, 2), DecodeTiles(16, 16, 4, 2)


def variants(case: Case, run: Runner, small: Any, chosen: Callable[[Arch, Case, torch.dtype], Any]) -> Iterator[Any]:
    """Cases, dtypes and tiles for a device."""
    if run.device == "cpu":  # type: ignore[attr-defined]
        yield case, torch.float32, small
        return
    large = replace(case, S=case.S * 5 if case.S > 5 else case.S, T=case.T * 5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield case, dtype, small
        for card in (of_device(0), by_name("rtx5090")):
            yield large if case.name in GROWN else case, dtype, chosen(card, case, dtype)


@named(EVERY)
def test_prefill(case: Case, run: Runner) -> None:
    def chosen(card: Arch, case: Case, dtype: torch.dtype) -> Tiles:
        has_bias = any(name.startswith(("bias", "keep")) for name in case.tensors)
        return prefill_tiles(card, case.D, case.DV or case.D, dtype, has_bias)

    for variant, dtype, tiles in variants(case, run, SMALL, chosen):
        q, k, v, scale, masks = inputs(variant, dtype, run.device)  # type: ignore[attr-defined]
        out = run(PREFILL, "run_prefill", tiles, q, k, v, scale, **masks)
        check(out, expected(q, k, v, scale, masks), dtype)


@pytest.mark.parametrize("splits", [1, 3])
@named([replace(c, S=min(c.S, 5)) for c in EVERY if c not in SHAPES or c.S <= 7])
def test_decode(case: Case, splits: int, run: Runner) -> None:
    def chosen(card: Arch, case: Case, dtype: torch.dtype) -> DecodeTiles:
        return decode_tiles(card, case.D, case.DV or case.D, dtype, case.S * case.Hq // case.Hkv)

    for variant, dtype, tiles in variants(case, run, SMALL_DECODE, chosen):
        q, k, v, scale, masks = inputs(variant, dtype, run.device)  # type: ignore[attr-defined]
        out = run(DECODE, "run_decode", tiles, splits, q, k, v, scale, **masks)
        check(out, expected(q, k, v, scale, masks), dtype)


ENTRIES = [(PREFILL, "attention_prefill"), (DECODE, "attention_decode")]


@pytest.mark.parametrize(("module", "function"), ENTRIES, ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_entry_points_choose_tiles_that_work(
    module: str, function: str, dtype: torch.dtype, head_dim: int, run: Runner
) -> None:
    queries = 3 if function == "attention_decode" else 70
    case = Case("entry", B=1, S=queries, T=600, D=head_dim, causal=True, tensors=("q_offset",), window_left=300)
    q, k, v, scale, masks = inputs(case, dtype, run.device)  # type: ignore[attr-defined]
    out = run(module, function, q, k, v, scale, **masks)
    check(out, expected(q, k, v, scale, masks), dtype)


@pytest.mark.parametrize(("module", "function"), ENTRIES, ids=["prefill", "decode"])
def test_out_dtype_and_wrong_arguments(module: str, function: str, run: Runner) -> None:
    q, k, v, scale, _ = inputs(Case("dtype", S=3), torch.float16, run.device)  # type: ignore[attr-defined]
    out = run(module, function, q, k, v, scale, out_dtype=torch.float32)
    check(out, expected(q, k, v, scale, {}), torch.float16, out_dtype=torch.float32)
    with pytest.raises((ValueError, AssertionError), match="do not fit"):
        run(module, function, q, k[..., :32], v, scale)
    with pytest.raises((ValueError, AssertionError), match="empty_rows"):
        run(module, function, q, k, v, scale, empty_rows="sometimes")


@pytest.mark.parametrize(("module", "function"), ENTRIES, ids=["prefill", "decode"])
def test_no_keys_at_all(module: str, function: str, run: Runner) -> None:
    q, k, v, scale, masks = inputs(Case("no keys", S=3, T=0), torch.float32, run.device)  # type: ignore[attr-defined]
    assert torch.equal(run(module, function, q, k, v, scale, **masks).cpu(), torch.zeros(2, 4, 3, 64))


@pytest.mark.parametrize(
    ("module", "function", "bound"),
    [(*entry, bound) for entry in ENTRIES for bound in ("length", "offset")] + [(*ENTRIES[1], "window")],
    ids=["prefill-length", "prefill-offset", "decode-length", "decode-offset", "decode-window"],
)
def test_a_cache_is_read_only_where_it_is_filled(module: str, function: str, bound: str, run: Runner) -> None:
    """What lies beyond the bound is NaN, and 0 * NaN would show in the result."""
    q, k, v, scale, _ = inputs(Case("cache", B=1, S=3, T=900), torch.float32, run.device)  # type: ignore[attr-defined]
    used = torch.arange(900) < 130
    masks: dict[str, Any] = {"kv_len": torch.tensor(130, device=q.device)}
    if bound == "offset":
        masks = {"causal": True, "q_offset": torch.tensor(127, device=q.device)}
    elif bound == "window":
        masks = {"causal": True, "window_left": 49, "q_shift": 897}
        used = torch.arange(900) >= 897 - 49
    reference = expected(q, k, v, scale, masks)
    k[:, :, ~used], v[:, :, ~used] = torch.nan, torch.nan
    check(run(module, function, q, k, v, scale, **masks), reference, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "function"), ENTRIES, ids=["prefill", "decode"])
def test_offsets_beyond_int32(module: str, function: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = Case("4 GiB between the first and the last key", B=1, Hkv=1, S=2, T=260, layout="far")
    q, k, v, scale, _ = inputs(case, torch.float16, "cuda")
    out = getattr(importlib.import_module(module), function)(q, k, v, scale)
    check(out, expected(q, k, v, scale, {}), torch.float16)


@pytest.mark.gpu
def test_decode_is_deterministic_and_capturable() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from sm12x_compile.lowering.triton.attention_decode import attention_decode

    q, k, v, scale, _ = inputs(Case("graph", S=1, T=4000), torch.bfloat16, "cuda")
    length = torch.tensor(3000, device="cuda")
    first = attention_decode(q, k, v, scale, kv_len=length)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(q, k, v, scale, kv_len=length)
    for filled in (3000, 17, 4000):  # the captured graph follows the length
        length.fill_(filled)
        graph.replay()
        check(captured, expected(q, k, v, scale, {"kv_len": length}), torch.bfloat16)
        assert torch.equal(captured, attention_decode(q, k, v, scale, kv_len=length))
    length.fill_(3000)
    assert torch.equal(first, attention_decode(q, k, v, scale, kv_len=length))
