"""`sm12x::moe`'s reference against one expert, one token at a time, and Hugging Face's experts."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import moe

dequantize_fp4 = sys.modules["sm12x_compile.ops.mxfp4"].dequantize_fp4
E, D, INNER = 4, 6, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def act(name: str, x: float) -> float:
    if name == "silu":
        return x / (1 + math.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert name in ("relu", "relu2")
    return max(x, 0.0) ** (2 if name == "relu2" else 1)


def expert(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float | None,
) -> Tensor:
    """One expert on one token, number by number; weights [N, D] and [D, I]."""
    rows = [float(w13[n] @ x) + (0.0 if b13 is None else float(b13[n])) for n in range(len(w13))]
    if gated:
        half = len(rows) // 2
        pairs = [
            (rows[2 * i], rows[2 * i + 1]) if interleaved else (rows[i], rows[half + i]) for i in range(half)
        ]
        hidden = []
        for gate, up in pairs:
            if limit is not None:
                gate, up = min(gate, limit), max(-limit, min(up, limit))
            if activation == "swiglu_oai":
                hidden.append(gate / (1 + math.exp(-alpha * gate)) * (up + 1))
            else:
                hidden.append(act(activation, gate) * up)
    else:
        hidden = [act(activation, r) for r in rows]
    y = w2 @ torch.tensor(hidden, dtype=torch.float64)
    return y if b2 is None else y + b2


def oracle(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    *,
    weight_on: str = "output",
    **attributes: Any,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            e, p = int(ids[t, j]), float(weights[t, j])
            if not 0 <= e < len(w13):
                continue
            biases = (None if b is None else b[e].double() for b in (b13, b2))
            token = x[t].double() * p if weight_on == "input" else x[t].double()
            y = expert(token, w13[e].double(), w2[e].double(), *biases, **attributes)
            out[t] += y if weight_on == "input" else p * y
    return out


ATTRIBUTES: dict[str, Any] = dict(
    activation="silu", gated=True, interleaved=False, alpha=1.702, limit=None, weight_on="output"
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    T=st.integers(0, 5),
    K=st.integers(1, 3),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"]),
    gated=st.booleans(),
    interleaved=st.booleans(),
    limit=st.none() | st.sampled_from([0.5, 7.0]),
    alpha=st.sampled_from([1.702, 1.0]),
    weight_on=st.sampled_from(["output", "input"]),
    layout=st.sampled_from(["enk", "ekn"]),
    biased=st.booleans(),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_one_expert_one_token_at_a_time(
    seed: int,
    T: int,
    K: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    weight_on: str,
    layout: str,
    biased: bool,
    ids_dtype: torch.dtype,
) -> None:
    gated = gated or activation == "swiglu_oai"
    attributes: dict[str, Any] = dict(activation=activation, gated=gated, alpha=alpha, weight_on=weight_on)
    attributes |= dict(interleaved=interleaved and gated, limit=limit if gated else None)
    N = 2 * INNER if gated else INNER
    x, w13, w2 = randn(T, D, seed=seed), randn(E, N, D, seed=seed + 1), randn(E, D, INNER, seed=seed + 2)
    b13, b2 = (randn(E, N, seed=seed + 3), randn(E, D, seed=seed + 4)) if biased else (None, None)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 2, (T, K), generator=generator).to(ids_dtype)
    weights = torch.rand(T, K, generator=generator)
    stored = (w13, w2) if layout == "enk" else (w13.mT.contiguous(), w2.mT.contiguous())
    got = moe.reference(x, ids, weights, *stored, b13, b2, layout=layout, **attributes)
    torch.testing.assert_close(got, oracle(x, ids, weights, w13, w2, b13, b2, **attributes))


def test_ids_out_of_range_contribute_nothing() -> None:
    x, w13, w2 = randn(3, D), randn(E, 2 * INNER, D, seed=1), randn(E, D, INNER, seed=2)
    ids = torch.tensor([[1, 3], [-1, E], [2, -7]])
    weights = torch.rand(3, 2, dtype=torch.float64)
    clean = moe.reference(x, ids, weights, w13, w2)
    # Not even a NaN may come through: expert-parallel code leaves garbage there.
    weights[1], weights[2, 1] = math.nan, math.inf
    assert torch.equal(moe.reference(x, ids, weights, w13, w2), clean)
    assert torch.equal(clean[1], torch.zeros(D, dtype=torch.float64))


def test_all_tokens_to_one_expert_and_the_same_expert_twice() -> None:
    x, w13, w2 = randn(7, D), randn(E, 2 * INNER, D, seed=1), randn(E, D, INNER, seed=2)
    ids, weights = torch.full((7, 2), 2), torch.rand(7, 2, dtype=torch.float64)
    want = oracle(x, ids, weights, w13, w2, None, None, **ATTRIBUTES)
    torch.testing.assert_close(moe.reference(x, ids, weights, w13, w2), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    x, w13, w2 = (
        t.to(dtype) for t in (randn(5, D), randn(E, 2 * INNER, D, seed=1), randn(E, D, INNER, seed=2))
    )
    ids = torch.randint(0, E, (5, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = moe.overload(x, ids, weights, w13, w2)
    assert got.dtype == dtype
    assert moe.overload(x, ids, weights, w13, w2, out_dtype=torch.float32).dtype == torch.float32
    want = oracle(x, ids, weights, w13, w2, None, None, **ATTRIBUTES)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["expert", "row", "block"])
def test_fp8(kind: str) -> None:
    x = randn(3, D)
    w13, w2 = (randn(*s).to(torch.float8_e4m3fn) for s in ((E, 2 * INNER, D), (E, D, INNER)))
    ids, weights = torch.tensor([[0, 3], [1, 0], [2, 2]]), torch.rand(3, 2, dtype=torch.float64)

    def scaled(w: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Scales of a weight, and the weight multiplied out element by element (blocks of 4 x 4)."""
        _, N, K = w.shape
        shape = {"expert": (E,), "row": (E, N), "block": (E, math.ceil(N / 4), math.ceil(K / 4))}[kind]
        scale, full = randn(*shape, seed=seed).abs(), w.double()
        for e in range(E):
            for n in range(N):
                for k in range(K):
                    at = {"expert": (e,), "row": (e, n), "block": (e, n // 4, k // 4)}[kind]
                    full[e, n, k] *= scale[at]
        return scale, full

    (s13, full13), (s2, full2) = scaled(w13, 1), scaled(w2, 2)
    got = moe.reference(x, ids, weights, w13, w2, w13_scale=s13, w2_scale=s2, format="fp8", fp8_block=4)
    torch.testing.assert_close(got, oracle(x, ids, weights, full13, full2, None, None, **ATTRIBUTES))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_packed_weights(format: str) -> None:
    """gpt-oss's layer with packed weights; the unpacking itself is tested in test_mxfp4."""
    dim, inner, block = 64, 32, 32 if format == "mxfp4" else 16
    generator = torch.Generator().manual_seed(0)

    def packed(*shape: int) -> tuple[Tensor, Tensor]:
        rows, columns = shape
        codes = torch.randint(0, 256, (E, rows, columns // 2), generator=generator, dtype=torch.uint8)
        if format == "mxfp4":
            scale = torch.randint(
                118, 124, (E, rows, columns // block), generator=generator, dtype=torch.uint8
            )
        else:
            scale = torch.rand(E, rows, columns // block, generator=generator).to(torch.float8_e4m3fn)
        return codes, scale

    (w13, s13), (w2, s2) = packed(2 * inner, dim), packed(dim, inner)
    factors = dict(w13_global_scale=torch.rand(E), w2_global_scale=torch.rand(E)) if format == "nvfp4" else {}
    x, ids = randn(3, dim), torch.tensor([[0, 3], [1, -1], [2, 1]])
    weights, b13, b2 = torch.rand(3, 2, dtype=torch.float64), randn(E, 2 * inner), randn(E, dim)
    attributes = ATTRIBUTES | dict(activation="swiglu_oai", interleaved=True, limit=7.0)
    full = [
        dequantize_fp4("test", w, s, format, factors.get(name), torch.float64)
        for w, s, name in ((w13, s13, "w13_global_scale"), (w2, s2, "w2_global_scale"))
    ]
    want = oracle(x, ids, weights, full[0], full[1], b13, b2, **attributes)
    got = moe.overload(x, ids, weights, w13, w2, b13, b2, s13, s2, format, **attributes, **factors)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 1


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_against_hugging_face(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    if family == "gpt_oss":
        experts_class = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts
        config = transformers.GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=E)
    else:
        experts_class = importlib.import_module("transformers.models.mixtral.modeling_mixtral").MixtralExperts
        config = transformers.MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=E)
    config._experts_implementation = "eager"
    experts = experts_class(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8)
    weights, ids = torch.randn(5, E).softmax(-1).topk(2)
    with torch.no_grad():
        want = experts(x, ids, weights)
        if family == "gpt_oss":
            got = moe.reference(
                x, ids, weights, experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias,
                experts.down_proj_bias, layout="ekn", interleaved=True, activation="swiglu_oai",
                alpha=getattr(config, "swiglu_alpha", 1.702), limit=getattr(config, "swiglu_limit", 7.0),
            )  # fmt: skip
        else:
            got = moe.reference(x, ids, weights, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_bad_operands() -> None:
    x, w13, w2 = torch.zeros(3, D), torch.zeros(E, 2 * INNER, D), torch.zeros(E, D, INNER)
    ids, weights = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    fp8, scale = torch.float8_e4m3fn, torch.ones(E)

    def run(x: Tensor = x, ids: Tensor = ids, w13: Tensor = w13, w2: Tensor = w2, **kwargs: Any) -> Tensor:
        return moe.overload(x, ids, weights, w13, w2, **kwargs)

    quantised: dict[str, Any] = dict(w13=w13.to(fp8), w2=w2.to(fp8), format="fp8")
    for bad, message in (
        (lambda: run(format="int4"), "format='int4', not one of"),
        (lambda: run(layout="nk"), "layout='nk', not one of"),
        (lambda: run(activation="swiglu"), "activation='swiglu', not one of"),
        (lambda: run(weight_on="both"), "weight_on='both', not one of"),
        (lambda: run(ids=ids[:2]), "topk_ids"),
        (lambda: run(x=x[None]), "do not fit"),
        (lambda: run(x=x[:, 1:]), "do not fit"),
        (lambda: run(w13=w13[:, 1:]), "do not fit"),
        (lambda: run(w2=w2[1:]), "do not fit"),
        (lambda: run(layout="ekn"), "do not fit"),
        (lambda: run(gated=False), "do not fit"),
        (lambda: run(w13=w13[:, :INNER], gated=False, activation="swiglu_oai"), "need gated=True"),
        (lambda: run(w13=w13[:, :INNER], gated=False, limit=1.0), "need gated=True"),
        (lambda: run(w13_scale=scale), "have no scales"),
        (lambda: run(**quantised, w13_scale=scale), "need w13_scale and w2_scale"),
        (lambda: run(**quantised, w13_scale=scale, w2_scale=scale, layout="ekn"), "layout='enk'"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_schema_and_fake(check_op: Any) -> None:
    x, w13, w2 = (t.bfloat16() for t in (randn(3, D), randn(E, 2 * INNER, D), randn(E, D, INNER)))
    ids, weights = torch.tensor([[0, 3], [1, -1], [2, 2]]), torch.rand(3, 2)
    check_op(moe, x, ids, weights, w13, w2)
    check_op(
        moe, x, ids, weights, w13.mT, w2.mT, randn(E, 2 * INNER), randn(E, D), layout="ekn", interleaved=True,
        activation="swiglu_oai", limit=7.0, weight_on="input", out_dtype=torch.float32,
    )  # fmt: skip


def test_cost_counts_the_experts_hit() -> None:
    def cost(T: int) -> Any:
        shapes = ((T, 64), (T, 8), (T, 8), (128, 96, 64), (128, 64, 48))
        tensors = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
        bound = moe.signature.bind(*tensors)
        bound.apply_defaults()
        assert moe.cost is not None
        return moe.cost(dict(bound.arguments))

    per_expert = 2 * 3 * 48 * 64
    assert cost(1).bytes == pytest.approx(8 * per_expert + 2 * (2 * 64 + 2 * 8))
    assert cost(1).flops == 8 * per_expert
    assert cost(4096).bytes == pytest.approx(128 * per_expert + 2 * 4096 * (2 * 64 + 2 * 8))
