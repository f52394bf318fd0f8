"""`sm12x::gated_delta_rule` by Triton kernels over chunks of 64 tokens: prepare them in parallel, walk over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import card_of, device_guard
from .delta_tiles import CHUNK, ChunkTiles, Tile, chunk_tiles, parts


class Launch(NamedTuple):
    """A kernel by name, its arguments by name (and others that it does not have), its grid and tile."""

    kernel: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    tile: Tile


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
    K = k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = -(-B * T // (CHUNK * max(1, N)))
    tiles = chunk_tiles(arch, K, V, g.ndim == 4, N * Hv, chunks, cu_seqlens is not None)
    count = parts(arch, tiles, K, V, N * Hv, chunks)
    return run_chunked(
        tiles, count, q, k, v, g, beta, scale, initial_state, qk_l2norm, eps, cu_seqlens, out_dtype
    )  # fmt: skip


def run_chunked(tiles: ChunkTiles, count: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule_chunked` with the tiles, and the number of parts that sequences are cut into, given."""
    out, final, launches = chunked_launches(tiles, count, *args, **kwargs)
    with device_guard(out):
        for launch in launches:
            run_launch(launch)
    return out, final


def run_launch(launch: Launch) -> None:
    """Launch a kernel, unless its grid is empty."""
    kernel = kernel_of(launch.kernel)
    if all(launch.grid):
        given = {name: launch.arguments[name] for name in kernel.arg_names}
        tile = launch.tile
        options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers)
        kernel[launch.grid](**given, **options)


def kernel_of(name: str) -> Any:
    """A kernel of the chunked gated delta rule by name; imports Triton."""
    from . import delta_channel_kernel, delta_prepare_kernel, delta_state_kernel

    modules = (delta_prepare_kernel, delta_channel_kernel, delta_state_kernel)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def chunked_launches(
    tiles: ChunkTiles, count: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, qk_l2norm: str = "none", eps: float = 1e-6,
    cu_seqlens: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Launch]]:  # fmt: skip
    """Storage of o and of the final state, and the kernels to launch, in order."""
    B, T, Hv, V = v.shape
    Hk, K = k.shape[2:]
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # How long the packed sequences are is known on the device alone: these are bounds.
    chunks = B * -(-T // CHUNK) if cu_seqlens is None else T // CHUNK + N
    segment_chunks, segments = max(1, -(-T // CHUNK)), N
    if count > 1:
        segment_chunks = max(1, -(-B * T // (CHUNK * N * count)))
        tokens = segment_chunks * CHUNK
        segments = N * -(-T // tokens) if cu_seqlens is None else T // tokens + N
    per_channel = g.ndim == 4
    out = v.new_empty(v.shape, dtype=out_dtype or v.dtype)
    final = v.new_empty((N, Hv, K, V), dtype=torch.float32)

    def scratch(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return v.new_empty((chunks, Hv, *shape), dtype=dtype)

    common: dict[str, Any] = dict(
        cu_seqlens=cu_seqlens, T=T, sequences=N, HEADS=Hv, GROUP=Hv // Hk, K=K, V=V, CHUNK=CHUNK,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32", N_PAD=1 << N.bit_length(),
        inverse=scratch(CHUNK, CHUNK), scores=scratch(CHUNK, CHUNK), chunk_decay=scratch(K, dtype=torch.float32),
        row_scales=None if per_channel else scratch(3, CHUNK, dtype=torch.float32),
    )  # fmt: skip
    q_strides = dict(zip(("stride_qb", "stride_qt", "stride_qh", "stride_qd"), q.stride(), strict=True))
    k_strides = dict(zip(("stride_kb", "stride_kt", "stride_kh", "stride_kd"), k.stride(), strict=True))
    prepare = common | q_strides | k_strides | dict(
        q=q, k=k, g=g, beta=beta, scale=float(scale), eps=float(eps), BLOCK_D=tiles.prepare.width,
        NORM=qk_l2norm != "none",
    )  # fmt: skip
    prepare |= zip(("stride_gb", "stride_gt", "stride_gh", "stride_gd"), g.stride(), strict=False)
    prepare |= zip(("stride_bb", "stride_bt", "stride_bh"), beta.stride(), strict=True)
    walk = common | dict(v=v, segment_chunks=segment_chunks, PER_CHANNEL=per_channel)
    walk |= zip(("stride_vb", "stride_vt", "stride_vh", "stride_vd"), v.stride(), strict=True)
    if per_channel:
        # A decay that differs from channel to channel must be multiplied into q and k themselves.
        prepare |= dict(q_read=scratch(CHUNK, K), k_read=scratch(CHUNK, K), k_write=scratch(CHUNK, K))
        walk |= dict(q=prepare["q_read"], k=prepare["k_read"], k_write=prepare["k_write"])
        walk |= dict.fromkeys((*q_strides, *k_strides), 0)
        launches = [Launch("prepare_channels_kernel", prepare, (chunks, Hv), tiles.prepare)]
    else:
        walk |= q_strides | k_strides | dict(q=q, k=k, k_write=None)
        launches = [Launch("prepare_kernel", prepare, (chunks, Hv), tiles.prepare)]
    walk["transition"] = None
    if count > 1:
        walk["transition"] = v.new_empty((segments, Hv, K, V + K), dtype=torch.float32)
        first = walk | dict(BLOCK_V=tiles.transition.width, STAGES=tiles.transition.num_stages)
        grid = (segments, Hv, (V + K) // tiles.transition.width)
        launches.append(Launch("transition_kernel", first, grid, tiles.transition))
    walk |= dict(initial=initial_state, final=final, out=out)
    walk |= dict(BLOCK_V=tiles.state.width, STAGES=tiles.state.num_stages)
    start = (None,) * 4 if initial_state is None else initial_state.stride()
    walk |= zip(("stride_sn", "stride_sh", "stride_sk", "stride_sv"), start, strict=True)
    walk |= zip(("stride_ob", "stride_ot", "stride_oh"), out.stride(), strict=False)
    launches.append(Launch("state_kernel", walk, (V // tiles.state.width, Hv, segments), tiles.state))
    return out, final, launches


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
