"""Random latent attentions and mutations of them: compiled must equal eager in fp64; refusing is always allowed.

SM12X_FUZZ_CASES sets the number of graphs, SM12X_FUZZ_SEED the seed. A failure prints the `Spec` that rebuilds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sm12x_compile

from .test_fuzz import cases_wanted, outcome, seed_wanted

N, V = 8, 5
PARTS: dict[str, tuple[Any, ...]] = {
    "B": (1, 2),
    "H": (2, 3),
    "G": (1, 1, 2),
    "S": (1, 3, 6),
    "T": (4, 6, 9),
    "L": (6, 10),
    "R": (4, 4, 0),
    "form": ("linear", "linear", "einsum", "two_weights", "matmul", "absorbed", "joined"),
    "assembly": ("cat", "cat", "rope_first", "written", "stacked"),
    "cache": ("none", "cat", "index_copy", "buffer"),
    "mask": ("none", "causal", "length", "padding", "bias", "window"),
    "softmax": ("sdpa", "eager", "einsum"),
    "bias": (False, False, True),
    "norm": (False, True),
    "scale": (0.3, 1.0),
}
MUTATIONS = (
    "other_latent", "values_shifted", "values_reversed", "values_relu", "rope_of_heads", "rope_rolled",
    "weights_of_values_rolled", "weight_scaled_by_batch", "latent_written_between", "weight_written_between",
    "second_scale", "second_latent", "slice_off_by_one", "bias_of_tokens", "keys_returned", "latent_returned",
    "keys_clamped", "softcap", "softcap_of_one", "sink", "rope_doubled", "queries_swapped", "everything_masked",
    "keys_transposed",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    B: int = 2
    H: int = 3
    G: int = 1
    S: int = 3
    T: int = 6
    L: int = 6
    R: int = 4
    form: str = "linear"
    assembly: str = "cat"
    cache: str = "none"
    mask: str = "none"
    softmax: str = "eager"
    bias: bool = False
    norm: bool = False
    scale: float = 0.3
    mutations: tuple[str, ...] = ()
    seed: int = 0

    def has(self, mutation: str) -> bool:
        return mutation in self.mutations


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    chosen = {name: draw(st.sampled_from(values)) for name, values in PARTS.items()}
    mutations = draw(st.lists(st.sampled_from(MUTATIONS), max_size=2, unique=True))
    spec = Spec(**chosen, mutations=tuple(mutations), seed=draw(st.integers(0, 999)))
    if spec.form in ("absorbed", "joined"):
        spec = replace(spec, R=4, G=1, bias=False)
    return replace(spec, S=min(spec.S, spec.T)) if spec.cache == "buffer" else spec


def draw_inputs(spec: Spec) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    Hq = spec.H * spec.G
    return {
        "q": randn(spec.B, Hq, spec.S, N + spec.R), "q_latent": randn(spec.B, Hq, spec.S, spec.L),
        "latent": randn(spec.B, spec.T, spec.L), "other": randn(spec.B, spec.T, spec.L),
        "rope": randn(spec.B, spec.T, spec.R), "head_rope": randn(spec.B, spec.H, spec.T, spec.R),
        "new": randn(spec.B, min(2, spec.T), spec.L), "weight": randn(spec.H * (N + V), spec.L),
        "b": randn(spec.H * (N + V)), "per_batch": randn(spec.B, 1, 1, 1), "token_bias": randn(spec.T, 1),
        "at": torch.randint(0, spec.T - 1, (1,), generator=g), "keep": torch.rand(spec.B, spec.T, generator=g) < 0.6,
        "added": randn(spec.H * spec.G, spec.S, spec.T), "sinks": randn(Hq),
    }  # fmt: skip


def latent_attention(spec: Spec) -> Callable[[dict[str, Tensor]], Any]:
    def function(t: dict[str, Tensor]) -> Any:
        latent = t["latent"]
        if spec.cache == "cat":
            latent = torch.cat([latent[:, : -t["new"].shape[1]], t["new"]], 1)
        elif spec.cache == "index_copy":
            latent = latent.index_copy(1, t["at"], t["new"][:, :1])
        elif spec.cache == "buffer":
            latent[:, : spec.S] = t["new"][:, :1]
        if spec.norm:
            latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)
        extra: list[Tensor] = [latent] if spec.has("latent_returned") else []
        if spec.form in ("absorbed", "joined"):
            out = _absorbed(spec, t, latent)
        else:
            out = _expanded(spec, t, latent, extra)
        return (out, *extra) if extra else out

    return function


def _for_values(spec: Spec, t: dict[str, Tensor], latent: Tensor) -> Tensor:
    if spec.has("other_latent"):
        return t["other"]
    if spec.has("values_shifted"):
        return latent.roll(1, 1)
    if spec.has("values_reversed"):
        return latent.flip(0)
    return latent.relu() if spec.has("values_relu") else latent


def _expanded(spec: Spec, t: dict[str, Tensor], latent: Tensor, extra: list[Tensor]) -> Tensor:
    weight, H, B, T = t["weight"], spec.H, spec.B, spec.T
    heads = weight.view(H, N + V, spec.L)
    w_uk, w_uv = heads[:, :N], heads[:, N:]
    if spec.has("weights_of_values_rolled"):
        w_uv = w_uv.roll(1, 0)
    bias = t["b"] if spec.bias else None
    values = _for_values(spec, t, latent)
    if spec.form == "linear" and values is latent and not spec.has("weights_of_values_rolled"):
        both = F.linear(latent, weight, bias).view(B, T, H, N + V).transpose(1, 2)
        k, v = both.split([N, V], -1)
    else:
        k = _project(spec, latent, w_uk, None if bias is None else bias.view(H, N + V)[:, :N])
        if spec.has("latent_written_between"):
            t["latent"].mul_(1.5)
        if spec.has("weight_written_between"):
            t["weight"].mul_(1.5)
        v = _project(spec, values, w_uv, None if bias is None else bias.view(H, N + V)[:, N:])
    if spec.has("weight_scaled_by_batch"):
        k = k * t["per_batch"]
    if spec.has("bias_of_tokens"):
        k = k + t["token_bias"]
    if spec.has("keys_clamped"):
        k = k.clamp(max=1.0)
    k = _assemble(spec, t, k)
    if spec.has("keys_returned"):
        extra.append(k)
    if spec.has("keys_transposed"):
        k = k.flip(-1)
    q = t["q"].flip(1) if spec.has("queries_swapped") else t["q"]
    k, v = (x.repeat_interleave(spec.G, 1) if spec.G > 1 else x for x in (k, v))
    return _attend(spec, t, q, k, v)


def _project(spec: Spec, latent: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if spec.form == "einsum":
        out = torch.einsum("btl,hnl->bhtn", latent, w)
    elif spec.form == "matmul":
        out = latent[:, None] @ w.mT
    else:
        out = F.linear(latent, w.reshape(-1, spec.L)).unflatten(-1, (spec.H, -1)).transpose(1, 2)
    return out if bias is None else out + bias[:, None]


def _assemble(spec: Spec, t: dict[str, Tensor], k: Tensor) -> Tensor:
    if not spec.R:
        return k
    rope = t["rope"]
    if spec.has("rope_rolled"):
        rope = rope.roll(1, 1)
    if spec.has("rope_doubled"):
        rope = rope * 2
    shared = t["head_rope"] if spec.has("rope_of_heads") else rope[:, None].expand(-1, spec.H, -1, -1)
    if spec.assembly == "rope_first":
        return torch.cat([shared, k], -1)
    if spec.assembly == "written":
        whole = k.new_empty(*k.shape[:-1], N + spec.R)
        whole[..., :N] = k
        whole[..., N:] = shared
        return whole
    if spec.assembly == "stacked":
        return torch.cat([k, *shared.split(2, -1)], -1)
    return torch.cat([k, shared], -1)


def _absorbed(spec: Spec, t: dict[str, Tensor], latent: Tensor) -> Tensor:
    q, q_rope = t["q_latent"], t["q"][..., :4]
    values = _for_values(spec, t, latent)
    if spec.form == "joined":
        cache = torch.cat([latent, t["rope"]], -1)
        start = 1 if spec.has("slice_off_by_one") else 0
        k = cache[:, None].expand(-1, spec.H, -1, -1)
        v = cache[..., start : start + spec.L][:, None].expand(-1, spec.H, -1, -1)
        if values is not latent:
            v = values[:, None].expand(-1, spec.H, -1, -1)
        return _attend(spec, t, torch.cat([q, q_rope], -1), k, v)
    second = t["other"] if spec.has("second_latent") else latent
    s = torch.einsum("bhsl,btl->bhst", q, second)
    r = torch.einsum("bhsr,btr->bhst", q_rope, t["rope"])
    if spec.has("softcap_of_one"):
        s = 3.0 * torch.tanh(s / 3.0)
    s = s + r * 0.5 if spec.has("second_scale") else s + r
    return torch.einsum("bhst,btl->bhsl", _weights(spec, t, s * spec.scale), values)


def _mask(spec: Spec, t: dict[str, Tensor]) -> Tensor | None:
    i, j = torch.arange(spec.S)[:, None] + spec.T - spec.S, torch.arange(spec.T)
    masks = {
        "causal": lambda: (j <= i)[None, None], "window": lambda: ((j <= i) & (j > i - 3))[None, None],
        "length": lambda: (j <= t["at"])[None, None, None], "padding": lambda: t["keep"][:, None, None, :],
    }  # fmt: skip
    if spec.has("everything_masked"):
        return torch.zeros(spec.S, spec.T, dtype=torch.bool)[None, None]
    return masks[spec.mask]() if spec.mask in masks else None


def _weights(spec: Spec, t: dict[str, Tensor], s: Tensor) -> Tensor:
    if spec.has("softcap"):
        s = 3.0 * torch.tanh(s / 3.0)
    if spec.mask == "bias":
        s = s + t["added"]
    keep = _mask(spec, t)
    if keep is not None:
        s = s.masked_fill(~keep, -torch.inf if spec.seed % 2 else torch.finfo(s.dtype).min)
    if spec.has("sink"):
        column = t["sinks"][None, :, None, None].expand(spec.B, -1, spec.S, 1)
        return torch.cat([s, column], -1).softmax(-1)[..., :-1]
    return s.softmax(-1)


def _attend(spec: Spec, t: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if spec.softmax == "sdpa" and not spec.has("softcap") and not spec.has("sink"):
        mask = t["added"] if spec.mask == "bias" else _mask(spec, t)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    if spec.softmax == "einsum":
        return torch.einsum(
            "bhst,bhtv->bshv", _weights(spec, t, torch.einsum("bhsd,bhtd->bhst", q, k) * spec.scale), v
        )
    return _weights(spec, t, q @ k.mT * spec.scale) @ v


# ---------------------------------------------------------------- the check


def check(spec: Spec, seen: Counter[str]) -> None:
    torch._dynamo.reset()
    function = latent_attention(spec)
    compiled = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        for drawn in (spec, replace(spec, seed=spec.seed + 1000 * 2)):
            inputs = draw_inputs(drawn)
            copies = {k: x.clone() for k, x in inputs.items()}
            for mine, theirs in zip(outcome(compiled, copies), outcome(function, inputs), strict=True):
                torch.testing.assert_close(
                    mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{m}\n{spec}"
                )
    kind = "mutated" if spec.mutations else "plain"
    seen[kind] += 1
    seen[f"{kind}, rewritten"] += bool(report.count("mla"))


def fuzz(cases: int, seed: int | None) -> Counter[str]:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases, derandomize=seed is None, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(specs())
    def run(spec: Spec) -> None:
        check(spec, seen)

    run = hypothesis.seed(seed)(run) if seed is not None else run
    run()
    return seen


def assert_tally(seen: Counter[str]) -> None:
    print(seen)
    assert seen["mutated"] and seen["plain, rewritten"] >= 0.6 * seen["plain"], seen


def test_fuzz_latent() -> None:
    assert_tally(fuzz(cases_wanted(150), seed_wanted(None)))


@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(4))
def test_fuzz_latent_nightly(shard: int) -> None:
    seed = seed_wanted(random.SystemRandom().randrange(2**32)) + shard
    print(f"SM12X_FUZZ_SEED={seed}")
    assert_tally(fuzz(-(-cases_wanted(4_000) // 4), seed))
