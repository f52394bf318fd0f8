"""What FlashInfer's documentation says that its entry points compute, in plain PyTorch on a CPU, one row after another.

They take the arguments that the adapters build, so they tell whether layouts, lengths and scales were converted
rightly; `Bound` also holds every call against the signature of the installed package.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sm12x_compile.ops.mxfp4 import dequantize_fp4


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window_left: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q ``[S, Hq, D]``, k and v ``[T, Hkv, D]`` in fp64; masks are aligned to the last key (bottom right)."""
    S, T, (Hq, Hkv) = q.shape[0], k.shape[0], (q.shape[1], k.shape[1])
    scores = torch.einsum("shgd,thd->hgst", q.unflatten(1, (Hkv, Hq // Hkv)), k).flatten(0, 1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(S)[:, None] + T - S
    t = torch.arange(T)
    keep = torch.ones(S, T, dtype=torch.bool)
    if causal:
        keep &= t <= at
    if window_left >= 0:
        keep &= t >= at - window_left
    scores = scores.masked_fill(~keep, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, S, 1)], -1)
    weights = scores.softmax(-1)[..., :T].unflatten(0, (Hkv, Hq // Hkv))
    return torch.einsum("hgst,thd->shgd", weights, v).flatten(1, 2)


def _rows(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first tokens of a sequence from HND pages ``[pages, H, P, D]``: ``[length, H, D]`` in fp64."""
    assert pages.dtype == torch.int32
    return torch.cat([cache[int(p)].transpose(0, 1) for p in pages])[:length].double()


def xqa_batch_decode_with_kv_cache(
    query: Tensor, kv_cache: tuple[Tensor, Tensor], workspace_buffer: Tensor, block_tables: Tensor, seq_lens: Tensor,
    max_seq_len: int, bmm1_scale: float = 1.0, bmm2_scale: float = 1.0, window_left: int = -1,
    out: Tensor | None = None, sinks: Tensor | None = None, kv_layout: str = "NHD", **_: Any,
) -> Tensor:  # fmt: skip
    k, v = kv_cache
    page = k.shape[2]
    assert kv_layout == "HND" and page in (16, 32, 64, 128) and k.stride() == v.stride()
    assert query.is_contiguous() and out is not None and out.is_contiguous()
    assert seq_lens.dtype == torch.uint32 and seq_lens.shape == query.shape[:1] and bmm2_scale == 1.0
    assert block_tables.is_contiguous() and block_tables.shape[1] * page == max_seq_len
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == query.shape[1:2])
    assert workspace_buffer.dtype == torch.uint8 and not workspace_buffer[: 4 * len(query) * k.shape[1]].any()
    for b, length in enumerate(seq_lens.tolist()):
        assert 1 <= length <= max_seq_len
        keys, values = (_rows(t, block_tables[b], length) for t in (k, v))
        out[b] = _attend(query[b : b + 1].double(), keys, values, bmm1_scale, True, window_left, 0.0, sinks)[0]
    return out


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", backend: str = "auto", **_: Any) -> None:
        assert kv_layout == "HND" and backend == "fa2" and float_workspace_buffer.numel() >= 128 << 20

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        **plan: Any,
    ) -> None:  # fmt: skip
        assert all(t.dtype == torch.int32 for t in (qo_indptr, paged_kv_indptr, paged_kv_indices))
        self.bounds = qo_indptr.tolist(), paged_kv_indptr.tolist(), paged_kv_last_page_len.tolist()
        self.pages, self.planned = paged_kv_indices, plan

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, out: Tensor, **_: Any) -> Tensor:
        plan, (k, v) = self.planned, paged_kv_cache
        assert q.dtype == plan["q_data_type"] and q.stride(-1) == 1
        assert (k.shape[1:], v.shape[1:]) == (
            (plan["num_kv_heads"], plan["page_size"], plan["head_dim_qk"]),
            (plan["num_kv_heads"], plan["page_size"], plan["head_dim_vo"]),
        )
        sinks, scale = self._extra(args)
        queries, pages, last = self.bounds
        for b in range(len(last)):
            length = (pages[b + 1] - pages[b] - 1) * plan["page_size"] + last[b]
            keys, values = (_rows(t, self.pages[pages[b] : pages[b + 1]], length) for t in (k, v))
            rows = slice(queries[b], queries[b + 1])
            out[rows] = _attend(
                q[rows].double(), keys, values, scale or plan["sm_scale"], plan["causal"], plan["window_left"],
                plan["logits_soft_cap"] or 0.0, sinks,
            )  # fmt: skip
        return out

    def _extra(self, args: tuple[Any, ...]) -> tuple[Tensor | None, float | None]:
        assert not args
        return None, None


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    def __init__(self, float_workspace_buffer: Tensor, window_left: int = -1, **rest: Any) -> None:
        super().__init__(float_workspace_buffer, rest["kv_layout"], rest["backend"])
        self.built = (rest["q_data_type"], rest["head_dim_qk"], rest["head_dim_vo"], window_left >= 0)

    def _extra(self, args: tuple[Any, ...]) -> tuple[Tensor | None, float | None]:
        plan = self.planned
        assert self.built == (plan["q_data_type"], plan["head_dim_qk"], plan["head_dim_vo"], plan["window_left"] >= 0)
        sinks, scale = args
        assert sinks.dtype == torch.float32
        return sinks, scale


class BatchMLAPagedAttentionWrapper:
    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        assert backend in ("fa2", "fa3") and float_workspace_buffer.numel() >= 128 << 20

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, **plan: Any) -> None:
        assert all(t.dtype == torch.int32 for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr))
        self.bounds = qo_indptr.tolist(), kv_indptr.tolist(), kv_len_arr.tolist()
        self.pages, self.planned = kv_indices, plan

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, out: Tensor) -> Tensor:
        queries, pages, lengths = self.bounds
        plan = self.planned
        assert ckv_cache.shape[1:] == (plan["page_size"], plan["head_dim_ckv"])
        assert kpe_cache.shape[1:] == (plan["page_size"], plan["head_dim_kpe"])
        assert q_nope.shape[1:] == (plan["num_heads"], plan["head_dim_ckv"])
        for b, length in enumerate(lengths):
            table = self.pages[pages[b] : pages[b + 1]]
            latent, rope = (_rows(t[:, None], table, length) for t in (ckv_cache, kpe_cache))
            rows = slice(queries[b], queries[b + 1])
            query = torch.cat([q_nope[rows], q_pe[rows]], -1).double()
            keys = torch.cat([latent, rope], -1)
            out[rows] = _attend(query, keys, latent, plan["sm_scale"], plan["causal"], -1, 0.0, None)
        return out


def xqa_batch_decode_with_kv_cache_mla(
    query: Tensor, kv_cache: Tensor, workspace_buffer: Tensor, qk_nope_head_dim: int, kv_lora_rank: int,
    qk_rope_head_dim: int, block_tables: Tensor, seq_lens: Tensor, max_seq_len: int, out: Tensor,
    bmm1_scale: float = 1.0, bmm2_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    assert query.shape[1:] == (1, 128, 576) and query.is_contiguous() and kv_cache.shape[2] == 576
    assert seq_lens.dtype == torch.uint32 and bmm2_scale == 1.0 and workspace_buffer.numel() > 8 << 20
    assert (kv_lora_rank, qk_rope_head_dim) == (512, 64) and block_tables.shape[1] * kv_cache.shape[1] == max_seq_len
    for b, length in enumerate(seq_lens.tolist()):
        keys = _rows(kv_cache[:, None], block_tables[b], length)
        out[b] = _attend(query[b].double(), keys, keys[..., :512], bmm1_scale, True, -1, 0.0, None)[0]
    return out


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor, output: Tensor, output_state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``g`` is the decay itself, and states have the keys last."""
    assert all(t.is_contiguous() for t in (q, k, v, g, beta, output, output_state)) and output_final_state
    assert g.dtype == beta.dtype == torch.float32 and q.shape[2] == v.shape[2] == 128
    group = v.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    queries, keys = (x.double().repeat_interleave(group, 1) for x in (q, k))
    for n, (first, last) in enumerate(pairwise(bounds)):
        state = torch.zeros(output_state.shape[1:]).double() if initial_state is None else initial_state[n].double()
        for t in range(first, last):
            state = state * g[t].double()[:, None, None]
            u = beta[t].double()[:, None] * (v[t].double() - torch.einsum("hvk,hk->hv", state, keys[t]))
            state = state + u[:, :, None] * keys[t][:, None, :]
            output[t] = scale * torch.einsum("hvk,hk->hv", state, queries[t])
        output_state[n] = state
    return output, output_state


def prepare_w4a16_fp4_e8m0_k32_weights(*, w13_layout: str, activation: str, **weights: Any) -> SimpleNamespace:
    """Copies the weights as they are."""
    assert w13_layout == "w31" and activation == "silu"
    assert all(t.is_contiguous() for t in weights.values() if isinstance(t, Tensor))
    assert bool((weights["w13_global_scale"] == 1).all() and (weights["w2_global_scale"] == 1).all())
    names = {"w13_fp4": "w13", "w13_e8m0_scale": "w13_scale", "w2_fp4": "w2", "w2_e8m0_scale": "w2_scale"}
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in weights.items()}
    return SimpleNamespace(**{names.get(name, name): value for name, value in copied.items()})


def allocate_sm120_moe_workspace(*, routed_rows: int, num_topk: int, **_: Any) -> SimpleNamespace:
    assert routed_rows % num_topk == 0
    return SimpleNamespace(**dict.fromkeys(_CACHES))


_CACHES = (
    "intermediate_cache13", "intermediate_cache2", "fc1_c_tmp", "fc2_c_tmp", "packed_route_indices",
    "block_expert_ids", "packed_route_count", "expert_offsets",
)  # fmt: skip


def run_w4a16_moe(
    a_input: Tensor, prepared: Any, topk_weights: Tensor, topk_ids: Tensor, *, activation: str, output: Tensor,
    **caches: Any,
) -> Tensor:  # fmt: skip
    """bf16 rows times four-bit weights, gate first; negative expert numbers contribute nothing."""
    assert set(caches) == set(_CACHES) and activation == "silu" and prepared.w13_layout == "w31"
    assert (prepared.source_format, prepared.scale_format) == ("fp4_e8m0_k32", "e8m0_k32")
    assert topk_weights.dtype == torch.float32 and topk_ids.dtype == torch.int32
    assert int(topk_ids.max()) < prepared.num_experts
    w13, w2 = (
        dequantize_fp4("moe", w, s, "mxfp4", dtype=torch.float64)
        for w, s in ((prepared.w13, prepared.w13_scale), (prepared.w2, prepared.w2_scale))
    )
    assert w2.shape[1:] == (prepared.hidden_size, prepared.intermediate_size)
    output.zero_()
    for t, row in enumerate(a_input.double()):
        total = torch.zeros_like(row)
        for e, p in zip(topk_ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            if e >= 0:
                gate, up = (w13[e] @ row).chunk(2)
                total += p * (w2[e] @ (torch.nn.functional.silu(gate) * up))
        output[t] = total
    return output


_B12X = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"
ENTRIES: dict[str, Any] = {
    f"{_B12X}.moe_w4a16_prepare:prepare_w4a16_fp4_e8m0_k32_weights": prepare_w4a16_fp4_e8m0_k32_weights,
    f"{_B12X}.moe_w4a16_prepare:W4A16PackedWeights": SimpleNamespace,
    f"{_B12X}.moe_w4a16_prepare:_make_workspace": lambda device, max_blocks_per_sm: torch.zeros(1),
    f"{_B12X}.moe_dispatch:allocate_sm120_moe_workspace": allocate_sm120_moe_workspace,
    f"{_B12X}.moe_w4a16_kernel:run_w4a16_moe": run_w4a16_moe,
    "flashinfer.decode:xqa_batch_decode_with_kv_cache": xqa_batch_decode_with_kv_cache,
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper,
    "flashinfer.attention:BatchAttentionWithAttentionSinkWrapper": BatchAttentionWithAttentionSinkWrapper,
    "flashinfer.mla:BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper,
    "flashinfer.mla:xqa_batch_decode_with_kv_cache_mla": xqa_batch_decode_with_kv_cache_mla,
    "flashinfer.gdn_prefill:chunk_gated_delta_rule": chunk_gated_delta_rule,
}


class Bound:
    """A stand-in whose calls are held against the signature of the real thing, which is never called."""

    def __init__(self, real: Any, stand_in: Any, seen: list[str], name: str) -> None:
        self._real, self._stand_in, self._seen, self._name = real, stand_in, seen, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inspect.signature(self._real).bind(*args, **kwargs)
        self._seen.append(self._name)
        result = self._stand_in(*args, **kwargs)
        wrapper = hasattr(result, "plan")
        return _Methods(self._real, result, self._seen, self._name) if wrapper else result


class _Methods:
    def __init__(self, real: type, instance: Any, seen: list[str], name: str) -> None:
        self._real, self._instance, self._seen, self._name = real, instance, seen, name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        real = getattr(self._real, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(real).bind(self, *args, **kwargs)
            self._seen.append(f"{self._name}.{method}")
            return getattr(self._instance, method)(*args, **kwargs)

        return call
