"""`sm12x::gated_delta_rule` by three Triton kernels over chunks of 64 tokens: prepare, walk, output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from .arguments import card_of, device_guard
from .delta_tiles import CHUNK, ChunkTiles, chunk_tiles, segments

Launch = tuple[str, dict[str, Any], tuple[int, ...], int, int]


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None = None,
    qk_l2norm: str = "none", eps: float = 1e-6, cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sm12x::gated_delta_rule`; see `sm12x_compile.ops.gated_delta_rule` for the arguments.

    No host synchronisation, no atomics: it can be captured in a CUDA graph, and its result is the same every time.
    Products are of v's dtype (fp32 is kept whole), sums of fp32.

    Returns:
        o ``[B, T, Hv, V]`` and the final state ``[N, Hv, K, V]`` in fp32.

    Raises:
        ValueError: the shapes do not fit.
    """
    arch = card_of(q)
    B, T, Hv, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = chunk_tiles(arch, k.shape[3], V, g.ndim == 4, N * Hv)
    parts = segments(arch, tiles, V, N * Hv, -(-T * B // (CHUNK * max(1, N))))
    return run_chunked(
        tiles, parts, q, k, v, g, beta, scale, initial_state, qk_l2norm, eps, cu_seqlens, out_dtype
    )  # fmt: skip


def run_chunked(tiles: ChunkTiles, parts: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule_chunked` with the tiles, and the parts that sequences are cut into, given."""
    from . import delta_channel_kernel, delta_prepare_kernel, delta_state_kernel

    out, final, launches = chunked_launches(tiles, parts, *args, **kwargs)
    modules = (delta_prepare_kernel, delta_channel_kernel, delta_state_kernel)
    with device_guard(out):
        for name, arguments, grid, warps, stages in launches:
            kernel = next(getattr(m, name) for m in modules if hasattr(m, name))
            if all(grid):
                kernel[grid](**arguments, num_warps=warps, num_stages=stages)
    return out, final


def chunked_launches(
    tiles: ChunkTiles, parts: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, qk_l2norm: str = "none", eps: float = 1e-6,
    cu_seqlens: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Launch]]:  # fmt: skip
    """Storage of o and of the final state, and every kernel's name, arguments, grid, warps and stages, in order."""
    B, T, Hv, V = v.shape
    Hk, K = k.shape[2:]
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * -(-T // CHUNK) if cu_seqlens is None else T // CHUNK + N
    longest = -(-T // CHUNK)
    segment_chunks = max(1, -(-longest // parts))
    segment_count = N if parts == 1 else N * -(-longest // segment_chunks)
    if cu_seqlens is not None and parts > 1:
        segment_count = T // (segment_chunks * CHUNK) + N
    per_channel = g.ndim == 4
    out = v.new_empty(v.shape, dtype=out_dtype or v.dtype)
    final = v.new_empty((N, Hv, K, V), dtype=torch.float32)

    def scratch(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return v.new_empty(shape, dtype=dtype)

    w, u = scratch(chunks, Hv, CHUNK, K), scratch(chunks, Hv, CHUNK, V)
    scores = scratch(chunks, Hv, CHUNK, CHUNK)
    row_scales = None if per_channel else scratch(chunks, Hv, 2, CHUNK, dtype=torch.float32)
    chunk_decay = scratch(chunks, Hv, K if per_channel else 1, dtype=torch.float32)
    common = dict(
        cu_seqlens=cu_seqlens, T=T, sequences=N, HEADS=Hv, GROUP=Hv // Hk, K=K, V=V, CHUNK=CHUNK,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32", N_PAD=1 << N.bit_length(),
    )  # fmt: skip
    q_strides = dict(zip(("stride_qb", "stride_qt", "stride_qh", "stride_qd"), q.stride(), strict=True))
    k_strides = dict(zip(("stride_kb", "stride_kt", "stride_kh", "stride_kd"), k.stride(), strict=True))
    o_strides = dict(zip(("stride_ob", "stride_ot", "stride_oh"), out.stride(), strict=False))
    prepare = common | q_strides | k_strides
    prepare |= dict(
        q=q, k=k, v=v, g=g, beta=beta, w=w, u=u, scores=scores, chunk_decay=chunk_decay, scale=float(scale),
        eps=float(eps), BLOCK_D=tiles.prepare.width, NORM=qk_l2norm != "none",
        FINE="ieee" if v.dtype == torch.float32 else "tf32x3",
    )  # fmt: skip
    prepare |= zip(("stride_vb", "stride_vt", "stride_vh", "stride_vd"), v.stride(), strict=True)
    prepare |= zip(("stride_gb", "stride_gt", "stride_gh", "stride_gd"), g.stride(), strict=False)
    prepare |= zip(("stride_bb", "stride_bt", "stride_bh"), beta.stride(), strict=True)
    if per_channel:
        # What q and k are behind their decays is stored, for it differs from channel to channel.
        q_in, k_in = scratch(chunks, Hv, CHUNK, K), scratch(chunks, Hv, CHUNK, K)
        prepare |= dict(q_out=q_in, k_out=k_in)
        launches = [_launch("prepare_channels_kernel", prepare, (chunks, Hv), tiles.prepare)]
        q_strides, k_strides = dict.fromkeys(q_strides, 0), dict.fromkeys(k_strides, 0)
    else:
        q_in, k_in = q, k
        launches = [_launch("prepare_kernel", prepare | dict(row_scales=row_scales), (chunks, Hv), tiles.prepare)]
    walk = common | k_strides | dict(
        k=k_in, w=w, u=u, row_scales=row_scales, chunk_decay=chunk_decay, segment_chunks=segment_chunks,
        PER_CHANNEL=per_channel,
    )  # fmt: skip
    transition = None
    if parts > 1:
        transition = scratch(segment_count, Hv, K, V + K, dtype=torch.float32)
        first_walk = walk | dict(transition=transition, BLOCK_V=tiles.transition.width)
        grid = (segment_count, Hv, (V + K) // tiles.transition.width)
        launches.append(_launch("transition_kernel", first_walk, grid, tiles.transition))
    states = None if tiles.fused else scratch(chunks, Hv, K, V)
    walk |= q_strides | o_strides | dict(
        q=q_in, scores=scores, transition=transition, initial=initial_state, final=final, states=states,
        out=out if tiles.fused else None, BLOCK_V=tiles.state.width,
    )  # fmt: skip
    walk |= zip(
        ("stride_sn", "stride_sh", "stride_sk", "stride_sv"),
        (None,) * 4 if initial_state is None else initial_state.stride(), strict=True,
    )  # fmt: skip
    launches.append(_launch("state_kernel", walk, (V // tiles.state.width, Hv, segment_count), tiles.state))
    if not tiles.fused:
        output = common | q_strides | o_strides | dict(
            q=q_in, u=u, scores=scores, row_scales=row_scales, states=states, out=out, PER_CHANNEL=per_channel,
            BLOCK_K=min(64, K), BLOCK_V=tiles.output.width,
        )  # fmt: skip
        launches.append(_launch("output_kernel", output, (V // tiles.output.width, chunks, Hv), tiles.output))
    return out, final, launches


def _launch(name: str, arguments: dict[str, Any], grid: tuple[int, ...], tile: Any) -> Launch:
    return name, arguments, grid, tile.num_warps, tile.num_stages


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    B, T, Hv, V = v.shape
    Hk, K = k.shape[2:]
    fits = q.shape == k.shape and k.shape[:2] == (B, T) and Hv % Hk == 0 and beta.shape == (B, T, Hv)
    fits = fits and g.shape in ((B, T, Hv), (B, T, Hv, K)) and (cu_seqlens is None or B == 1)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not fits or (state is not None and state.shape != (N, Hv, K, V)):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta "
            f"{tuple(beta.shape)} and the initial state do not fit"
        )
