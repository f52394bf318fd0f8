"""`sm12x::moe` in Triton: routed experts with plain (fp16, bf16, fp32) or MXFP4 weights.

    few tokens    every token-expert pair reads its expert by itself: gate and up with the activation, down, sum
                  (MXFP4: `expert_pairs`, without tensor cores)
    else          the pairs are sorted by expert first, so that an expert is read once for all its tokens
                  (MXFP4 and very many: some experts at a time are written out in bf16 before, in bounded memory)

Grids depend on shapes alone, nothing waits for the host and nothing is added atomically: a CUDA graph can be replayed
under any routing, and equal inputs give equal bits. What an expert gives to a token is rounded to x's dtype once
before the sum over the token's experts, which is in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import DTYPES, card_of, device_guard, dtype_name, launches_early, triton_missing
from .expert_pairs import run_pairs
from .expert_tiles import ExpertTiles, PairPlan, Plan, expert_plan, reads_singly

FAMILIES = ("sm8x", "sm9x", "sm10x", "sm12x")
ACTIVATION_CODES = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "swiglu_oai": 4, "relu2": 5, "relu": 6}
SINGLE, PAIRS, TABLE = 0, 1, 2
IDS = (torch.int16, torch.int32, torch.int64)
ORDER_BLOCK, COMBINE_BLOCK = 4096, 512
MAX_TOP_K = 64


def moe_refusal(call: Call, arch: Arch) -> str | None:
    """Why our Triton kernels cannot take a call of `sm12x::moe`, in one sentence, or None."""
    x, w13, w2 = call.x, call.w13, call.w2
    if call.format not in ("bf16", "mxfp4"):
        return f"reads plain or MXFP4 weights, not {call.format}"
    refusal = weight_refusal(arch, x, [w13, w2], [call.w13_scale, call.w2_scale], call.out_dtype)
    if refusal:
        return refusal
    if call.topk_ids.dtype not in IDS:
        return f"needs expert numbers in int16, int32 or int64, not {dtype_name(call.topk_ids.dtype)}"
    for what, t in (("topk_weights", call.topk_weights), ("w13_bias", call.w13_bias), ("w2_bias", call.w2_bias)):
        if t is not None and t.dtype not in DTYPES:
            return f"needs {what} in fp16, bf16 or fp32, not {dtype_name(t.dtype)}"
    if call.format == "mxfp4":
        refusal = packed_refusal([w13, w2], [call.w13_scale, call.w2_scale])
        if refusal:
            return refusal
    if call.w3 is not None:
        refusal = apart_refusal((w13, call.w3), (call.w13_bias, call.w3_bias))
        if refusal:
            return refusal
    top_k = call.topk_ids.shape[1]
    if not isinstance(top_k, int) or top_k > MAX_TOP_K:
        return f"takes up to {MAX_TOP_K} experts a token, a number known while compiling, not {top_k}"
    return None


def moe_decode_refusal(call: Call, arch: Arch) -> str | None:
    """Why `moe_decode` should not take this call, in one sentence, or None."""
    refusal = moe_refusal(call, arch)
    if refusal:
        return refusal
    tokens, size = call.hint(call.x.shape[0]), expert_bytes(call.w13, call.w2, call.w3)
    top_k, experts = call.topk_ids.shape[1], call.w13.shape[0]
    if not reads_singly(arch, tokens, top_k, experts, size, call.format == "mxfp4"):
        return f"{tokens} tokens share experts, which it would read once for each of them"
    return None


def expert_bytes(*weights: Tensor | None) -> float:
    """Bytes of one expert's weights, without scales and biases."""
    return sum(w.shape[1] * w.shape[2] * w.element_size() for w in weights if w is not None)


def weight_refusal(
    arch: Arch, x: Tensor, weights: list[Tensor], scales: list[Tensor | None], out_dtype: torch.dtype | None
) -> str | None:
    """Why the expert kernel cannot multiply x with these weights, in one sentence, or None."""
    missing = triton_missing()
    if missing:
        return missing
    if arch.family not in FAMILIES:
        return f"needs a CUDA GPU of compute capability 8.0 or later, not {arch.name}"
    if x.dtype not in DTYPES:
        return f"computes in fp16, bf16 or fp32, not {dtype_name(x.dtype)}"
    if out_dtype is not None and out_dtype not in DTYPES:
        return f"writes fp16, bf16 or fp32, not {dtype_name(out_dtype)}"
    if not isinstance(x.shape[-1], int) or not all(isinstance(s, int) for w in weights for s in w.shape):
        return "the sizes of the weights must be known while compiling"
    if scales[0] is not None:
        if x.dtype == torch.float16:
            return "multiplies MXFP4 weights in bf16 or fp32, since fp16 cannot hold their range"
        return None
    if any(w.dtype != x.dtype for w in weights):
        names = ", ".join(dtype_name(w.dtype) for w in weights)
        return f"needs x and plain weights of one dtype, got {dtype_name(x.dtype)} and {names}"
    return None


def packed_refusal(weights: list[Tensor], scales: list[Tensor | None]) -> str | None:
    """Why packed weights cannot be read as they lie in memory, in one sentence, or None."""
    for w, scale in zip(weights, scales, strict=True):
        assert scale is not None
        if w.element_size() != 1 or scale.element_size() != 1:
            return f"needs packed weights and scales in bytes, got {dtype_name(w.dtype)} and {dtype_name(scale.dtype)}"
        if scale.stride(-1) != 1 and scale.shape[-1] > 1:
            return "needs the scales of a row side by side in memory"
        if w.stride(-1) != 1 or any(s % 2 for s in w.stride()[:-1]) or w.storage_offset() % 2:
            return "needs the packed weights of a row side by side in memory, in words of two bytes"
    return None


def apart_refusal(gate_up: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None]) -> str | None:
    """Why gate and up cannot be read from two tensors, in one sentence, or None."""
    (w13, w3), (bias, up_bias) = gate_up, biases
    if w3.dtype != w13.dtype or w3.shape != w13.shape or w3.stride() != w13.stride():
        return "gate and up lie differently in memory"
    if (bias is None) != (up_bias is None):
        return "only one of gate and up has a bias"
    if bias is not None and up_bias is not None and (bias.stride(), bias.dtype) != (up_bias.stride(), up_bias.dtype):
        return "the biases of gate and up lie differently in memory"
    return None


def scale_words(scale: Tensor) -> Tensor:
    """E8M0 scales as words of four, flat, where that can be; else their bytes."""
    scale = scale.view(torch.uint8)
    if not scale.is_contiguous() or scale.numel() % 4 or scale.storage_offset() % 4:
        return scale
    return scale.view(-1).view(torch.int32)


def weight_operands(
    w: Tensor, scale: Tensor | None, bias: Tensor | None, split: bool = False, interleaved: bool = False,
    apart: Tensor | None = None, apart_bias: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the expert kernel for a weight ``[E, N, K]`` of any strides (packed: ``[E, N, K / 2]`` bytes).

    split: the rows are those of a gate and of up, halves or alternating; N is then the number of each.
    apart: the weight of up where it is a tensor of its own, which lies as `w` does: the kernel wants its distance.
    Packed weights are read in words of two bytes, which their strides count; strides of scales count bytes.
    """
    a: dict[str, Any] = {"scale": None, "stride_se": None, "stride_sn": None, "stride_sup": None}
    a |= {"bias": bias, "stride_be": None, "stride_bn": None, "stride_bup": None}
    rows = w.shape[1] // 2 if split and apart is None else w.shape[1]
    step, up = (2, 1) if interleaved else (1, rows)
    if scale is not None:
        w = w.view(torch.uint8).view(torch.int16)
        a["scale"], (a["stride_se"], row, _) = scale_words(scale), scale.stride()
        a["stride_sn"], a["stride_sup"] = step * row, up * row
    if bias is not None:
        a["stride_be"], row = bias.stride()
        a["stride_bn"], a["stride_bup"] = step * row, up * row
    a["w"], (a["stride_we"], row, a["stride_wk"]) = w, w.stride()
    a["stride_wn"], a["stride_wup"] = step * row, up * row
    if apart is not None:
        a["stride_wup"] = (apart.data_ptr() - w.data_ptr()) // w.element_size()
    if apart_bias is not None and bias is not None:
        a["stride_bup"] = (apart_bias.data_ptr() - bias.data_ptr()) // bias.element_size()
    a["N"], a["K"], a["E"] = rows, w.shape[2] * (1 if scale is None else 4), w.shape[0]
    a["GATED"] = split
    a["JOINED"] = split and interleaved and scale is None and row == 1
    return a


def expert_launch(
    x: Tensor, out: Tensor, weight: dict[str, Any], tiles: ExpertTiles, *, source: int, blocks: int, rows: int,
    ids: Tensor | None = None, order: Tensor | None = None, table: Tensor | None = None,
    row_weights: Tensor | None = None, top_k: int = 1, gather: bool = False, scatter: bool = False,
    activation: int = 0, alpha: float = 0.0, limit: float | None = None, planes: bool = False,
    first_expert: int = 0, pdl: bool = False,
) -> tuple[dict[str, Any], tuple[int]]:  # fmt: skip
    """The expert kernel's arguments by name, and its grid. blocks: tiles of rows that the grid has room for.

    planes: write in planes; packed weights take x in planes.
    """
    tiles_n = -(-weight["N"] // tiles.block_n)
    a = dict(weight, x=x, out=out, ids=ids, order=order, table=table, row_weights=row_weights, M=rows)
    a["stride_xm"], a["stride_xk"] = x.stride()
    a["stride_om"] = out.stride(0)
    a["stride_it"], a["stride_ij"] = (None, None) if ids is None else ids.stride()
    a["stride_rt"], a["stride_rj"] = (None, None) if row_weights is None else row_weights.stride()
    a |= dict(tiles_n=tiles_n, alpha=float(alpha), limit=None if limit is None else float(limit))
    a |= dict(SOURCE=source, TOPK=top_k, GATHER=gather, SCATTER=scatter, ACTIVATION=activation)
    a |= dict(SWAP=tiles.swap and not weight["JOINED"], IEEE=x.dtype == torch.float32, STAGES=tiles.num_stages)
    a |= dict(TO_PLANES=planes, PDL=pdl, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k)
    a |= dict(EVEN_N=weight["N"] % tiles.block_n == 0, EVEN_K=weight["K"] % tiles.block_k == 0)
    a |= dict(Q=weight["K"] // 4, first_expert=first_expert, TOGETHER=tiles.together)
    words = weight["scale"] is not None and weight["scale"].dtype == torch.int32 and x.dtype != torch.float32
    aligned = all(s is None or s % 4 == 0 for s in (a["stride_se"], a["stride_sn"], a["stride_sup"]))
    a["WHOLE"] = words and tiles.whole_scales and (aligned or tiles.block_k == 128)
    a["SPLIT"] = a["WHOLE"] and not aligned
    return a, (blocks * tiles_n,)


def order_launch(
    ids: Tensor, experts: int, block_m: int, x: Tensor | None = None, pdl: bool = False
) -> tuple[dict[str, Any], tuple[int]]:
    """The ordering kernel's arguments by name, with the storage of its results, and its grid.

    x: ``[T, D]``, also to be written in planes.
    """
    pairs = ids.numel()
    a: dict[str, Any] = dict(ids=ids, pairs=pairs, E=experts, TOPK=ids.shape[1], x=x, BLOCK_M=block_m, PDL=pdl)
    a["order"] = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    a["table"] = torch.empty((pairs // block_m + experts, 3), dtype=torch.int32, device=ids.device)
    a["x_planes"] = None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    a["stride_it"], a["stride_ij"] = ids.stride()
    a["stride_xm"], a["stride_xk"] = (None, None) if x is None else x.stride()
    a |= dict(Q=None if x is None else x.shape[1] // 4)
    a["BLOCK"] = min(max(256, 1 << (pairs - 1).bit_length()), ORDER_BLOCK)
    return a, (experts + (0 if x is None else x.shape[0]),)


def order_warps(block: int) -> int:
    """Warps of the ordering kernel: 8 ids a thread at most."""
    return max(4, block // 256)


def combine_launch(
    y: Tensor, ids: Tensor, weights: Tensor, out: Tensor, experts: int, weighted: bool, pdl: bool = False
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The combining kernel's arguments by name, and its grid."""
    (T, D), top_k = out.shape, ids.shape[1]
    a: dict[str, Any] = dict(y=y, ids=ids, weights=weights, out=out, T=T, D=D, E=experts, TOPK=top_k)
    a["stride_it"], a["stride_ij"] = ids.stride()
    a["stride_rt"], a["stride_rj"] = weights.stride()
    return a | dict(WEIGHTED=weighted, BLOCK=COMBINE_BLOCK, PDL=pdl), (T, -(-D // COMBINE_BLOCK))


def run_experts(
    plan: Plan | PairPlan, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor,
    w13_bias: Tensor | None = None, w2_bias: Tensor | None = None, w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None, format: str = "bf16", layout: str = "enk", interleaved: bool = False,
    activation: str = "silu", gated: bool = True, alpha: float = 1.702, limit: float | None = None,
    weight_on: str = "output", w13_global_scale: Tensor | None = None, w2_global_scale: Tensor | None = None,
    fp8_block: int = 128, out_dtype: torch.dtype | None = None, w3: Tensor | None = None,
    w3_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::moe` with the plan given; see `sm12x_compile.ops.moe` for the other arguments."""
    from .expert_kernel import combine_kernel, expert_kernel
    from .order_kernel import order_kernel

    (T, D), (_, top_k) = x.shape, topk_ids.shape
    out = x.new_empty((T, D), dtype=out_dtype or x.dtype)
    if layout == "ekn":
        w13, w2, w3 = w13.mT, w2.mT, None if w3 is None else w3.mT
    first = weight_operands(w13, w13_scale, w13_bias, gated, interleaved, w3, w3_bias)
    second = weight_operands(w2, w2_scale, w2_bias)
    experts, pairs, packed, pdl = first["E"], T * top_k, w13_scale is not None, launches_early(x)
    if not pairs or not D:
        return out.zero_()
    between: dict[str, Any] = dict(activation=ACTIVATION_CODES[activation], alpha=alpha, limit=limit)
    between["row_weights"] = topk_weights if weight_on == "input" else None
    if isinstance(plan, PairPlan):
        weights = topk_weights if weight_on == "output" else None
        return run_pairs(plan.gate_up, plan.down, x, topk_ids, weights, first, second, out, between, pdl)
    assert plan.sort or not packed, "MXFP4 experts are read pair by pair under a PairPlan"
    in_kernel = packed and not plan.unpacked
    h = x.new_empty((pairs, first["N"]))
    y = x.new_empty((pairs, D))
    tiling: dict[str, Any] = dict(source=PAIRS, blocks=pairs, ids=topk_ids)
    with device_guard(x):
        if plan.sort:
            sorting, grid = order_launch(topk_ids, experts, plan.gate_up.block_m, x if in_kernel else None, pdl)
            order_kernel[grid](**sorting, num_warps=order_warps(sorting["BLOCK"]), launch_pdl=pdl)
            tiling = dict(source=TABLE, blocks=len(sorting["table"]), order=sorting["order"], table=sorting["table"])
            x = sorting["x_planes"] if in_kernel else x
        tiling |= dict(rows=pairs, top_k=top_k, pdl=pdl)
        into_h, into_y = dict(gather=True, planes=in_kernel, **between), dict(scatter=True)
        if packed and plan.unpacked:
            assert w13_scale is not None and w2_scale is not None
            for e in range(0, experts, plan.unpacked):
                some = min(plan.unpacked, experts - e)
                wide = _unpacked(w13, w13_scale, x, e, some, pdl)
                first = weight_operands(wide, None, w13_bias, gated, interleaved)
                _start(expert_kernel, plan.gate_up, x, h, first, **tiling, **into_h, first_expert=e)
                wide = _unpacked(w2, w2_scale, x, e, some, pdl)
                second = weight_operands(wide, None, w2_bias)
                _start(expert_kernel, plan.down, h, y, second, **tiling, **into_y, first_expert=e)
        else:
            _start(expert_kernel, plan.gate_up, x, h, first, **tiling, **into_h)
            _start(expert_kernel, plan.down, h, y, second, **tiling, **into_y)
        arguments, grid_2 = combine_launch(y, topk_ids, topk_weights, out, experts, weight_on == "output", pdl)
        combine_kernel[grid_2](**arguments, num_warps=4, launch_pdl=pdl)
    return out


def _unpacked(w: Tensor, scale: Tensor, x: Tensor, first: int, experts: int, pdl: bool) -> Tensor:
    """Some experts of a packed weight ``[E, N, K / 2]``, as ``[experts, N, K]`` in x's dtype."""
    from .unpack_kernel import unpack_kernel, unpack_launch

    out = x.new_empty((experts, w.shape[1], 2 * w.shape[2]))
    arguments, grid = unpack_launch(w, scale, out, first, pdl)
    unpack_kernel[grid](**arguments, num_warps=4, launch_pdl=pdl)
    return out


def _start(kernel: Any, tiles: ExpertTiles, x: Tensor, out: Tensor, weight: dict[str, Any], **rest: Any) -> None:
    arguments, grid = expert_launch(x, out, weight, tiles, **rest)
    limits = {} if tiles.max_registers is None else {"maxnreg": tiles.max_registers}
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, launch_pdl=arguments["PDL"])
    kernel[grid](**arguments, **options, **limits)


def moe_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor,
    w13_bias: Tensor | None = None, w2_bias: Tensor | None = None, w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None, format: str = "bf16", layout: str = "enk", interleaved: bool = False,
    activation: str = "silu", gated: bool = True, alpha: float = 1.702, limit: float | None = None,
    weight_on: str = "output", w13_global_scale: Tensor | None = None, w2_global_scale: Tensor | None = None,
    fp8_block: int = 128, out_dtype: torch.dtype | None = None, w3: Tensor | None = None,
    w3_bias: Tensor | None = None, stacked: bool = False,
) -> Tensor:  # fmt: skip
    """`sm12x::moe`, see `sm12x_compile.ops.moe` for the arguments; right for any number of tokens.

    Returns:
        ``[T, D]``.
    """
    aligned = not any(s % 16 for w in (w13, w2) for s in w.stride()[:-1])
    plan = expert_plan(
        card_of(x), x.shape[0], topk_ids.shape[1], w13.shape[0], x.dtype, format == "mxfp4",
        expert_bytes(w13, w2, w3), aligned=aligned,
    )  # fmt: skip
    return run_experts(
        plan, x, topk_ids, topk_weights, w13, w2, w13_bias, w2_bias, w13_scale, w2_scale, format, layout,
        interleaved, activation, gated, alpha, limit, weight_on, out_dtype=out_dtype, w3=w3, w3_bias=w3_bias,
    )  # fmt: skip
