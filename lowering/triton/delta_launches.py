"""Every launch of the kernels of the delta rule and of convolutions that tiles can ask for; see `launches.py`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ...arch import Arch
from .launches import FP32, Launch, meta, space

HEAD_DIMS = (64, 128, 256)


Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(K: int, V: int, kda: bool, T: int, Hk: int, Hv: int) -> Operands:
    """q, k, v, the log decay (a channel's own for KDA) and beta."""
    g = meta(1, T, Hv, K, dtype=FP32) if kda else meta(1, T, Hv, dtype=FP32)
    return meta(1, T, Hk, K), meta(1, T, Hk, K), meta(1, T, Hv, V), g, meta(1, T, Hv)


@space("delta_chunked")
def delta_chunked(arch: Arch) -> Iterator[Launch]:
    """Prompts: a decay per head or per channel, few and many heads, with a state or packed sequences."""
    from .delta_chunked import chunked_launches, kernel_of
    from .delta_tiles import CHUNK, chunk_tiles, keys_fit, parts

    chunks = 4096 // CHUNK
    for K, V, kda, heads, packed in product(HEAD_DIMS, HEAD_DIMS, (False, True), (8, 32, 128), (False, True)):
        if kda and not keys_fit(arch, K):
            continue
        tiles = chunk_tiles(arch, K, V, kda, heads, chunks, packed)
        count = parts(arch, tiles, K, V, heads, chunks)
        state = None if packed else meta(1, heads, K, V, dtype=FP32)
        bounds = meta(2, dtype=torch.int64) if packed else None
        tensors = operands(K, V, kda, 4096, heads, heads)
        for launch in chunked_launches(tiles, count, *tensors, 0.1, state, "rsqrt", 1e-6, bounds)[2]:
            kernel, tile = kernel_of(launch.kernel), launch.tile
            arguments = {name: launch.arguments[name] for name in kernel.arg_names}
            case = f"{K}x{V}, {'KDA' if kda else 'GDN'}, {heads} heads{', packed' if packed else ''}"
            yield Launch(case, kernel, arguments, tile.num_warps, tile.num_stages, tile.max_registers)


@space("delta_step")
def delta_step(arch: Arch) -> Iterator[Launch]:
    """One token, and four drafts to verify, against few and many states."""
    from .delta_step_kernel import step_kernel
    from .delta_tiles import step_tiles
    from .delta_update import update_launch, verify_launch

    slots = meta(1, dtype=torch.int64)
    for K, V, kda, states in product(HEAD_DIMS, HEAD_DIMS, (False, True), (1, 1 << 16)):
        pool = meta(9, 32, K, V, dtype=FP32)
        journal = meta(9, 2, 4, 32, K + V + (K if kda else 1), dtype=FP32)
        tiles = step_tiles(arch, K, V, states)
        update = update_launch(tiles, *operands(K, V, kda, 1, 16, 32), pool, slots, 0.1, "rsqrt")[1]
        drafts = operands(K, V, kda, 4, 16, 32)
        verify = verify_launch(tiles, *drafts, pool, journal, slots, slots, slots, 0.1, "rsqrt")[1]
        case = f"{K}x{V}, {'KDA' if kda else 'GDN'}, {states} states"
        for arguments in (update, verify):
            yield Launch(case, step_kernel, arguments, tiles.num_warps, 3, matrix=False)


@space("causal_conv1d")
def causal_conv1d(arch: Arch) -> Iterator[Launch]:
    """Whole sequences with channels or positions last, and one token against a pool."""
    from .causal_conv1d import UPDATE_CHANNELS, conv_launch, conv_update_launch
    from .conv_kernel import conv_kernel, conv_update_kernel

    for width in (2, 3, 4):
        w, bias = meta(8192, width), meta(8192)
        for name, x in (("channels last", meta(1, 4096, 8192).mT), ("positions last", meta(1, 8192, 4096))):
            arguments = conv_launch(x, w, bias, "silu", meta(1, 8192, width))[2]
            yield Launch(f"{name}, width {width}", conv_kernel, arguments, 4, 3, matrix=False)
        pool, slots = meta(9, 8192, width), meta(1, dtype=torch.int64)
        arguments = conv_update_launch(meta(1, 8192, 1), w, pool, slots, bias, "silu")[1]
        yield Launch(f"one token, width {width}", conv_update_kernel, arguments, UPDATE_CHANNELS // 32, 3, matrix=False)
