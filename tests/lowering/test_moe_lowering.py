"""The plain PyTorch forms of routed experts against the reference, and which of them is chosen when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import by_name
from sm12x_compile.lowering.moe import YES
from sm12x_compile.lowering.moe_cpu import sorted_experts
from sm12x_compile.lowering.moe_forms import gathered, grouped, unrolled
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.registry import Call, kernels

T, K, E, D, H = 6, 2, 5, 16, 24
FORMS: dict[str, Callable[..., Tensor]] = {
    "gathered": gathered, "grouped": grouped, "unrolled": unrolled, "sorted": sorted_experts,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "silu": {},
    "ekn": {"layout": "ekn"},
    "apart": {"w3": True},
    "apart_ekn_bias": {"w3": True, "layout": "ekn", "bias": True},
    "oai": {"activation": "swiglu_oai", "interleaved": True, "limit": 1.0, "bias": True},
    "ungated": {"activation": "relu2", "gated": False},
    "gelu_input": {"activation": "gelu_tanh", "weight_on": "input"},
    "fp32_out": {"out_dtype": torch.float32},
}


def arguments(case: dict[str, Any], dtype: torch.dtype, seed: int = 0, tokens: int = T) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.5).to(dtype)

    case = dict(case)
    apart, bias = case.pop("w3", False), case.pop("bias", False)
    rows = H if apart or not case.get("gated", True) else 2 * H
    shapes = {"w13": (E, rows, D), "w2": (E, D, H)} | ({"w3": (E, rows, D)} if apart else {})
    if case.get("layout") == "ekn":
        shapes = {n: (s[0], s[2], s[1]) for n, s in shapes.items()}
    found: dict[str, Any] = {n: randn(*s) for n, s in shapes.items()}
    if bias:
        found |= {"w13_bias": randn(E, rows), "w2_bias": randn(E, D)} | ({"w3_bias": randn(E, rows)} if apart else {})
    # Every row of the first token lies outside of the experts, one choice of the second as well.
    ids = torch.randint(0, E, (tokens, K), generator=g)
    ids[0], ids[1, 0] = torch.tensor([-1, E]), E + 7
    weights = torch.rand(tokens, K, generator=g).to(dtype)
    return {"x": randn(tokens, D), "topk_ids": ids, "topk_weights": weights, **found, **case}


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    bound = OPS["moe"].signature.bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_reference(form: str, case: str, dtype: torch.dtype) -> None:
    if form == "grouped" and dtype != torch.bfloat16:
        pytest.skip("PyTorch's grouped matmul compiles for bf16 alone")
    if form == "unrolled" and CASES[case].get("weight_on") == "input":
        pytest.skip("declined")
    given = defaults(arguments(CASES[case], dtype))
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    truth = OPS["moe"].reference(**wide | {"out_dtype": None})
    found = FORMS[form](**given)
    assert found.dtype == (given["out_dtype"] or dtype) and found.shape == (T, D)
    assert not found[0].any()
    # A form rounds to the dtype after each matrix, where the reference rounds once.
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
    tolerance = max(allowed[dtype], allowed[found.dtype])
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_what_nobody_chose_cannot_spoil_the_sum(form: str) -> None:
    """Experts that no row goes to may hold anything, and rows without an expert stay zero beside it."""
    dtype = torch.bfloat16 if form == "grouped" else torch.float32
    given = defaults(arguments(CASES["silu"], dtype))
    given["topk_ids"] = torch.where(given["topk_ids"] == 2, 3, given["topk_ids"])
    clean = FORMS[form](**given)
    given["w13"][2], given["w2"][2] = float("nan"), float("inf")
    assert torch.equal(FORMS[form](**given), clean)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("form", ["gathered", "grouped", "unrolled"])
def test_inlined_forms_have_static_shapes(form: str, tokens: int) -> None:
    """What goes into the graph must be traceable without looking at values, for any routing."""
    from torch.fx.experimental.proxy_tensor import make_fx

    dtype = torch.bfloat16 if form == "grouped" else torch.float32
    given = defaults(arguments(CASES["oai"], dtype, tokens=2))
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in given.items() if k not in tensors}

    def run(*values: Tensor) -> Tensor:
        return FORMS[form](**dict(zip(tensors, values, strict=True)), **rest)

    traced = make_fx(run, tracing_mode="fake")(*tensors.values())
    for seed in range(3):
        other = defaults(arguments(CASES["oai"], dtype, seed, tokens=2))
        torch.testing.assert_close(traced(*(other[n] for n in tensors)), run(*(other[n] for n in tensors)))


# ---------------------------------------------------------------- which one


def chosen(arch: str, tokens: int, dtype: torch.dtype, **sizes: Any) -> str:
    experts, top_k = sizes.pop("experts", 32), sizes.pop("top_k", 4)
    meta = {
        "x": (tokens, 512), "topk_ids": (tokens, top_k), "topk_weights": (tokens, top_k), "w13": (experts, 512, 512),
        "w2": (experts, 512, 256),
    }  # fmt: skip
    given = {n: torch.empty(s, dtype=torch.int64 if n == "topk_ids" else dtype, device="meta") for n, s in meta.items()}
    call = Call("moe", defaults({**given, **sizes}))
    plain = [k for k in kernels("moe") if not k.name.startswith("triton.")]
    assert Options().wants_kernel(plain[0].name)
    return next(k.name for k in plain if k.accepts(call, by_name(arch)) is YES)


@pytest.mark.parametrize(
    ("arch", "tokens", "dtype", "sizes", "kernel"),
    [
        ("cpu", 1, torch.float32, {}, "aten.gathered"),
        ("cpu", 256, torch.float32, {}, "cpu.sorted"),
        ("cpu", 256, torch.bfloat16, {}, "aten.grouped"),
        ("cpu", 1, torch.float32, {"stacked": True, "experts": 8, "top_k": 2}, "aten.unrolled"),
        ("cpu", 512, torch.float32, {"stacked": True, "experts": 8, "top_k": 2}, "cpu.sorted"),
        ("h200", 1, torch.bfloat16, {}, "aten.gathered"),
        ("h200", 64, torch.bfloat16, {}, "aten.grouped"),
        ("h200", 64, torch.float32, {"experts": 8, "top_k": 2}, "aten.dense"),
        ("h200", 1, torch.bfloat16, {"stacked": True, "experts": 8, "top_k": 2}, "aten.unrolled"),
    ],
)
def test_which_form(arch: str, tokens: int, dtype: torch.dtype, sizes: dict[str, Any], kernel: str) -> None:
    assert chosen(arch, tokens, dtype, **sizes) == kernel


def test_nothing_that_waits_for_a_gpu() -> None:
    """On a GPU the form that reads row counts declines, in words."""
    given = arguments(CASES["silu"], torch.float32)
    given = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in given.items()}
    (kernel,) = (k for k in kernels("moe") if k.name == "cpu.sorted")
    verdict = kernel.accepts(Call("moe", defaults(given)), by_name("rtx5090"))
    assert not verdict and "wait for the GPU" in verdict.reason  # type: ignore[union-attr]
