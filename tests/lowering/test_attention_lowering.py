"""The kernels of attention that are plain PyTorch, against the reference in fp64; and what each kernel declines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import choose
from sm12x_compile.ops import OPS
from sm12x_compile.ops.attention import EMPTY_ROWS, attention
from sm12x_compile.options import Options
from sm12x_compile.registry import Call, Kernel, No, kernels

# Relative to the largest element of the result. fp16 and bf16 round the weights, the values and the result.
BOUND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def call_of(*args: Any, **kwargs: Any) -> Call:
    bound = OPS["attention"].signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return Call("attention", dict(bound.arguments))


def inline_kernels() -> list[Kernel]:
    return [k for k in kernels("attention") if k.inline and not k.name.startswith("flashinfer.")]


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def check(kernel: Kernel, arguments: dict[str, Any]) -> bool:
    """Compare where the kernel accepts; whether it does."""
    if not kernel.accepts(Call("attention", arguments), CARDS["cpu"]):
        return False
    dtype = arguments["q"].dtype
    expected = attention.reference(**{k: wide(v) for k, v in arguments.items() if k != "out_dtype"})
    found = kernel.run(**arguments)
    assert found.dtype == (arguments["out_dtype"] or dtype), kernel.name
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan()), kernel.name
    error = (found.double() - expected).nan_to_num().abs().max() if found.numel() else torch.zeros(())
    size = expected.nan_to_num().abs().max() if found.numel() else torch.ones(())
    out_dtype = found.dtype if torch.finfo(found.dtype).eps > torch.finfo(dtype).eps else dtype
    assert float(error) <= BOUND[out_dtype] * max(float(size), 0.1), (kernel.name, float(error))
    return True


@st.composite
def arguments_of_a_call(draw: Any) -> dict[str, Any]:
    """Any call of the op that its reference allows."""
    B, Hkv, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    S, T, D, DV = (draw(st.integers(1, n)) for n in (7, 9, 6, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    seeds = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def randn(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=seeds).to(dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if len(shape) == 4 and draw(st.booleans()) else x

    def maybe(strategy: Any) -> Any:
        return draw(strategy) if draw(st.integers(0, 2)) == 0 else None

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=seeds)

    def per_batch(low: int, high: int) -> Tensor | None:
        return integers(low, high, () if draw(st.booleans()) else (B,)) if draw(st.integers(0, 2)) == 0 else None

    bias = None
    kind = draw(st.sampled_from(["none", "none", "bool", "float", "float with -inf"]))
    if kind != "none":
        shape = [n if draw(st.booleans()) else 1 for n in (B, Hkv * G, S)]
        bias = torch.randn(*shape, T, generator=seeds).to(dtype)
        if kind == "bool":
            bias = bias > -0.5
        elif kind == "float with -inf":
            bias = bias.masked_fill(bias < -0.3, float("-inf"))
    segments = draw(st.integers(0, 3)) == 0
    return {
        "q": randn(B, Hkv * G, S, D), "k": randn(B, Hkv, T, D), "v": randn(B, Hkv, T, DV),
        "scale": draw(st.sampled_from([0.5, 1.0, 0.125])), "causal": draw(st.booleans()),
        "window_left": maybe(st.integers(0, 4)), "window_right": maybe(st.integers(0, 4)),
        "chunk": maybe(st.integers(1, 4)), "q_offset": per_batch(-2, 4), "q_shift": maybe(st.integers(-2, 4)) or 0,
        "kv_len": per_batch(0, T), "key_padding": maybe(st.just(integers(0, 1, (B, T)).bool())),
        "q_segments": integers(0, 1, (B, S)) if segments else None,
        "k_segments": integers(0, 1, (B, T)) if segments else None,
        "bias": bias, "softcap": draw(st.sampled_from([0.0, 0.0, 0.0, 3.0])),
        "sinks": maybe(st.just(torch.randn(Hkv * G, generator=seeds).to(dtype))),
        "empty_rows": draw(st.sampled_from(EMPTY_ROWS)),
        "out_dtype": maybe(st.sampled_from([torch.float32, torch.bfloat16])),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", inline_kernels(), ids=lambda k: k.name)
def test_against_the_reference(kernel: Kernel) -> None:
    accepted = 0

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(arguments=arguments_of_a_call())
    def run(arguments: dict[str, Any]) -> None:
        nonlocal accepted
        if kernel.name == "torch.sdpa":  # takes no mask: leave out most of what makes it decline
            plain = dict.fromkeys(
                ("window_left", "window_right", "chunk", "q_offset", "kv_len", "key_padding", "q_segments",
                 "k_segments", "bias", "sinks")
            )  # fmt: skip
            arguments = {**arguments, **plain, "q_shift": 0, "softcap": 0.0}
        elif kernel.name == "torch.sdpa.masked":
            arguments = {**arguments, "sinks": None, "softcap": 0.0}
        accepted += check(kernel, arguments)

    run()
    assert accepted > 50, "the kernel declines nearly everything"


@pytest.mark.parametrize("empty_rows", ["zero", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_without_keys(dtype: torch.dtype, empty_rows: str) -> None:
    """The rows where sources differ, each way that a row can lose its keys; scores large, so that a sum would show."""
    masked = next(k for k in inline_kernels() if k.name == "torch.sdpa.masked")
    q, k, v = (100 * torch.randn(2, 2, 4, 8).to(dtype) for _ in range(3))
    rows = torch.tensor([[True], [False], [True], [False]]).expand(4, 4)
    half = torch.where(rows, 0.0, float("-inf")).to(dtype)
    for given_ in (
        {"causal": True, "q_shift": -2},
        {"kv_len": torch.tensor([0, 3])},
        {"key_padding": torch.tensor([[False] * 4, [True] * 4])},
        {"bias": rows.expand(2, 1, 4, 4)},
        {"bias": half.expand(2, 2, 4, 4)},
        {"bias": half[None, None] + 1, "causal": True},
        {"bias": half[None, None], "kv_len": torch.tensor([0, 3])},
        {"bias": rows.expand(1, 1, 4, 4), "key_padding": torch.tensor([[False] * 4, [True] * 4])},
    ):
        call = call_of(q, k, v, 1.0, empty_rows=empty_rows, **given_)
        assert check(masked, call.arguments), given_


def test_out_dtype_is_kept() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    for kernel in inline_kernels():
        assert kernel.run(**call_of(x, x, x, 1.0, out_dtype=torch.float32).arguments).dtype == torch.float32
        assert kernel.run(**call_of(x, x, x, 1.0).arguments).dtype == torch.bfloat16


# ------------------------------------------------------------------ who takes what

Q, K = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
ONE = torch.tensor(1)
CPU_HAS_NONE = "needs a CUDA GPU of compute capability 8.0 or later, not cpu"

DECLINED: list[tuple[str, dict[str, Any], str, str]] = [
    ("torch.sdpa", {"softcap": 5.0}, "cpu", "SDPA has no softcap"),
    ("torch.sdpa", {"sinks": torch.zeros(4)}, "cpu", "SDPA has no attention sinks"),
    ("torch.sdpa", {"window_left": 3}, "cpu", "window_left needs a mask tensor"),
    ("torch.sdpa", {"window_right": 3}, "cpu", "window_right needs a mask tensor"),
    ("torch.sdpa", {"chunk": 3}, "rtx5090", "chunk needs a mask tensor"),
    ("torch.sdpa", {"kv_len": ONE}, "cpu", "kv_len needs a mask tensor"),
    ("torch.sdpa", {"key_padding": torch.ones(1, 20).bool()}, "cpu", "key_padding needs a mask tensor"),
    ("torch.sdpa", {"q_segments": torch.ones(1, 20), "k_segments": torch.ones(1, 20)}, "cpu",
     "q_segments needs a mask tensor"),
    ("torch.sdpa", {"bias": torch.zeros(20, 20)}, "cpu", "bias needs a mask tensor"),
    ("torch.sdpa", {"causal": True, "q_shift": 1}, "cpu", "SDPA's causal mask has no offset"),
    ("torch.sdpa", {"causal": True, "q_offset": ONE}, "cpu", "SDPA's causal mask has no offset"),
    ("torch.sdpa.masked", {"softcap": 5.0}, "cpu", "SDPA has no softcap"),
    ("torch.sdpa.masked", {"sinks": torch.zeros(4)}, "cpu", "SDPA has no attention sinks"),
    ("torch.sdpa.masked", {"kv_len": ONE, "empty_rows": "nan"}, "cpu",
     "a query without keys is NaN in the model, zero in SDPA"),
    ("triton.decode", {"kv_len": ONE}, "cpu", "20 queries are more than the 16 that it is made for"),
    ("triton.prefill", {"kv_len": ONE}, "cpu", CPU_HAS_NONE),
    ("triton.decode", {"window_left": 3}, "rtx5090", "20 queries are more than the 16 that it is made for"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given_", "arch", "sentence"), DECLINED, ids=[f"{d[0]}: {d[3]}" for d in DECLINED])
def test_declined(name: str, given_: dict[str, Any], arch: str, sentence: str) -> None:
    call = call_of(Q, K, K, 0.5, **given_)
    (kernel,) = (k for k in kernels("attention") if k.name == name)
    assert kernel.accepts(call, CARDS[arch]) == No(sentence)
    _, refused = choose(call, CARDS[arch], Options())
    assert (name, sentence) in refused


def test_declined_dtypes() -> None:
    def reasons(q: Tensor, **given_: Any) -> dict[str, str]:
        chosen, refused = choose(call_of(q, q, q, 0.5, **given_), CARDS["cpu"], Options())
        assert chosen is not None and chosen.name == "aten"
        return dict(refused)

    half = Q.half()
    said = reasons(half, kv_len=ONE, empty_rows="mean")
    assert said["torch.sdpa.masked"] == (
        "float16 has no number low enough to mask with and keep the mean of empty rows"
    )
    said = reasons(Q.to(torch.float8_e5m2))
    assert said["torch.sdpa"] == said["torch.sdpa.masked"] == "SDPA does not take torch.float8_e5m2"


@pytest.mark.parametrize(
    ("given_", "arch", "kernel"),
    [
        ({}, "cpu", "torch.sdpa"),
        ({"causal": True}, "cpu", "torch.sdpa"),
        ({"causal": True}, "rtx5090", "torch.sdpa"),
        ({"q_shift": 4}, "cpu", "torch.sdpa"),  # a position that nothing uses
        ({"empty_rows": "nan"}, "cpu", "torch.sdpa"),  # no row can be empty
        ({"causal": True, "window_left": 3}, "cpu", "torch.sdpa.masked"),
        ({"causal": True, "window_left": 3}, "rtx5090", "triton.prefill"),
        ({"causal": True, "window_left": 3}, "gb10", "triton.prefill"),
        ({"sinks": torch.zeros(4)}, "cpu", "aten"),
        ({"sinks": torch.zeros(4)}, "h200", "triton.prefill"),
        ({"kv_len": ONE, "empty_rows": "nan"}, "cpu", "aten"),
    ],
)
def test_chosen(given_: dict[str, Any], arch: str, kernel: str) -> None:
    chosen, _ = choose(call_of(Q, K, K, 0.5, **given_), CARDS[arch], Options())
    assert chosen is not None and chosen.name == kernel


def test_few_queries_are_decoded_on_a_card() -> None:
    chosen, refused = choose(call_of(Q[:, :, :1], K, K, 0.5, kv_len=ONE), CARDS["rtx5090"], Options())
    assert chosen is not None and chosen.name == "triton.decode"
    assert refused == [("torch.sdpa", "kv_len needs a mask tensor")]
    assert [k.merit for k in kernels("attention")] == sorted((k.merit for k in kernels("attention")), reverse=True)
