"""`sm12x::mla`'s reference against the expanded form, written out head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import attention, mla


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(
    B: int = 2,
    H: int = 3,
    S: int = 4,
    T: int = 6,
    N: int = 5,
    R: int = 2,
    V: int = 4,
    L: int = 7,
    seed: int = 0,
) -> tuple[Any, ...]:
    shapes = ((B, H, S, N), (B, H, S, R), (B, T, L), (B, T, R), (H, N, L), (H, V, L))
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (randn(*s, seed=seed + i) for i, s in enumerate(shapes))
    return (q_nope, q_rope if R else None, latent, k_rope if R else None, w_uk, w_uv)


def expand(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor, w_uv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the plain attention that MLA stands for."""
    H = w_uk.shape[0]
    k = torch.stack([latent @ w_uk[h].T for h in range(H)], dim=1)
    v = torch.stack([latent @ w_uv[h].T for h in range(H)], dim=1)
    if q_rope is None or k_rope is None:
        return q_nope, k, v
    return torch.cat([q_nope, q_rope], -1), torch.cat([k, k_rope[:, None].expand(-1, H, -1, -1)], -1), v


@pytest.mark.parametrize("R", [0, 2])
def test_one_query_at_a_time(R: int) -> None:
    ops = operands(R=R)
    q, k, v = expand(*ops)
    want = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for s in range(4):
                seen = range(s + 2 + 1)  # causal, query 0 stands at position 2
                weights = [math.exp(0.3 * float(q[b, h, s] @ k[b, h, t])) for t in seen]
                for t, w in zip(seen, weights, strict=True):
                    want[b, h, s] += w / math.fsum(weights) * v[b, h, t]
    torch.testing.assert_close(mla.reference(*ops, 0.3, causal=True, q_shift=2), want)


def test_against_sdpa_on_expanded_keys() -> None:
    ops = operands(S=6)
    want = F.scaled_dot_product_attention(*expand(*ops), is_causal=True, scale=0.3)
    torch.testing.assert_close(mla.reference(*ops, 0.3, causal=True), want)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    R=st.sampled_from([0, 1, 3]),
    causal=st.booleans(),
    window_left=st.none() | st.integers(0, 4),
    chunk=st.none() | st.integers(1, 4),
    softcap=st.sampled_from([0.0, 2.0]),
    empty_rows=st.sampled_from(["zero", "nan", "mean"]),
    given_=st.sets(
        st.sampled_from(["q_offset", "kv_len", "key_padding", "segments", "bias", "keep", "sinks"])
    ),
)
def test_masks_mean_what_they_mean_in_attention(
    seed: int,
    R: int,
    causal: bool,
    window_left: int | None,
    chunk: int | None,
    softcap: float,
    empty_rows: str,
    given_: set[str],
) -> None:
    ops = operands(R=R, seed=seed)
    masks: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, Tensor] = {
        "q_offset": torch.randint(0, 4, (2,), generator=generator),
        "kv_len": torch.randint(0, 7, (2,), generator=generator),
        "key_padding": torch.rand(2, 6, generator=generator) > 0.3,
        "sinks": torch.randn(3, generator=generator, dtype=torch.float64),
    }
    masks |= {name: tensor for name, tensor in draws.items() if name in given_}
    if "segments" in given_:
        masks["q_segments"] = torch.randint(0, 2, (2, 4), generator=generator)
        masks["k_segments"] = torch.randint(0, 2, (2, 6), generator=generator)
    if "keep" in given_:
        masks["bias"] = torch.rand(2, 1, 4, 6, generator=generator) > 0.3
    elif "bias" in given_:
        masks["bias"] = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    masks |= dict(
        causal=causal, window_left=window_left, chunk=chunk, softcap=softcap, empty_rows=empty_rows, q_shift=1
    )
    want = attention.reference(*expand(*ops), 0.3, **masks)
    torch.testing.assert_close(mla.reference(*ops, 0.3, **masks), want, equal_nan=True)


def test_weights_may_be_views_of_one_projection() -> None:
    """`kv_b_proj.weight` is [H (N + V), L]: both halves are strided views of it."""
    H, N, V, L = 3, 5, 4, 7
    q_nope, q_rope, latent, k_rope, _, _ = operands(S=6)
    weight = randn(H * (N + V), L, seed=9)
    kv = F.linear(latent, weight).unflatten(-1, (H, N + V)).transpose(1, 2)
    k = torch.cat([kv[..., :N], k_rope[:, None].expand(-1, H, -1, -1)], -1)
    want = F.scaled_dot_product_attention(torch.cat([q_nope, q_rope], -1), k, kv[..., N:], scale=0.3)
    w_uk, w_uv = weight.view(H, N + V, L).split([N, V], dim=1)
    torch.testing.assert_close(mla.overload(q_nope, q_rope, latent, k_rope, w_uk, w_uv, 0.3), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    low = [x.to(dtype) for x in operands(N=16, R=8, V=16, L=32)]
    low[4:] = [w / 6 for w in low[4:]]
    got = mla.overload(*low, 0.2)
    assert got.dtype == dtype
    assert mla.overload(*low, 0.2, out_dtype=torch.float32).dtype == torch.float32
    exact = mla.reference(*(x.double() for x in low), 0.2)
    # fp32 inside: the only rounding to `dtype` is that of the result.
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_bad_operands() -> None:
    ops = list(operands())
    for i, message in ((1, "both q_rope and k_rope"), (3, "both q_rope and k_rope")):
        with pytest.raises(ValueError, match=message):
            mla.overload(*ops[:i], None, *ops[i + 1 :], 1.0)
    for i in (2, 3, 4, 5):
        with pytest.raises(ValueError, match="do not fit"):
            mla.overload(*ops[:i], ops[i][..., 1:], *ops[i + 1 :], 1.0)
    with pytest.raises(ValueError, match="empty_rows"):
        mla.overload(*ops, 1.0, empty_rows="none")


def test_schema_and_fake(check_op: Any) -> None:
    check_op(mla, *operands(), 0.3)
    check_op(mla, *operands(R=0), 0.3, causal=True, kv_len=torch.tensor([3, 4]), out_dtype=torch.float32)


def test_cost_takes_the_cheaper_form() -> None:
    def cost(S: int, T: int) -> Any:
        shapes = (
            (1, 128, S, 128),
            (1, 128, S, 64),
            (1, T, 512),
            (1, T, 64),
            (128, 128, 512),
            (128, 128, 512),
        )
        tensors = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
        bound = mla.signature.bind(*tensors, 1.0)
        bound.apply_defaults()
        assert mla.cost is not None
        return mla.cost(dict(bound.arguments))

    decode = cost(1, 4096)
    assert decode.bytes == pytest.approx(2 * (4096 * 576 + 128 * 256 * 512 + 128 * 320))
    assert decode.flops == 2 * 128 * (4096 * (576 + 512) + 512 * 256)  # absorbed
    prefill = cost(2048, 2048)
    assert prefill.flops == 2 * 128 * (2048 * 2048 * (192 + 128) + 2048 * 512 * 256)  # expanded


@pytest.mark.parametrize("T", [2048, 2052])
def test_many_tokens(T: int) -> None:
    """The mixture of many latents is summed in blocks, where these are whole."""
    ops = operands(S=1, T=T)
    q, k, v = expand(*ops)
    assert torch.allclose(mla.reference(*ops, 0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))
