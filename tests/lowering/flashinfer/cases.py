"""Calls of semantic ops that FlashInfer's candidates accept, in the layouts and with the masks that models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call


@dataclass(frozen=True)
class Case:
    """A call by its arguments; tensors are made anew by `make`."""

    name: str
    op: str
    kernel: str
    make: Callable[[], dict[str, Any]]

    def call(self, device: str = "cpu") -> Call:
        with torch.device("cpu"):
            given = {name: _moved(value, device) for name, value in self.make().items()}
        bound = OPS[self.op].signature.bind(**given)
        bound.apply_defaults()
        return Call(self.op, dict(bound.arguments))


def _moved(value: Any, device: str) -> Any:
    """On the device, with the same strides."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    base = value if value._base is None else value._base
    return base.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def heads_first(B: int, H: int, T: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    """``[B, H, T, D]`` as Hugging Face's caches lie."""
    return _random(B, H, T, D, dtype=dtype, seed=seed)


def tokens_first(B: int, H: int, T: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    """``[B, H, T, D]`` stored ``[B, T, H, D]``, as projections leave it."""
    return _random(B, T, H, D, dtype=dtype, seed=seed).transpose(1, 2)


def fused(B: int, H: int, T: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    """One half of a cache that holds keys and values behind each other for each token."""
    return _random(B, T, 2 * H, D, dtype=dtype, seed=seed)[:, :, :H].transpose(1, 2)


def attention(
    B: int = 2, Hq: int = 4, Hkv: int = 2, S: int = 1, T: int = 64, D: int = 64, Dv: int | None = None,
    dtype: torch.dtype = torch.bfloat16, layout: Any = heads_first, **rest: Any,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        given = {name: value() if callable(value) else value for name, value in rest.items()}
        q = tokens_first(B, Hq, S, D, dtype, 1)
        k, v = layout(B, Hkv, T, D, dtype, 2), layout(B, Hkv, T, Dv or D, dtype, 3)
        return {"q": q, "k": k, "v": v, "scale": D**-0.5, **given}

    return make


def latent(
    B: int = 2, H: int = 8, S: int = 1, T: int = 64, packed: bool = False, dtype: torch.dtype = torch.bfloat16,
    weights: tuple[int, int] | None = None, **rest: Any,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """weights: columns of a head's key and value, for up-projections; None for a query in latent space."""

    def make() -> dict[str, Any]:
        given = {name: value() if callable(value) else value for name, value in rest.items()}
        cache = _random(B, T, 576, dtype=dtype, seed=4)
        latents, rope = cache[..., :512], cache[..., 512:]
        if not packed:
            latents, rope = latents.clone(), rope.clone()
        width = weights[0] if weights else 512
        q, q_rope = (_random(B, S, H, n, dtype=dtype, seed=n).transpose(1, 2) for n in (width, 64))
        w_uk = w_uv = None
        if weights:  # halves of one parameter
            both = _random(H, sum(weights), 512, dtype=dtype, seed=5) * 512**-0.5
            w_uk, w_uv = both[:, :width], both[:, width:]
        return {
            "q_nope": q, "q_rope": q_rope, "latent": latents, "k_rope": rope, "w_uk": w_uk, "w_uv": w_uv,
            "scale": 192**-0.5, **given,
        }  # fmt: skip

    return make


def delta_rule(
    B: int = 2, T: int = 70, Hk: int = 1, Hv: int = 2, state: bool = False, dtype: torch.dtype = torch.bfloat16,
    cu_seqlens: list[int] | None = None, qk_l2norm: str = "rsqrt",
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        q, k = (_random(B, T, Hk, 128, dtype=dtype, seed=s) for s in (5, 6))
        if qk_l2norm == "none":
            q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
        g = -torch.nn.functional.softplus(_random(B, T, Hv, dtype=torch.float32, seed=8))
        beta = torch.sigmoid(_random(B, T, Hv, dtype=torch.float32, seed=9))
        bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        initial = _random(N, Hv, 128, 128, dtype=torch.float32, seed=10) if state else None
        return {
            "q": q, "k": k, "v": _random(B, T, Hv, 128, dtype=dtype, seed=7), "g": g, "beta": beta,
            "scale": 128**-0.5, "initial_state": initial, "qk_l2norm": qk_l2norm, "cu_seqlens": bounds,
        }  # fmt: skip

    return make


def experts(
    T: int = 5, D: int = 128, I: int = 128, E: int = 4, K: int = 2, interleaved: bool = False, ids: Any = None,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(12)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        chosen = integers(0, E, T, K) if ids is None else torch.tensor(ids)
        return {
            "x": _random(T, D, seed=13), "topk_ids": chosen, "topk_weights": _random(*chosen.shape, seed=14).sigmoid(),
            "w13": integers(0, 256, E, 2 * I, D // 2).to(torch.uint8),
            "w2": integers(0, 256, E, D, I // 2).to(torch.uint8),
            "w13_scale": integers(118, 122, E, 2 * I, D // 32).to(torch.uint8),
            "w2_scale": integers(118, 122, E, D, I // 32).to(torch.uint8),
            "format": "mxfp4", "interleaved": interleaved,
        }  # fmt: skip

    return make


def _at(*positions: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor(positions if len(positions) > 1 else positions[0])


def _sinks(heads: int) -> Callable[[], Tensor]:
    return lambda: _random(heads, seed=11)


_XQA = "flashinfer.xqa"
_FA2 = "flashinfer.fa2"
half = torch.float16

CASES = [
    Case(f"{kernel.split('.')[1]}: {name}", op, kernel, make)
    for op, kernel, name, make in [
        ("attention", _XQA, "static cache", attention(causal=True, q_offset=_at(40))),
        (
            "attention",
            _XQA,
            "each row has a position",
            attention(causal=True, q_offset=_at(3, 60), layout=tokens_first),
        ),
        ("attention", _XQA, "length", attention(kv_len=_at(17, 64), T=80, dtype=half)),
        ("attention", _XQA, "a row without keys", attention(kv_len=_at(0, 5), T=32)),
        ("attention", _XQA, "a row without keys is NaN", attention(kv_len=_at(0, 5), T=32, empty_rows="nan")),
        ("attention", _XQA, "position beyond the cache", attention(causal=True, q_offset=_at(90), T=48)),
        ("attention", _XQA, "sinks", attention(causal=True, q_offset=_at(20), Hq=8, sinks=_sinks(8))),
        ("attention", _XQA, "window", attention(causal=True, q_shift=63, window_left=9)),
        ("attention", _XQA, "fused cache, head dim 96", attention(causal=True, q_offset=_at(30), D=96, layout=fused)),
        ("attention", _XQA, "one row, 256", attention(B=1, Hq=2, Hkv=1, D=256, T=128, out_dtype=torch.float32)),
        ("attention", _FA2, "prompt", attention(S=30, T=30, causal=True, layout=tokens_first)),
        ("attention", _FA2, "continued prompt", attention(S=7, T=32, causal=True, q_shift=25)),
        ("attention", _FA2, "front of a cache", attention(S=7, T=64, causal=True, q_shift=6)),
        ("attention", _FA2, "no mask", attention(S=5, T=48, D=128, dtype=half, out_dtype=torch.float32)),
        ("attention", _FA2, "window and softcap", attention(S=20, T=20, causal=True, window_left=4, softcap=3.0)),
        ("attention", _FA2, "window on both sides", attention(S=6, T=20, window_left=4, q_shift=14)),
        ("attention", _FA2, "192 and 128", attention(S=9, T=9, D=192, Dv=128, causal=True, Hkv=4)),
        ("attention", _FA2, "sinks and window", attention(S=40, T=40, causal=True, window_left=8, sinks=_sinks(4))),
        ("attention", _FA2, "sinks", attention(S=11, T=16, causal=True, q_shift=5, sinks=_sinks(4))),
        ("attention", _FA2, "one token", attention(S=1, T=33, B=3, layout=fused)),
        ("mla", "flashinfer.mla_fa2", "one token", latent()),
        ("mla", "flashinfer.mla_fa2", "several", latent(S=3, T=37, causal=True, q_shift=34, packed=True)),
        ("mla", "flashinfer.mla_fa2", "front", latent(S=2, T=64, causal=True, q_shift=9, out_dtype=torch.float32)),
        ("mla", "flashinfer.mla_fa3", "one token", latent(H=64, T=4096)),
        ("mla", "flashinfer.mla_fa3", "several", latent(B=1, H=32, S=3, T=8192, causal=True, q_shift=8189)),
        ("mla", "flashinfer.mla_fa3", "front", latent(H=64, T=4099, causal=True, q_shift=9, out_dtype=torch.float32)),
        ("mla", "flashinfer.mla_fa3_token", "one token", latent(B=1, H=64, T=20480, weights=(128, 96))),
        (
            "mla",
            "flashinfer.mla_fa3_token",
            "front",
            latent(B=1, H=64, T=20487, weights=(48, 64), causal=True, q_shift=4000),
        ),
        ("mla", "flashinfer.mla_xqa", "static cache", latent(H=128, packed=True, causal=True, q_offset=_at(13))),
        ("mla", "flashinfer.mla_xqa", "length", latent(H=128, packed=True, kv_len=_at(0, 50), T=80)),
        ("gated_delta_rule", "flashinfer.gdn", "batch", delta_rule()),
        ("gated_delta_rule", "flashinfer.gdn", "state", delta_rule(state=True, B=1, T=9, Hv=4, dtype=half)),
        ("moe", "flashinfer.b12x_moe", "halves", experts()),
        ("moe", "flashinfer.b12x_moe", "interleaved", experts(interleaved=True, D=256)),
        (
            "moe",
            "flashinfer.b12x_moe",
            "expert numbers that do not exist",
            experts(T=3, ids=[[0, -1], [4, 3], [9, -2]]),
        ),
        ("gated_delta_rule", "flashinfer.gdn", "packed", delta_rule(B=1, cu_seqlens=[0, 20, 70], qk_l2norm="none")),
    ]
]
