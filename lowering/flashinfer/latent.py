"""`sm12x::mla` by FlashInfer: FA2, or FA3 on Hopper, over the latents in place; xqa for 128 heads on SM12x.

All compute `mla` without weights, but `mla_fa3_token`: one token with its weights, projected as `triton.mla_absorbed`
does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...ops import mla as op
from ...registry import Call
from ..triton.arguments import card_of, dtype_name
from ..triton.mla_absorbed import mla_absorbed_refusal, project
from . import installed
from .lengths import known_length, known_refusal, last_token_length, last_token_refusal
from .pages import page_size, page_table, pages_apart
from .plans import PLANS

FA2_FAMILIES = ("sm8x", "sm9x", "sm10x", "sm12x")
FA3_FAMILIES = ("sm9x",)
FA3_ROWS = 64  # of a tile
FA3_KEYS = 8192  # in all batches, from where on it was faster than our decode on an H200 (0.019 ms to 0.025)
TOKEN_KEYS = 20480  # the same for one token with its projections, between 16384 (0.048 to 0.046) and 32768
XQA_FAMILIES = ("sm12x",)  # xqa.py: "XQA MLA is only supported on SM120/SM121 GPUs"
DTYPES = (torch.float16, torch.bfloat16)
XQA_HEADS, LATENT, ROPE = 128, 512, 64
TILE_Q = 128  # _fa_common.py, _validate_fa_causal_tile_bound: what 0.7.2 refuses, earlier releases compute wrongly
MAX_ROWS = 16384  # work items of a plan
_SEMAPHORE_BYTES = 8 << 20


def _core(call: Call) -> str | None:
    if call.w_uk is not None:
        return "computes what is left once the up-projections are absorbed"
    if call.softcap or call.sinks is not None:
        return "FlashInfer's latent attention has neither a softcap nor sinks"
    if call.window_left is not None:
        return "FlashInfer's latent attention has no window"
    if call.k_rope is None:
        return "FlashInfer's latent attention needs the rotary part"
    if call.out_dtype not in (None, *DTYPES, torch.float32):
        return f"writes fp16, bf16 or fp32, not {dtype_name(call.out_dtype)}"
    return None


def mla_fa2_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_fa2` cannot take this call on this card, in one sentence, or None."""
    return _fa_refusal(call, arch, "FA2", FA2_FAMILIES)


def mla_fa3_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_fa3` cannot or should not take this call on this card, in one sentence, or None."""
    refusal = _fa_refusal(call, arch, "FA3", FA3_FAMILIES)
    if refusal:
        return refusal
    (B, H, S, _), T = call.q_nope.shape, call.latent.shape[1]
    if not all(isinstance(n, int) for n in (B, S, T)):
        return "every length is planned on the host, and these change from call to call"
    if not (call.latent.is_contiguous() and call.k_rope.is_contiguous()):
        return "FlashInfer gets latents and rotary keys as tensors without gaps; these would be copied at every step"
    if H * S < FA3_ROWS:
        return f"FA3 takes {FA3_ROWS} rows at a time, here {H * S}"
    if B * T < FA3_KEYS:
        return f"FA3 is faster from {FA3_KEYS} keys on, here {B * T}"
    return None


def mla_fa3_token_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_fa3_token` cannot or should not take this call on this card, in one sentence, or None."""
    if call.w_uk is None:
        return "the author has absorbed the up-projections"
    refusal = mla_absorbed_refusal(call, arch)
    if refusal:
        return refusal
    query = call.q_nope.new_empty((*call.q_nope.shape[:3], call.latent.shape[2]))
    core = Call("mla", {**call.arguments, "q_nope": query, "w_uk": None, "w_uv": None})
    refusal = mla_fa3_refusal(core, arch)
    if refusal is None and call.latent.shape[1] < TOKEN_KEYS:
        return f"FA3 is faster from {TOKEN_KEYS} keys on, here {call.latent.shape[1]}"
    return refusal


def _fa_refusal(call: Call, arch: Arch, name: str, families: tuple[str, ...]) -> str | None:
    refusal = _core(call) or installed.refusal(arch, families)
    if refusal:
        return refusal
    q, latent, rope = call.q_nope, call.latent, call.k_rope
    dtypes = {t.dtype for t in (q, call.q_rope, latent, rope)}
    if len(dtypes) > 1 or q.dtype not in DTYPES:
        names = " and ".join(sorted(map(dtype_name, dtypes)))
        return f"{name} needs queries and latents in fp16 or bf16 alike, not {names}"
    widths = (latent.shape[2], rope.shape[2])
    if widths != (LATENT, ROPE):
        return f"{name} is used for {LATENT} latents and {ROPE} rotary dimensions, here {widths[0]} and {widths[1]}"
    if not isinstance(q.shape[1], int):
        return "the number of heads must be known while compiling"
    if call.causal and TILE_Q % q.shape[1] and call.hint(q.shape[2]) > 1:
        return f"{name} may lose a query's last key unless its heads divide {TILE_Q}, here {q.shape[1]}"
    if call.hint(q.shape[0]) * call.hint(q.shape[2]) > MAX_ROWS:
        return f"plans up to {MAX_ROWS} queries"
    return known_refusal(call, q.shape[2], latent.shape[1])


def _by_backend(backend: str) -> Callable[..., Tensor]:
    @installed.explained(f"flashinfer.mla_{backend}")
    def run(
        q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor | None,
        w_uv: Tensor | None, scale: float, causal: bool = False, window_left: int | None = None,
        window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
        kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
        k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
        sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """`sm12x::mla` without weights, see `sm12x_compile.ops.mla` for the arguments and the result."""
        length = known_length(causal, window_left, q_shift, q_nope.shape[2], latent.shape[1])
        if not length or not q_nope.numel() or q_rope is None or k_rope is None:
            return op.reference(
                q_nope, q_rope, latent, k_rope, w_uk, w_uv, scale, causal, window_left, window_right, chunk, q_offset,
                q_shift, kv_len, key_padding, q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
            )  # fmt: skip
        result = _attend(backend, q_nope, q_rope, latent, k_rope, scale, causal, length)
        return (result if out_dtype in (None, latent.dtype) else result.to(out_dtype)).transpose(1, 2)

    return run


mla_fa2, mla_fa3 = _by_backend("fa2"), _by_backend("fa3")


def _attend(
    backend: str, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, scale: float, causal: bool,
    length: int,
) -> Tensor:  # fmt: skip
    """The mixture of latents, ``[B, S, H, L]``, by a wrapper that was planned for these shapes and this length."""
    B, H, S, L = q_nope.shape
    T, R, dtype = latent.shape[1], k_rope.shape[2], latent.dtype
    page = page_size(T) or 1
    # Pages of one token need no more than rows that follow each other; copied where a batch is not a run of pages.
    ckv, kpe = latent.contiguous().view(-1, page, L), k_rope.contiguous().view(-1, page, R)

    def make(workspace: Tensor) -> Any:
        wrapper = installed.entry("flashinfer.mla:BatchMLAPagedAttentionWrapper")(workspace, backend=backend)
        used = -(-length // page)
        wrapper.plan(
            qo_indptr=torch.arange(B + 1, dtype=torch.int32) * S,
            kv_indptr=torch.arange(B + 1, dtype=torch.int32) * used,
            kv_indices=page_table(B, T, page, T // page, torch.device("cpu"))[:, :used].reshape(-1).to(latent.device),
            kv_len_arr=torch.full((B,), length, dtype=torch.int32),
            num_heads=H,
            head_dim_ckv=L,
            head_dim_kpe=R,
            page_size=page,
            causal=causal,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return wrapper

    wrapper = PLANS.get(latent.device, (f"mla {backend}", B, H, S, length, T, L, R, dtype, causal, scale), make)
    rows, rope = (x.transpose(1, 2).reshape(B * S, H, -1) for x in (q_nope, q_rope))
    out = latent.new_empty((B * S, H, L))
    wrapper.run(q_nope=rows, q_pe=rope, ckv_cache=ckv, kpe_cache=kpe, out=out)
    return out.view(B, S, H, L)


@installed.explained("flashinfer.mla_fa3_token")
def mla_fa3_token(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor | None,
    w_uv: Tensor | None, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::mla` with its weights for one token, see `sm12x_compile.ops.mla` for the arguments and the result."""
    length = known_length(causal, window_left, q_shift, 1, latent.shape[1])
    if not length or q_rope is None or k_rope is None or w_uk is None or w_uv is None:
        return op.reference(
            q_nope, q_rope, latent, k_rope, w_uk, w_uv, scale, causal, window_left, window_right, chunk, q_offset,
            q_shift, kv_len, key_padding, q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
        )  # fmt: skip
    mixed = _attend("fa3", project(q_nope, w_uk), q_rope, latent, k_rope, scale, causal, length)
    return project(mixed.transpose(1, 2), w_uv.mT, out_dtype or latent.dtype)


def mla_xqa_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_xqa` cannot take this call on this card, in one sentence, or None."""
    refusal = _core(call) or installed.refusal(arch, XQA_FAMILIES)
    if refusal:
        return refusal
    q, latent, rope = call.q_nope, call.latent, call.k_rope
    if any(t.dtype != torch.bfloat16 for t in (q, call.q_rope, latent, rope)):
        return f"xqa decodes bf16 latents, not {dtype_name(latent.dtype)}"
    if q.shape[1] != XQA_HEADS or not isinstance(q.shape[2], int) or q.shape[2] != 1:
        return f"xqa decodes one query of exactly {XQA_HEADS} heads, here {call.hint(q.shape[2])} of {q.shape[1]}"
    if (latent.shape[2], rope.shape[2]) != (LATENT, ROPE):
        return f"xqa takes {LATENT} latents and {ROPE} rotary dimensions, here {latent.shape[2]} and {rope.shape[2]}"
    if not isinstance(latent.shape[1], int) or page_size(latent.shape[1]) is None:
        return f"xqa reads pages of 16 tokens or more, and a cache of {latent.shape[1]} cannot be cut into them"
    if not _side_by_side(latent, rope):
        return "xqa reads latent and rotary key side by side; here they are two tensors, to be joined at every step"
    return last_token_refusal(call)


def _side_by_side(latent: Tensor, rope: Tensor) -> bool:
    """Whether the rotary keys follow the latents row by row in one tensor, whose rows lie like pages."""
    same = latent.untyped_storage()._cdata == rope.untyped_storage()._cdata and latent.stride() == rope.stride()
    page = page_size(latent.shape[1])
    width = latent.shape[2] + rope.shape[2]
    return (
        same
        and rope.storage_offset() == latent.storage_offset() + latent.shape[2]
        and latent.stride(2) == 1
        and latent.stride(1) == width
        and page is not None
        and pages_apart((latent.stride(0), 0, latent.stride(1)), latent.shape[0], page) is not None
    )


def mla_xqa(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_uk: None, w_uv: None, scale: float,
    causal: bool = False, q_offset: Tensor | None = None, q_shift: int = 0, kv_len: Tensor | None = None,
    empty_rows: str = "zero", out_dtype: torch.dtype | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """`sm12x::mla` of one query of 128 heads, without weights; traced into the graph, but for the kernel itself."""
    B, T = latent.shape[:2]
    length = last_token_length(B, T, causal, q_offset, q_shift, kv_len, latent.device)
    query = torch.cat([q_nope, q_rope], dim=-1)
    out: Tensor = torch.ops.sm12x_flashinfer.xqa_mla(query, latent, k_rope, length.clamp(min=1), scale)
    if kv_len is not None or (causal and q_offset is not None):
        empty = float("nan") if empty_rows == "nan" else 0.0
        out = out.masked_fill((length < 1).reshape(-1, 1, 1, 1), empty)
    return out if out_dtype is None else out.to(out_dtype)


@torch.library.custom_op("sm12x_flashinfer::xqa_mla", mutates_args=())
@installed.explained("flashinfer.mla_xqa")
def _xqa_mla(query: Tensor, latent: Tensor, k_rope: Tensor, length: Tensor, scale: float) -> Tensor:
    """The kernel: query ``[B, 128, 1, 576]``, latent ``[B, T, 512]``, k_rope ``[B, T, 64]``, int32 ``[B]`` lengths."""
    B, H, _, width = query.shape
    T, L = latent.shape[1:]
    page = page_size(T)
    assert page is not None
    if _side_by_side(latent, k_rope):
        apart = pages_apart((latent.stride(0), 0, latent.stride(1)), B, page) or 0
        pages = (B - 1) * apart + T // page
        cache = latent.as_strided((pages, page, width), (page * width, width, 1))
    else:  # laid out anew since the graph was compiled
        apart = T // page
        cache = torch.cat([latent, k_rope], dim=-1).view(-1, page, width)
    out = query.new_empty((B, H, L))
    blocks = B + card_of(query).sm_count
    room = torch.empty(_SEMAPHORE_BYTES + blocks * 2 * H * (width + 16) * 4, dtype=torch.uint8, device=query.device)
    room[:_SEMAPHORE_BYTES].zero_()
    installed.entry("flashinfer.mla:xqa_batch_decode_with_kv_cache_mla")(
        query=query.transpose(1, 2).contiguous(),
        kv_cache=cache,
        workspace_buffer=room,
        qk_nope_head_dim=128,
        kv_lora_rank=L,
        qk_rope_head_dim=width - L,
        block_tables=page_table(B, T, page, apart, query.device),
        seq_lens=length.view(torch.uint32),
        max_seq_len=T,
        out=out,
        bmm1_scale=scale,
        bmm2_scale=1.0,
    )
    return out[:, None].transpose(1, 2)


@_xqa_mla.register_fake
def _xqa_mla_fake(query: Tensor, latent: Tensor, k_rope: Tensor, length: Tensor, scale: float) -> Tensor:
    B, H, S, _ = query.shape
    return query.new_empty((B, S, H, latent.shape[2])).transpose(1, 2)
