"""Every launch of the expert kernels that the tile functions can ask for; see `launches.py`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from .launches import BF16, DTYPES, FP32, Launch, meta, space

ROWS = (16, 32, 64, 128)
FORMS: dict[str, dict[str, Any]] = {
    "enk": {},
    "ekn": dict(layout="ekn"),
    "gpt-oss": dict(D=2880, inner=2880, layout="ekn", interleaved=True, biased=True, activation=4),
    "gelu, tails": dict(D=2000, inner=1008, activation=2),
    "unaligned rows": dict(D=1001, inner=501),
}
PACKED_FORMS: dict[str, dict[str, Any]] = {
    "rows of words": {},
    "gpt-oss": dict(D=2880, inner=2880, interleaved=True, biased=True, activation=4),
}


@space("moe_experts")
def moe_experts(arch: Arch) -> Iterator[Launch]:
    """Both products of routed experts, sorted or pair by pair, with plain and MXFP4 weights."""
    from .expert_kernel import expert_kernel
    from .expert_tiles import expert_tiles

    plain = [(name, form, dtype, False) for name, form in FORMS.items() for dtype in DTYPES]
    packed = [(f"mxfp4, {name}", form, BF16, True) for name, form in PACKED_FORMS.items()]
    both = (True, False)
    for (name, form, dtype, is_packed), rows, gated, sort in product([*plain, *packed], ROWS, both, both):
        tiles = expert_tiles(arch, rows, dtype, is_packed, gated, aligned=name != "unaligned rows")
        arguments = _arguments(tiles, gated, is_packed, dtype, sort=sort, **form)
        which = "gate and up" if gated else "down"
        case = f"{name}, {str(dtype).removeprefix('torch.')}, {which}, {rows} rows{', sorted' if sort else ''}"
        yield Launch(case, expert_kernel, arguments, tiles.num_warps, tiles.num_stages, matrix=dtype != FP32)


def _arguments(
    tiles: Any, gated: bool, packed: bool, dtype: torch.dtype, *, D: int = 2048, inner: int = 768, layout: str = "enk",
    interleaved: bool = False, biased: bool = False, sort: bool = True, activation: int = 1,
) -> dict[str, Any]:  # fmt: skip
    from .experts import PAIRS, TABLE, expert_launch, weight_operands

    E, (N, K) = 32, (2 * inner, D) if gated else (D, inner)
    scale = meta(E, N, K // 32, dtype=torch.uint8) if packed else None
    w: Tensor = meta(E, N, K // 2, dtype=torch.uint8) if packed else meta(E, N, K, dtype=dtype)
    if layout == "ekn":
        w = meta(E, K, N, dtype=dtype).mT
    operands = weight_operands(w, scale, meta(E, N, dtype=dtype) if biased else None, gated, gated and interleaved)
    where: dict[str, Any] = dict(source=PAIRS, ids=meta(256, 8, dtype=torch.int64))
    if sort:
        where = dict(source=TABLE, order=meta(2048, dtype=torch.int32), table=meta(160, 3, dtype=torch.int32))
    return expert_launch(
        meta(2048, K, dtype=dtype), meta(2048, operands["N"], dtype=dtype), operands, tiles, **where, blocks=160,
        rows=2048, top_k=8, gather=gated, scatter=not gated, activation=activation if gated else 0, alpha=1.7,
        limit=7.0 if activation == 4 else None,
    )[0]  # fmt: skip


@space("moe_order_and_route")
def moe_order_and_route(arch: Arch) -> Iterator[Launch]:
    """Sorting pairs by expert, adding up what they gave, and choosing experts."""
    from .expert_kernel import combine_kernel
    from .experts import combine_launch, order_launch
    from .moe_route import route_launch
    from .order_kernel import order_kernel
    from .route_kernel import route_kernel

    ids, weights = meta(4096, 8, dtype=torch.int64), meta(4096, 8, dtype=FP32)
    yield Launch("4096 tokens, 8 of 128", order_kernel, order_launch(ids, 128, 128)[0], 4, 2, matrix=False)
    combined = combine_launch(meta(32768, 2048), ids, weights, meta(4096, 2048), 128, True)[0]
    yield Launch("4096 tokens, 8 of 128", combine_kernel, combined, 4, 2, matrix=False)
    grouped = dict(score="sigmoid", n_group=8, topk_group=4, renormalise=True, scaling=2.5)
    ways: tuple[tuple[int, bool, dict[str, Any]], ...] = (
        (128, False, dict(renormalise=True)), (64, False, {}), (256, True, grouped), (32, True, dict(score="sigmoid")),
    )  # fmt: skip
    for experts, corrected, given in ways:
        bias = meta(experts, dtype=FP32) if corrected else None
        arguments, warps = route_launch(meta(4096, experts, dtype=FP32), 8, bias, **given)
        case = f"8 of {experts}, {given.get('score', 'softmax')}"
        yield Launch(case, route_kernel, arguments, warps, 2, matrix=False)
