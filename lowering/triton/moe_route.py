"""`sm12x::moe_route` in Triton: the choice of the experts in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import DTYPES, device_guard, launches_early, triton_missing
from .experts import FAMILIES, MAX_TOP_K

MAX_EXPERTS = 4096
SCORE_CODES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


def route_refusal(call: Call, arch: Arch) -> str | None:
    """Why `moe_route` cannot take this call on this card, in one sentence, or None."""
    missing = triton_missing()
    if missing:
        return missing
    if arch.family not in FAMILIES:
        return f"needs a CUDA GPU of compute capability 8.0 or later, not {arch.name}"
    for what, dtype in (("logits", call.logits.dtype), ("weights", call.out_dtype or torch.float32)):
        if dtype not in DTYPES:
            return f"takes and gives fp16, bf16 or fp32; {what} are {str(dtype).removeprefix('torch.')}"
    if call.correction_bias is not None and call.correction_bias.dtype not in DTYPES:
        return f"adds a bias in fp16, bf16 or fp32, not {str(call.correction_bias.dtype).removeprefix('torch.')}"
    experts = call.logits.shape[1]
    if not isinstance(experts, int) or experts > MAX_EXPERTS:
        return f"takes up to {MAX_EXPERTS} experts, a number known while compiling, not {experts}"
    if call.top_k > MAX_TOP_K:
        return f"takes up to {MAX_TOP_K} experts a token, not {call.top_k}"
    return None


def route_launch(
    logits: Tensor, top_k: int, correction_bias: Tensor | None = None, score: str = "softmax", n_group: int = 1,
    topk_group: int = 1, group_score: str = "top2_sum", renormalise: bool = False, scaling: float = 1.0,
    eps: float = 1e-20, out_dtype: torch.dtype | None = None, pdl: bool = False,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """The kernel's arguments by name (with the storage of ids and weights), and its warps; the grid is (T,)."""
    T, E = logits.shape
    if not 1 <= topk_group <= n_group or E % n_group or not 0 < top_k <= E // n_group * topk_group:
        raise ValueError(f"sm12x::moe_route: cannot take {top_k} of {E} experts from {topk_group} of {n_group} groups")
    size = E // n_group
    a: dict[str, Any] = dict(logits=logits, bias=correction_bias, scaling=float(scaling), eps=float(eps))
    a["ids"] = logits.new_empty((T, top_k), dtype=torch.int64)
    a["weights"] = logits.new_empty((T, top_k), dtype=out_dtype or torch.float32)
    a["stride_t"], a["stride_e"] = logits.stride()
    a["stride_b"] = None if correction_bias is None else correction_bias.stride(0)
    a |= dict(TOPK=top_k, GROUPS=n_group, SIZE=size, TOPK_GROUP=topk_group, TOP2=group_score == "top2_sum")
    a |= dict(SCORE=SCORE_CODES[score], RENORMALISE=bool(renormalise), PDL=pdl)
    a |= {f"{name}_PAD": 1 << (a[name] - 1).bit_length() for name in ("TOPK", "GROUPS", "SIZE")}
    return a, 1 if a["GROUPS_PAD"] * a["SIZE_PAD"] <= 512 else 4


def moe_route(
    logits: Tensor, top_k: int, correction_bias: Tensor | None = None, score: str = "softmax", n_group: int = 1,
    topk_group: int = 1, group_score: str = "top2_sum", renormalise: bool = False, scaling: float = 1.0,
    eps: float = 1e-20, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sm12x::moe_route`, see `sm12x_compile.ops.moe` for the arguments.

    Returns:
        topk_ids int64 and topk_weights, both ``[T, top_k]``; the best choice first.

    Raises:
        ValueError: there are not so many experts to choose from.
    """
    from .route_kernel import route_kernel

    arguments, warps = route_launch(
        logits, top_k, correction_bias, score, n_group, topk_group, group_score, renormalise, scaling, eps, out_dtype,
        launches_early(logits),
    )  # fmt: skip
    if logits.shape[0]:
        with device_guard(logits):
            route_kernel[(logits.shape[0],)](**arguments, num_warps=warps)
    return arguments["ids"], arguments["weights"]
