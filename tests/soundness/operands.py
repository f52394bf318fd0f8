"""The first half of a random graph: inputs, layouts, caches, head groups, masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Spec

Inputs = dict[str, Tensor]


def draw_inputs(spec: Spec, dtype: torch.dtype) -> Inputs:
    """All tensors that the graph of `spec` may read, drawn in fp64 and rounded to fp32 so that both agree."""
    generator = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def bools(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    B, Hq, Hkv, S, T, D, Dv = spec.B, spec.Hq, spec.Hkv, spec.S, spec.T, spec.D, spec.Dv
    new = S if spec.cache != "none" else T  # tokens whose keys come in with this call
    shapes = {"q": (B, Hq, S, D), "k": (B, Hkv, new, D), "v": (B, Hkv, new, Dv)}
    inputs: Inputs = {}
    if spec.layout == "fused":
        inputs["qkv"] = randn(B, S, (Hq + 2 * Hkv) * D)
    else:
        for name, (b, h, n, d) in shapes.items():
            shape = {"tokens_first": (b, n, h, d), "no_batch": (h, n, d)}.get(spec.layout, (b, h, n, d))
            inputs[name] = randn(*shape)
    if spec.cache == "cat":
        inputs["past_k"], inputs["past_v"] = randn(B, Hkv, T - S, D), randn(B, Hkv, T - S, Dv)
    elif spec.cache == "fused":
        inputs["kv_cache"] = randn(2, B, Hkv, T, D)
    elif spec.cache != "none":
        inputs["k_cache"], inputs["v_cache"] = randn(B, Hkv, T, D), randn(B, Hkv, T, Dv)
    length = ints(1, T + 1, B)
    inputs |= {
        "start": ints(0, T - S + 1 if T > S else 1),
        "padding": torch.arange(T) < length[:, None],
        "keep": bools(B, 1, S, T),
        "keep_rows": bools(S, T),
        "length": length[0].clone(),
        "lengths": length,
        "segments_q": ints(0, 2, B, S),
        "segments_k": ints(0, 2, B, T),
        "slopes": randn(Hq).abs(),
        "bias": randn(1, Hq, S, T),
        "whole_bias": randn(B, Hq, S, T),
        "sinks": randn(Hq),
        "rows": randn(S, 1),
        "temperature": randn(Hq, 1, 1).abs() + 0.5,
        "fill": torch.tensor(float("-inf"), dtype=dtype),
        "picked": ints(0, T, T),
    }
    return inputs


def operands(spec: Spec, t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[..., Hq, S, D]`` and the new tokens' k, v ``[..., Hkv, n, D]``, as views of the inputs."""
    if spec.layout == "fused":
        q, k, v = t["qkv"].split([spec.Hq * spec.D, spec.Hkv * spec.D, spec.Hkv * spec.D], dim=-1)
        heads = zip((q, k, v), (spec.Hq, spec.Hkv, spec.Hkv), strict=True)
        q, k, v = (x.view(spec.B, spec.S, h, spec.D).transpose(1, 2) for x, h in heads)
        return q, k, v
    if spec.layout == "tokens_first":
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return q, k, v
    return t["q"], t["k"], t["v"]


def cached(spec: Spec, t: Inputs, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with what the cache holds; the cache is updated in place where it is a buffer."""
    n = spec.S
    if spec.cache == "cat":
        return torch.cat((t["past_k"], k), dim=2), torch.cat((t["past_v"], v), dim=2)
    if spec.cache == "slice":
        first = spec.seed % (spec.T - n + 1)
        t["k_cache"][:, :, first : first + n] = k
        t["v_cache"][:, :, first : first + n] = v
    elif spec.cache == "index_copy":
        position = t["start"] + torch.arange(n)
        t["k_cache"].index_copy_(2, position, k)
        t["v_cache"].index_copy_(2, position, v)
    elif spec.cache == "setitem":
        position = t["start"] + torch.arange(n)
        t["k_cache"][:, :, position] = k
        t["v_cache"][:, :, position] = v
    elif spec.cache == "ring":
        position = (t["start"] + 2 + torch.arange(n)) % spec.T
        t["k_cache"].index_copy_(2, position, k)
        t["v_cache"].index_copy_(2, position, v)
    elif spec.cache == "fused":
        position = t["start"] + torch.arange(n)
        t["kv_cache"][0].index_copy_(2, position, k)
        t["kv_cache"][1].index_copy_(2, position, v)
        return t["kv_cache"][0], t["kv_cache"][1]
    else:
        return k, v
    return t["k_cache"], t["v_cache"]


def grouped(spec: Spec, x: Tensor, name: str) -> Tensor:
    """`x` ``[..., Hkv, T, D]`` with each kv head standing for its G query heads."""
    G = spec.G
    if G == 1:
        return x
    if spec.has("repeat_whole") or (spec.has("repeat_values_only") and name == "v"):
        return x.repeat(*(1,) * (x.dim() - 3), G, 1, 1)
    if spec.grouping == "expand":
        *batch, H, T, D = x.shape
        return x[..., :, None, :, :].expand(*batch, H, G, T, D).reshape(*batch, H * G, T, D)
    return x.repeat_interleave(G, dim=-3)


def keep_masks(spec: Spec, t: Inputs) -> list[Tensor]:
    """Bool tensors broadcastable to the scores, True where a key may be attended."""
    masks = [_mask(name, spec, t) for name in spec.masks]
    if spec.has("anticausal"):
        masks.append(torch.ones(spec.S, spec.T, dtype=torch.bool).triu())
    if spec.has("off_by_one"):
        masks.append(torch.arange(spec.T) <= torch.arange(spec.S)[:, None] + spec.T - spec.S + 1)
    if spec.has("random_mask"):
        masks.append(torch.rand(spec.S, spec.T) < 0.7)
    if spec.has("everything_masked"):
        masks.append(torch.arange(spec.T) < t["length"] - spec.T)
    if spec.has("mask_inverted"):
        masks = [~m for m in masks]
    if spec.has("mask_transposed") and spec.S == spec.T:
        masks = [m.mT if m.dim() >= 2 and m.shape[-1] == m.shape[-2] else m for m in masks]
    if spec.has("mask_rows_shifted"):
        masks = [m.roll(1, dims=-2) if m.dim() >= 2 else m for m in masks]
    return masks


def _mask(name: str, spec: Spec, t: Inputs) -> Tensor:
    S, T = spec.S, spec.T
    shift = T - S
    query, key = torch.arange(S)[:, None], torch.arange(T)[None, :]
    distance = query + shift - key
    if name == "causal_tril":
        return torch.ones(S, T, dtype=torch.bool).tril(shift)
    if name == "causal_triu":
        return torch.triu(torch.ones(S, T), diagonal=1 + shift) == 0
    if name == "causal_arange":
        return key <= query + shift
    if name == "causal_top_left":
        return query >= key
    if name == "window":
        return (distance >= 0) & (distance < 3)
    if name == "band":
        return torch.ones(S, T).tril(shift).triu(shift - 2).bool()
    if name == "window_both":
        return distance.abs() <= 2
    if name == "chunk":
        return (query + shift) // 3 == key // 3
    if name == "padding":
        return t["padding"][:, None, None, :]
    if name == "padding_int":
        return t["padding"].long().unsqueeze(1).unsqueeze(2) != 0
    if name == "dense":
        return t["keep"]
    if name == "dense_rows":
        return t["keep_rows"]
    if name == "length":
        return torch.arange(T) < t["length"]
    if name == "lengths":
        return (torch.arange(T)[None] < t["lengths"][:, None])[:, None, None]
    if name == "offset":
        return torch.arange(T) <= t["start"] + query
    if name == "window_at_offset":
        return torch.arange(T) > t["start"] + query - 3
    if name == "packed":
        return t["segments_q"][:, None, :, None] == t["segments_k"][:, None, None, :]
    assert name == "prefix", name
    return (key <= query + shift) | (key < 2)
