"""Sample calls of every semantic op, in sizes that models have: for `doctor` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .ops import OPS
from .registry import Call

BF16, INT, BYTE = torch.bfloat16, torch.int64, torch.uint8


@dataclass(frozen=True)
class Sample:
    """One call, with fake tensors."""

    title: str
    call: Call


@dataclass(frozen=True)
class _Sizes:
    """Of a large model, or of one that a CPU computes while somebody waits."""

    prompt: int
    cache: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    experts: int
    top_k: int
    inner: int
    dtype: torch.dtype


LARGE = _Sizes(2048, 8192, 32, 8, 128, 2048, 128, 8, 768, BF16)  # an 8B decoder; Qwen3-30B-A3B's experts
SMALL = _Sizes(128, 256, 4, 2, 32, 64, 8, 2, 64, torch.float32)


def samples(device: str, large: bool | None = None) -> list[Sample]:
    """The sample calls, with fake tensors on `device`; large ones on CUDA, if not said."""
    s = LARGE if (device == "cuda" if large is None else large) else SMALL
    with FakeTensorMode():
        t = lambda *shape, dtype=s.dtype: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        given = [*_attention(s, t), *_latent(s, t), *_experts(s, t), *_linear_attention(s, t)]
        return [Sample(title, _call(op, arguments)) for op, title, arguments in given]


Make = Callable[..., Tensor]
Given = list[tuple[str, str, dict[str, Any]]]


def _attention(s: _Sizes, t: Make) -> Given:
    q, kv = t(1, s.heads, s.prompt, s.head_dim), t(1, s.kv_heads, s.prompt, s.head_dim)
    prompt: dict[str, Any] = dict(q=q, k=kv, v=kv, scale=s.head_dim**-0.5, causal=True)
    token, cache = t(1, s.heads, 1, s.head_dim), t(1, s.kv_heads, s.cache, s.head_dim)
    step: dict[str, Any] = dict(q=token, k=cache, v=cache, scale=s.head_dim**-0.5, causal=True)
    rows, caches = t(8, s.heads, 1, s.head_dim), t(8, s.kv_heads, s.cache, s.head_dim)
    filled = t(dtype=INT)
    return [
        ("attention", "prompt, causal", prompt),
        ("attention", "prompt, window and sinks", {**prompt, "window_left": 127, "sinks": t(s.heads)}),
        ("attention", "prompt, softcap", {**prompt, "softcap": 50.0}),
        ("attention", "one token, static cache", {**step, "q_offset": filled}),
        ("attention", "one token, sinks", {**step, "q_offset": filled, "sinks": t(s.heads)}),
        ("attention", "8 rows, lengths", dict(q=rows, k=caches, v=caches, scale=0.1, kv_len=t(8, dtype=INT))),
    ]


def _latent(s: _Sizes, t: Make) -> Given:
    heads, latent, rope = s.heads, 4 * s.head_dim, s.head_dim // 2
    weight = t(heads, 2 * s.head_dim, latent)

    def call(queries: int, keys: int, **more: Any) -> dict[str, Any]:
        return dict(
            q_nope=t(1, heads, queries, s.head_dim), q_rope=t(1, heads, queries, rope), latent=t(1, keys, latent),
            k_rope=t(1, keys, rope), w_uk=weight[:, : s.head_dim], w_uv=weight[:, s.head_dim :], scale=0.07,
            causal=True, **more,
        )  # fmt: skip

    return [
        ("mla", "prompt", call(s.prompt, s.prompt)),
        ("mla", "one token, static cache", call(1, s.cache, q_offset=t(dtype=INT))),
    ]


def _experts(s: _Sizes, t: Make) -> Given:
    E, K, D, inner = s.experts, s.top_k, s.width, s.inner
    w13, w2 = t(E, 2 * inner, D), t(E, D, inner)
    packed = dict(
        w13=t(E, 2 * inner, D // 2, dtype=BYTE), w2=t(E, D, inner // 2, dtype=BYTE), format="mxfp4",
        w13_scale=t(E, 2 * inner, D // 32, dtype=BYTE), w2_scale=t(E, D, inner // 32, dtype=BYTE),
    )  # fmt: skip

    def rows(tokens: int) -> dict[str, Any]:
        return dict(x=t(tokens, D), topk_ids=t(tokens, K, dtype=INT), topk_weights=t(tokens, K, dtype=torch.float32))

    route = dict(logits=t(s.prompt, E), top_k=K, renormalise=True)
    linear = dict(weight=t(4 * D, D // 2, dtype=BYTE), scales=t(4 * D, D // 32, dtype=BYTE))
    return [
        ("moe", "one token", {**rows(1), "w13": w13, "w2": w2}),
        ("moe", "16 tokens", {**rows(16), "w13": w13, "w2": w2}),
        ("moe", "prompt", {**rows(s.prompt), "w13": w13, "w2": w2}),
        ("moe", "one token, mxfp4", {**rows(1), **packed}),
        ("moe", "prompt, mxfp4", {**rows(s.prompt), **packed}),
        ("moe_route", "prompt", route),
        ("mxfp4_linear", "one token", {"x": t(1, D), **linear}),
    ]


def _linear_attention(s: _Sizes, t: Make) -> Given:
    Hk, Hv, K, C = s.heads // 2, s.heads, s.head_dim, s.width

    def tokens(B: int, T: int) -> dict[str, Any]:
        return dict(
            q=t(B, T, Hk, K), k=t(B, T, Hk, K), v=t(B, T, Hv, K), g=t(B, T, Hv, dtype=torch.float32), beta=t(B, T, Hv),
            scale=K**-0.5, qk_l2norm="rsqrt",
        )  # fmt: skip

    pool, slots = t(16, Hv, K, K, dtype=torch.float32), t(8, dtype=INT)
    return [
        ("gated_delta_rule", "prompt", tokens(1, s.prompt)),
        ("gated_delta_rule_update", "8 rows, one token", {**tokens(8, 1), "state_pool": pool, "slots": slots}),
        ("gated_delta_rule_verify", "8 rows, 4 drafts", {
            **tokens(8, 4), "state_pool": pool, "journal": t(16, 2, 4, Hv, 2 * K + 1, dtype=torch.float32),
            "slots": slots, "accepted": t(8, dtype=INT), "turn": t(8, dtype=INT),
        }),
        ("causal_conv1d", "prompt", dict(x=t(1, C, s.prompt), w=t(C, 4), activation="silu")),
        ("causal_conv1d_update", "8 rows, one token", dict(
            x=t(8, C, 1), w=t(C, 4), state_pool=t(16, C, 4), slots=slots, activation="silu",
        )),
    ]  # fmt: skip


def _call(op: str, given: dict[str, Any]) -> Call:
    bound = OPS[op].signature.bind(**given)
    bound.apply_defaults()
    return Call(op, dict(bound.arguments))
