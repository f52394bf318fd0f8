"""`sm12x::attention`'s reference against a row-by-row fp64 oracle, SDPA, and the ways people spell it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import attention


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def at(x: Tensor | None, b: int) -> int:
    """The entry of row b of a 0-d or [B] tensor."""
    return int(x.reshape(-1)[b if x.numel() > 1 else 0]) if x is not None else 0


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int | None = None,
    q_offset: Tensor | None = None,
    q_shift: int = 0,
    kv_len: Tensor | None = None,
    key_padding: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty_rows: str = "zero",
) -> Tensor:
    """One query at a time, over a Python list of the keys it may see."""
    q, k, v = q.double(), k.double(), v.double()
    (B, Hq, S, _), Hkv, T = q.shape, k.shape[1], k.shape[2]
    out = torch.zeros(B, Hq, S, v.shape[3], dtype=torch.float64)
    full_bias = None if bias is None else bias.expand(B, Hq, S, T)
    for b in range(B):
        for h in range(Hq):
            kv_head = h * Hkv // Hq
            for s in range(S):
                p = s + q_shift + at(q_offset, b)
                kept, scores = [], []
                for t in range(T):
                    seen = not (causal and t > p)
                    seen &= window_left is None or p - t <= window_left
                    seen &= window_right is None or t - p <= window_right
                    seen &= chunk is None or t // chunk == p // chunk
                    seen &= kv_len is None or t < at(kv_len, b)
                    if key_padding is not None:
                        seen &= bool(key_padding[b if key_padding.shape[0] > 1 else 0, t])
                    if q_segments is not None and k_segments is not None:
                        seen &= bool(q_segments[b, s] == k_segments[b, t])
                    score = scale * float(q[b, h, s] @ k[b, kv_head, t])
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    if full_bias is not None and full_bias.dtype == torch.bool:
                        seen &= bool(full_bias[b, h, s, t])
                    elif full_bias is not None:
                        score += float(full_bias[b, h, s, t])
                        seen &= score > -math.inf
                    if seen:
                        kept.append(t)
                        scores.append(score)
                if not kept:
                    if sinks is None and empty_rows == "mean":
                        out[b, h, s] = v[b, kv_head].mean(0)
                    elif sinks is None and empty_rows == "nan":
                        out[b, h, s] = math.nan
                    continue
                if sinks is not None:
                    scores.append(float(sinks[h]))
                top = max(scores)
                weights = [math.exp(x - top) for x in scores]
                total = math.fsum(weights)
                for t, w in zip(kept, weights, strict=False):
                    out[b, h, s] += w / total * v[b, kv_head, t]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor, float], dict[str, Any]]:
    B, Hkv, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    S, T, D, Dv = (draw(st.integers(1, top)) for top in (4, 7, 4, 3))
    Hq, seed = Hkv * G, draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def some(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    masks: dict[str, Any] = dict(
        causal=draw(st.booleans()),
        window_left=some(st.integers(0, 4)),
        window_right=some(st.integers(0, 4)),
        chunk=some(st.integers(1, 4)),
        q_shift=draw(st.sampled_from([0, 0, 3, -2])),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        empty_rows=draw(st.sampled_from(["zero", "nan", "mean"])),
    )
    per_row = draw(st.booleans())
    if draw(st.booleans()):
        masks["q_offset"] = integers(0, T, B) if per_row else integers(0, T, 1)[0]
    if draw(st.booleans()):
        masks["kv_len"] = integers(0, T + 2, B) if per_row else integers(0, T + 2, 1)[0]
    if draw(st.booleans()):
        masks["key_padding"] = integers(0, 4, B if per_row else 1, T) > 0
    if draw(st.booleans()):
        masks["q_segments"], masks["k_segments"] = integers(0, 2, B, S), integers(0, 2, B, T)
    if draw(st.booleans()):
        masks["sinks"] = torch.randn(Hq, generator=generator, dtype=torch.float64)
    shape = draw(st.sampled_from([(S, T), (1, T), (B, 1, S, T), (1, Hq, S, T), (B, Hq, S, T)]))
    kind = draw(st.sampled_from(["none", "none", "float", "inf", "bool"]))
    if kind == "bool":
        masks["bias"] = integers(0, 3, *shape) > 0
    elif kind != "none":
        masks["bias"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "inf":
            masks["bias"] = masks["bias"].masked_fill(integers(0, 3, *shape) == 0, -math.inf)
    q, k, v = (
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, Dv))
    )
    return (q, k, v, draw(st.sampled_from([1.0, 0.37, -0.5]))), masks


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_combination_of_masks(case: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    operands, masks = case
    got, want = attention.reference(*operands, **masks), oracle(*operands, **masks)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_sdpa(dtype: torch.dtype, causal: bool) -> None:
    q, k = randn(2, 6, 9, 16, dtype=dtype), randn(2, 2, 9, 16, seed=1, dtype=dtype)
    v = randn(2, 2, 9, 8, seed=2)
    want = F.scaled_dot_product_attention(
        q.double(), k.double(), v, is_causal=causal, scale=0.2, enable_gqa=True
    )
    got = attention.reference(q, k, v.to(dtype), 0.2, causal=causal)
    assert got.dtype == dtype
    # fp32 arithmetic on rounded inputs; the only large errors are the roundings of v and of the result.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, atol=8 * eps, rtol=4 * eps)


def test_dense_masks_as_sdpa_takes_them() -> None:
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 7, 4, seed=1), randn(2, 3, 7, 4, seed=2)
    keep = randn(2, 1, 5, 7, seed=3) > -0.5
    for mask in (keep, torch.zeros(2, 1, 5, 7, dtype=torch.float64).masked_fill(~keep, -math.inf)):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(attention.reference(q, k, v, 0.5, bias=mask), want)


def test_sinks_are_a_concatenated_column() -> None:
    q, k, v, sinks = randn(2, 4, 5, 8), randn(2, 4, 5, 8, seed=1), randn(2, 4, 5, 8, seed=2), randn(4, seed=3)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * 0.3).masked_fill(later, -math.inf)
    with_sink = torch.cat([scores, sinks.reshape(1, 4, 1, 1).expand(2, 4, 5, 1)], dim=-1)
    want = with_sink.softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(attention.reference(q, k, v, 0.3, causal=True, sinks=sinks), want)
    huge = attention.reference(q, k, v, 0.3, sinks=torch.full((4,), 1e4, dtype=torch.float64))
    assert torch.equal(huge, torch.zeros_like(huge))


def test_softcap_comes_before_the_mask_and_the_bias() -> None:
    q, k, v = randn(1, 2, 5, 4), randn(1, 2, 5, 4, seed=1), randn(1, 2, 5, 4, seed=2)
    bias = randn(5, 5, seed=3)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = 0.7 * torch.tanh(q @ k.mT * 3.0 / 0.7) + bias
    want = scores.masked_fill(later, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(attention.reference(q, k, v, 3.0, causal=True, softcap=0.7, bias=bias), want)


def test_rows_that_see_no_key() -> None:
    q, k, v = randn(2, 1, 3, 4), randn(2, 1, 5, 4, seed=1), randn(2, 1, 5, 4, seed=2)
    keep = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    keep[1, 0, 1] = False

    def run(**kwargs: Any) -> Tensor:
        return attention.reference(q, k, v, 0.5, bias=keep, **kwargs)

    scores = q @ k.mT * 0.5
    softmax_of_inf = scores.masked_fill(~keep, -math.inf).softmax(-1) @ v
    assert softmax_of_inf[1, 0, 1].isnan().all()
    torch.testing.assert_close(run(empty_rows="nan"), softmax_of_inf, equal_nan=True)
    # finfo.min swallows the score, so all keys are equally good: what eager Hugging Face code does.
    lowest = torch.where(keep, 0.0, torch.finfo(torch.float32).min).double()
    torch.testing.assert_close(run(empty_rows="mean"), (scores + lowest).softmax(-1) @ v)
    torch.testing.assert_close(run(empty_rows="mean")[1, 0, 1], v[1, 0].mean(0))
    zero = run()
    torch.testing.assert_close(zero, F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.5))
    assert torch.equal(zero[1, 0, 1], torch.zeros(4, dtype=torch.float64))
    sinks = torch.zeros(1, dtype=torch.float64)
    for mode in ("zero", "nan", "mean"):
        assert torch.equal(run(empty_rows=mode, sinks=sinks)[1, 0, 1], torch.zeros(4, dtype=torch.float64))
    none = attention.reference(q, k[:, :, :0], v[:, :, :0], 0.5)
    assert torch.equal(none, torch.zeros(2, 1, 3, 4, dtype=torch.float64))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = randn(1, 1, 3, 4) * 1e3, randn(1, 1, 5, 4, seed=1) * 1e3, randn(1, 1, 5, 4, seed=2)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention.reference(q, k, v, 0.5), want)


def test_heads_read_their_group() -> None:
    q, k, v = randn(1, 6, 4, 4), randn(1, 2, 4, 4, seed=1), randn(1, 2, 4, 4, seed=2)
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    torch.testing.assert_close(attention.reference(q, k, v, 0.5), attention.reference(q, *repeated, 0.5))


def test_decode_at_an_offset_in_a_tensor_is_prefills_last_row() -> None:
    q, k, v = randn(2, 2, 6, 4), randn(2, 2, 6, 4, seed=1), randn(2, 2, 6, 4, seed=2)
    prefill = attention.reference(q, k, v, 0.5, causal=True, window_left=3)
    cache_k, cache_v = (F.pad(x, (0, 0, 0, 5), value=math.nan) for x in (k, v))
    cache_k = cache_k.nan_to_num(7.0)
    cache_v = cache_v.nan_to_num(7.0)  # garbage behind the filled part must not be read
    step = attention.reference(
        q[:, :, 4:], cache_k, cache_v, 0.5, causal=True, window_left=3, q_offset=torch.tensor(3), q_shift=1,
        kv_len=torch.tensor([6, 6]),
    )  # fmt: skip
    torch.testing.assert_close(step, prefill[:, :, 4:])


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_out_dtype(v_dtype: torch.dtype) -> None:
    q, k = randn(1, 1, 3, 4, dtype=torch.bfloat16), randn(1, 1, 3, 4, seed=1, dtype=torch.bfloat16)
    v = randn(1, 1, 3, 4, seed=2, dtype=v_dtype)
    assert attention.overload(q, k, v, 0.5).dtype == v_dtype
    assert attention.overload(q, k, v, 0.5, out_dtype=torch.float32).dtype == torch.float32
    exact = oracle(q, k, v, 0.5)
    torch.testing.assert_close(
        attention.reference(q, k, v, 0.5, out_dtype=torch.float32).double(), exact, atol=1e-6, rtol=1e-5
    )


def test_chunks_reach_below_zero() -> None:
    q, k, v = randn(1, 1, 4, 4), randn(1, 1, 6, 4, seed=1), randn(1, 1, 6, 4, seed=2)
    want = oracle(q, k, v, 0.5, chunk=3, q_shift=-2)
    assert not want[0, 0, :2].any() and want[0, 0, 2:].all()  # positions -2 and -1 lie in a chunk of no keys
    torch.testing.assert_close(attention.reference(q, k, v, 0.5, chunk=3, q_shift=-2), want)


def test_the_result_is_stored_with_heads_last() -> None:
    q, k, v = (randn(1, 1, 3, 2, seed=i).permute(0, 3, 1, 2) for i in range(3))  # heads innermost
    assert attention.overload(q, k, v, 0.5).transpose(1, 2).is_contiguous()


def test_any_strides() -> None:
    q, k, v = randn(2, 5, 4, 8), randn(2, 6, 2, 8, seed=1), randn(2, 6, 2, 8, seed=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = attention.reference(q.contiguous(), k.contiguous(), v.contiguous(), 0.5, causal=True)
    torch.testing.assert_close(attention.overload(q, k, v, 0.5, causal=True), want)


@pytest.mark.parametrize(
    ("q", "k", "v", "empty_rows", "message"),
    [
        ((1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4), "zero", "do not fit"),
        ((1, 2, 2, 4), (1, 2, 2, 3), (1, 2, 2, 4), "zero", "do not fit"),
        ((1, 2, 2, 4), (1, 2, 5, 4), (1, 2, 4, 4), "zero", "do not fit"),
        ((1, 2, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4), "zeros", r"empty_rows='zeros', not one of"),
    ],
)
def test_bad_operands(q: Any, k: Any, v: Any, empty_rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention.overload(torch.zeros(q), torch.zeros(k), torch.zeros(v), 1.0, empty_rows=empty_rows)


def test_schema_and_fake(check_op: Any) -> None:
    q, k, v = (randn(*s, dtype=torch.bfloat16) for s in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)))
    check_op(attention, q, k, v, 0.5)
    check_op(
        attention, q, k, v, 0.5, causal=True, window_left=3, chunk=4, q_shift=1,
        q_offset=torch.tensor([1, 2]), kv_len=torch.tensor(4),
        key_padding=torch.ones(2, 5, dtype=torch.bool), bias=randn(3, 5), softcap=2.0,
        sinks=randn(4), empty_rows="mean", out_dtype=torch.float32,
    )  # fmt: skip


def test_cost_counts_what_is_visible() -> None:
    def cost(S: int, T: int, **kwargs: Any) -> Any:
        q, k = torch.empty(1, 8, S, 64, dtype=torch.bfloat16), torch.empty(1, 2, T, 64, dtype=torch.bfloat16)
        bound = attention.signature.bind(q, k, k, 1.0, **kwargs)
        bound.apply_defaults()
        assert attention.cost is not None
        return attention.cost(dict(bound.arguments))

    full = cost(256, 256)
    assert full.flops == 2 * 8 * 256 * 256 * 128
    assert full.bytes == 2 * (8 * 256 * 128 + 2 * 256 * 128)
    assert cost(256, 256, causal=True).flops == pytest.approx(full.flops / 2, rel=0.01)
    decode = cost(1, 4096, causal=True, q_offset=torch.tensor(2048), window_left=127)
    assert decode.bytes == pytest.approx(2 * 2 * 128 * 128, rel=0.05)
