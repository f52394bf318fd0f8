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
PACKED_ROWS = (16, 32, 64)
PACKED_FORMS: dict[str, dict[str, Any]] = {
    "rows of words": {},
    "gpt-oss": dict(D=2880, inner=2880, interleaved=True, biased=True, activation=4),
    "scales in bytes": dict(D=96, inner=96, scale_bytes=True),
}


@space("moe_experts")
def moe_experts(arch: Arch) -> Iterator[Launch]:
    """Both products of routed experts with plain weights, sorted or pair by pair."""
    from .expert_tiles import expert_tiles

    both = (True, False)
    for (name, form), dtype, rows, gated, sort in product(FORMS.items(), DTYPES, ROWS, both, both):
        tiles = expert_tiles(arch, rows, dtype, False, gated, aligned=name != "unaligned rows")
        case = f"{_case(name, dtype, gated, rows)}{', sorted' if sort else ''}"
        yield _launch(case, arch, tiles, _weight(gated, False, dtype, **form), gated, dtype, sort, **form)


@space("moe_packed")
def moe_packed(arch: Arch) -> Iterator[Launch]:
    """Products of sorted rows with MXFP4 weights, of one packed weight, and of a few token-expert pairs."""
    from .expert_pairs import pair_launch, sum_launch
    from .expert_tiles import expert_tiles, pair_tiles, sum_tiles
    from .experts import SINGLE, expert_launch
    from .mxfp4_linear import planes_arguments
    from .order_kernel import planes_kernel
    from .pair_kernel import pair_kernel, pair_sum_kernel
    from .unpack_kernel import unpack_kernel, unpack_launch

    for (name, form), dtype, gated in product(PACKED_FORMS.items(), (BF16, FP32), (True, False)):
        weight = _weight(gated, True, dtype, **form)
        K, N = weight["K"], weight["N"]
        for rows in PACKED_ROWS:
            tiles = expert_tiles(arch, rows, dtype, True, gated)
            yield _launch(_case(name, dtype, gated, rows), arch, tiles, weight, gated, dtype, True, **form)
            if not gated:
                x, out = meta(2048, K, dtype=dtype), meta(2048, N, dtype=dtype)
                arguments, _ = expert_launch(x, out, weight, tiles, source=SINGLE, blocks=160, rows=2048)
                case = f"{_case(name, dtype, gated, rows)}, alone"
                yield _of(case, tiles, arguments, dtype)
        few, ids, p = pair_tiles(arch, 1e9), meta(2, 8, dtype=torch.int64), meta(2, 8, dtype=FP32)
        activation = dict(activation=form.get("activation", 1), alpha=1.7, limit=7.0) if gated else {}
        arguments, _ = pair_launch(
            few, meta(2, K, dtype=dtype), meta(16, N, dtype=FP32), weight, ids, planes=True, pdl=arch.pdl, **activation
        )
        yield Launch(f"{_case(name, dtype, gated)}, pairs", pair_kernel, arguments, 4, 1, matrix=False)
        if not gated:
            arguments, _ = sum_launch(
                sum_tiles(), meta(16, K, dtype=FP32), meta(2, N, dtype=dtype), weight, ids, p,
                wide=dtype == FP32, pdl=arch.pdl,
            )  # fmt: skip
            yield Launch(f"{_case(name, dtype, gated)}, sum of pairs", pair_sum_kernel, arguments, 4, 1, matrix=False)
            packed, wide = meta(32, N, K // 2, dtype=torch.uint8), meta(32, N, K, dtype=dtype)
            arguments, _ = unpack_launch(packed, _scales(N, K, **form), wide, 0, arch.pdl)
            yield Launch(f"{_case(name, dtype, gated)}, unpacked", unpack_kernel, arguments, 4, 2, matrix=False)
            arguments = planes_arguments(meta(2048, K, dtype=dtype), meta(2048, K, dtype=dtype))
            yield Launch(
                f"{name}, {str(dtype).removeprefix('torch.')}, planes", planes_kernel, arguments, 4, 2, matrix=False
            )


def _case(name: str, dtype: torch.dtype, gated: bool, rows: int | None = None) -> str:
    which = "gate and up" if gated else "down"
    return f"{name}, {str(dtype).removeprefix('torch.')}, {which}" + (f", {rows} rows" if rows else "")


def _weight(
    gated: bool, packed: bool, dtype: torch.dtype, *, D: int = 2048, inner: int = 768, layout: str = "enk",
    interleaved: bool = False, biased: bool = False, activation: int = 1, scale_bytes: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of gate and up's weight, or of down's."""
    from .experts import weight_operands

    E, (N, K) = 32, (2 * inner, D) if gated else (D, inner)
    scale = _scales(N, K, scale_bytes) if packed else None
    w: Tensor = meta(E, N, K // 2, dtype=torch.uint8) if packed else meta(E, N, K, dtype=dtype)
    if layout == "ekn":
        w = meta(E, K, N, dtype=dtype).mT
    return weight_operands(w, scale, meta(E, N, dtype=dtype) if biased else None, gated, gated and interleaved)


def _scales(N: int, K: int, scale_bytes: bool = False, **_: Any) -> Tensor:
    return meta(32, N, K // 32 + scale_bytes, dtype=torch.uint8)[..., : K // 32]


def _launch(
    case: str, arch: Arch, tiles: Any, weight: dict[str, Any], gated: bool, dtype: torch.dtype, sort: bool, *,
    activation: int = 1, **form: Any,
) -> Launch:  # fmt: skip
    from .experts import PAIRS, TABLE, expert_launch

    where: dict[str, Any] = dict(source=PAIRS, ids=meta(256, 8, dtype=torch.int64))
    if sort:
        where = dict(source=TABLE, order=meta(2048, dtype=torch.int32), table=meta(160, 3, dtype=torch.int32))
    arguments, _ = expert_launch(
        meta(2048, weight["K"], dtype=dtype), meta(2048, weight["N"], dtype=dtype), weight, tiles, **where, blocks=160,
        rows=2048, top_k=8, gather=gated, scatter=not gated, activation=activation if gated else 0, alpha=1.7,
        limit=7.0 if activation == 4 else None, planes=gated and weight["scale"] is not None, pdl=arch.pdl,
    )  # fmt: skip
    return _of(case, tiles, arguments, dtype)


def _of(case: str, tiles: Any, arguments: dict[str, Any], dtype: torch.dtype) -> Launch:
    from .expert_kernel import expert_kernel

    return Launch(
        case, expert_kernel, arguments, tiles.num_warps, tiles.num_stages, tiles.max_registers, matrix=dtype != FP32
    )


@space("moe_order_and_route")
def moe_order_and_route(arch: Arch) -> Iterator[Launch]:
    """Sorting pairs by expert, adding up what they gave, and choosing experts."""
    from .expert_kernel import combine_kernel
    from .experts import combine_launch, order_launch, order_warps
    from .moe_route import route_launch
    from .order_kernel import order_kernel
    from .route_kernel import route_kernel

    ids, weights = meta(4096, 8, dtype=torch.int64), meta(4096, 8, dtype=FP32)
    for tokens, x in ((4096, None), (16, meta(16, 2048)), (4096, meta(4096, 2048))):
        arguments, _ = order_launch(ids[:tokens], 128, 64, x, arch.pdl)
        case = f"{tokens} tokens, 8 of 128{'' if x is None else ', with planes'}"
        yield Launch(case, order_kernel, arguments, order_warps(arguments["BLOCK"]), 2, matrix=False)
    combined = combine_launch(meta(32768, 2048), ids, weights, meta(4096, 2048), 128, True, arch.pdl)[0]
    yield Launch("4096 tokens, 8 of 128", combine_kernel, combined, 4, 2, matrix=False)
    grouped = dict(score="sigmoid", n_group=8, topk_group=4, renormalise=True, scaling=2.5)
    ways: tuple[tuple[int, bool, dict[str, Any]], ...] = (
        (128, False, dict(renormalise=True)), (64, False, {}), (256, True, grouped), (32, True, dict(score="sigmoid")),
    )  # fmt: skip
    for experts, corrected, given in ways:
        bias = meta(experts, dtype=FP32) if corrected else None
        arguments, warps = route_launch(meta(4096, experts, dtype=FP32), 8, bias, **given, pdl=arch.pdl)
        case = f"8 of {experts}, {given.get('score', 'softmax')}"
        yield Launch(case, route_kernel, arguments, warps, 2, matrix=False)
