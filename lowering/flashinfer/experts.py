"""`sm12x::moe` with MXFP4 weights by FlashInfer's b12x kernels for SM12x: bf16 rows times four-bit weights.

The weights are packed anew for the tensor cores. That is a preparation (`sm12x_compile/hoist.py`): correct wherever it
stands, and done once where the weights are parameters. FlashInfer's own entry point, `b12x_fused_moe`, would keep what
it packed by address, and so go on with old weights after these were changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...hoist import preparation
from ...registry import Call
from ..triton.arguments import dtype_name
from . import installed

FAMILIES = ("sm12x",)  # b12x_moe.py: supported_compute_capability([120, 121])
CUDA = 13  # b12x_moe.py: "b12x fused MoE requires CUDA 13 or later"
TILE_K, TILE_N = 16, 64  # moe_w4a16_prepare.py: what _repack_weight packs
WIDTHS = 128  # the kernel has tiles for multiples of this, and tails for no more than another weight layout
_PACKAGE = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"


def b12x_refusal(call: Call, arch: Arch) -> str | None:
    """Why `b12x_moe` cannot take this call on this card, in one sentence, or None."""
    if call.format != "mxfp4":
        return f"b12x reads MXFP4 weights, not {call.format}"
    unlike = _formula(call)
    missing = unlike or installed.refusal(arch, FAMILIES, needs_nvcc=False, needs_cute=True)
    if missing:
        return missing
    cuda = torch.version.cuda
    if call.x.is_cuda and (cuda is None or int(cuda.split(".")[0]) < CUDA):
        return f"b12x needs a PyTorch built for CUDA {CUDA} or later, not {cuda}"
    return _operands(call)


def _formula(call: Call) -> str | None:
    if call.activation != "silu" or not call.gated:
        gate = "" if call.gated else " without a gate"
        return f"b12x multiplies bf16 rows for silu alone, not for {call.activation}{gate}"
    if call.limit is not None:
        return "b12x has no limit on gate and up"
    if call.w13_bias is not None or call.w2_bias is not None:
        return "b12x has no biases of experts"
    if call.weight_on != "output":
        return "b12x weights what experts give, not what they get"
    if call.w13_global_scale is not None or call.w2_global_scale is not None:
        return "MXFP4 weights have no global scale"
    return None


def _operands(call: Call) -> str | None:
    x, w13, w2 = call.x, call.w13, call.w2
    if x.dtype != torch.bfloat16 or call.out_dtype not in (None, torch.bfloat16):
        return f"b12x reads and writes bf16, not {dtype_name(x.dtype)} and {dtype_name(call.out_dtype or x.dtype)}"
    if not all(isinstance(s, int) for w in (w13, w2) for s in w.shape) or not isinstance(x.shape[1], int):
        return "the sizes of the weights must be known while compiling"
    inner = 2 * w2.shape[2]
    if x.shape[1] % WIDTHS or inner % WIDTHS:
        return f"b12x has tiles for widths that are multiples of {WIDTHS}, not for {x.shape[1]} and {inner}"
    if call.topk_ids.dtype not in (torch.int32, torch.int64):
        return f"needs expert numbers in int32 or int64, not {dtype_name(call.topk_ids.dtype)}"
    return None


def b12x_moe(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor, w13_bias: None = None,
    w2_bias: None = None, w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, format: str = "mxfp4",
    layout: str = "enk", interleaved: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """`sm12x::moe`; traced into the graph, but for the packing and the kernel itself."""
    assert w13_scale is not None and w2_scale is not None
    weights = [t.view(torch.uint8) for t in (w13, w13_scale, w2, w2_scale)]
    packed = PACK(*weights, interleaved)
    experts = w13.shape[0]
    # Expert numbers beyond the last contribute nothing, as negative ones do.
    ids = torch.where(topk_ids < experts, topk_ids, -1).to(torch.int32)
    out: Tensor = torch.ops.sm12x_flashinfer.b12x_moe(x, ids, topk_weights.float(), packed, 2 * w2.shape[2])
    return out


@installed.explained("flashinfer.b12x_moe")
def _pack(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, interleaved: bool) -> list[Tensor]:
    """w13, its scales and global scales, then those of w2, as the kernel reads them."""
    if interleaved:
        w13, w13_scale = (halves(t) for t in (w13, w13_scale))
    one = torch.ones(w13.shape[0], dtype=torch.float32, device=w13.device)
    made = installed.entry(f"{_PACKAGE}.moe_w4a16_prepare:prepare_w4a16_fp4_e8m0_k32_weights")(
        w13_fp4=w13.contiguous(),
        w13_e8m0_scale=w13_scale.contiguous(),
        w13_global_scale=one,
        w2_fp4=w2.contiguous(),
        w2_e8m0_scale=w2_scale.contiguous(),
        w2_global_scale=one.clone(),
        activation="silu",
        params_dtype=torch.bfloat16,
        w13_layout="w31",  # gate first
        reuse_input_storage=False,
    )
    scales = made.w13_scale, made.w2_scale
    w13_scale, w2_scale = (t.view(torch.uint8) for t in scales)
    return [made.w13, w13_scale, made.w13_global_scale, made.w2, w2_scale, made.w2_global_scale]


def halves(t: Tensor) -> Tensor:
    """Rows of gate and up in turn, ``[E, 2 I, ..]``, as all of gate and then all of up."""
    return t.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _pack_fake(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, interleaved: bool) -> list[Tensor]:
    def packed(w: Tensor) -> Tensor:
        experts, rows, columns = w.shape
        return w.new_empty((experts, 2 * columns // TILE_K, rows // TILE_N * 128), dtype=torch.int32)

    def scales(s: Tensor) -> Tensor:
        return s.new_empty((s.shape[0], s.shape[2], s.shape[1]))

    one = w13.new_empty(w13.shape[0], dtype=torch.float32)
    return [packed(w13), scales(w13_scale), one, packed(w2), scales(w2_scale), one.clone()]


PACK = preparation("flashinfer_b12x", _pack, _pack_fake, title="packing MXFP4 experts for FlashInfer")


@torch.library.custom_op("sm12x_flashinfer::b12x_moe", mutates_args=())
@installed.explained("flashinfer.b12x_moe")
def _b12x(x: Tensor, ids: Tensor, weights: Tensor, packed: list[Tensor], inner: int) -> Tensor:
    """The kernel: x ``[T, D]``, int32 ids and fp32 weights ``[T, K]``, what `PACK` gives, the experts' width.

    Up to 4 tokens it adds the experts of a token with atomics: equal inputs need not give equal bits.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not ids.numel():
        return out.zero_()
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = packed
    experts, (tokens, top_k) = w13.shape[0], ids.shape
    e8m0 = torch.float8_e8m0fnu
    held = installed.entry(f"{_PACKAGE}.moe_w4a16_prepare:W4A16PackedWeights")(
        w13=w13,
        w13_scale=w13_scale.view(e8m0),
        w13_global_scale=w13_global,
        w2=w2,
        w2_scale=w2_scale.view(e8m0),
        w2_global_scale=w2_global,
        workspace=installed.entry(f"{_PACKAGE}.moe_w4a16_prepare:_make_workspace")(x.device, max_blocks_per_sm=4),
        hidden_size=x.shape[1],
        intermediate_size=inner,
        num_experts=experts,
        is_gated=True,
        params_dtype=torch.bfloat16,
        source_format="fp4_e8m0_k32",
        w13_layout="w31",
        scale_format="e8m0_k32",
    )
    room = installed.entry(f"{_PACKAGE}.moe_dispatch:allocate_sm120_moe_workspace")(
        state_E=experts,
        weight_E=experts,
        k=x.shape[1],
        n=inner,
        num_topk=top_k,
        device=x.device,
        routed_rows=tokens * top_k,
        quant_mode="w4a16",
        activation="silu",
    )
    installed.entry(f"{_PACKAGE}.moe_w4a16_kernel:run_w4a16_moe")(
        a_input=x.contiguous(),
        prepared=held,
        topk_weights=weights.contiguous(),
        topk_ids=ids.contiguous(),
        activation="silu",
        intermediate_cache13=room.intermediate_cache13,
        intermediate_cache2=room.intermediate_cache2,
        output=out,
        fc1_c_tmp=room.fc1_c_tmp,
        fc2_c_tmp=room.fc2_c_tmp,
        packed_route_indices=room.packed_route_indices,
        block_expert_ids=room.block_expert_ids,
        packed_route_count=room.packed_route_count,
        expert_offsets=room.expert_offsets,
    )
    return out


@_b12x.register_fake
def _b12x_fake(x: Tensor, ids: Tensor, weights: Tensor, packed: list[Tensor], inner: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
