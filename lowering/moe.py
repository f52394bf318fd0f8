"""`sm12x::moe` and `sm12x::moe_route` → a kernel.

Experts, in order of merit; kernels of Triton register here as well, above what PyTorch has:

    triton.*        few tokens: one pass over the chosen experts' matrices; many: a grouped matmul of our own
    aten.unrolled   experts whose tensors are their own, where reading all is faster than stacking them
    aten.gathered   a few rows: their experts' matrices copied, bmm
    aten.grouped    bf16: sorted rows, PyTorch's grouped matmul
    cpu.sorted      on the CPU: one matmul a chosen expert
    aten.dense      every expert on every token; without a host synchronisation, if nothing else is

Which of them costs least is a matter of bytes and operations: see `_stacking_pays`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.ops import moe_route as route_op
from sm12x_compile.registry import YES, Call, No, Verdict, register_kernel

from .moe_cpu import sorted_experts
from .moe_forms import experts_of, gathered, grouped, unrolled

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_GATHERED_ROWS = 8  # on a GPU: three times the bytes of the experts' matrices, against a sort and two launches more
_GATHERED_BYTES = 1 << 28  # on a CPU: Inductor reads the matrices in place, the interpreted form copies them
_GATHERED_PASSES = 3.0  # on a CPU: how often a matrix may be read before a matmul an expert is faster (measured)
_UNROLLED_EXPERTS = 16  # a graph of twelve nodes an expert


def _plain(call: Call) -> str | None:
    if call.format != "bf16":
        return f"computes with plain weights, not {call.format}"
    tensors = (call.x, call.w13, call.w2, *(t for t in (call.w3,) if t is not None))
    if any(t.dtype not in _FLOATS for t in tensors):
        return "computes with plain floating-point operands"
    if len({t.dtype for t in tensors[1:]}) > 1:
        return "the matrices have different dtypes"
    return None


def _rows(call: Call) -> int:
    return call.hint(call.x.shape[0]) * call.hint(call.topk_ids.shape[1])


def _matrix_bytes(call: Call) -> int:
    """Bytes of one expert's matrices."""
    matrices = (call.w13, call.w2, *(t for t in (call.w3,) if t is not None))
    return sum(call.hint(t.shape[1]) * call.hint(t.shape[2]) * t.element_size() for t in matrices)


def _is_symbolic(call: Call) -> bool:
    return isinstance(call.x.shape[0], torch.SymInt)


def _stacking_pays(call: Call, arch: Arch) -> bool:
    """Whether to stack the experts' own tensors and compute only the rows that were routed.

    In bytes through memory, operations counted as the bytes that pass in their time: stacking reads and writes all
    experts and then reads those that were hit; unrolled, all are read once, and every token goes through each.
    """
    experts, each = experts_of(call)[0], _matrix_bytes(call)
    per_byte = arch.bf16_flops / arch.bandwidth if arch.bandwidth else 10.0
    operations = 2 * each / call.w2.element_size() / per_byte
    tokens, rows = call.hint(call.x.shape[0]), _rows(call)
    dense = experts * max(each, tokens * operations)
    hit = min(experts, rows)
    return 2 * experts * each + max(hit * each, rows * operations) < dense


def _accepts_unrolled(call: Call, arch: Arch) -> Verdict:
    reason = _plain(call)
    if reason:
        return No(reason)
    if not call.stacked:
        return No("the experts' weights lie in one tensor")
    if call.weight_on == "input":
        return No("the routing weight stands before the experts")
    if _stacking_pays(call, arch):
        return No("so many tokens are cheaper with the experts' weights stacked")
    return YES


def _accepts_gathered(call: Call, arch: Arch) -> Verdict:
    reason = _plain(call)
    if reason:
        return No(reason)
    if _is_symbolic(call):
        return No("the number of tokens is symbolic, and a copy of the matrices for each may not fit")
    rows = _rows(call)
    if arch.is_cuda and rows > _GATHERED_ROWS:
        return No(f"would copy the matrices of {rows} rows")
    if arch.is_cuda:
        return YES
    experts, top_k = experts_of(call)[0], call.hint(call.topk_ids.shape[1])
    hit = experts * (1.0 - (1.0 - min(1.0, top_k / experts)) ** call.hint(call.x.shape[0]))
    if rows > _GATHERED_PASSES * hit:
        return No(f"would read each expert's matrices {rows / hit:.1f} times")
    if rows * _matrix_bytes(call) > _GATHERED_BYTES:
        return No(f"would copy {rows * _matrix_bytes(call) >> 20} MiB of matrices")
    return YES


def _accepts_grouped(call: Call, arch: Arch) -> Verdict:
    reason = _plain(call)
    if reason:
        return No(reason)
    tensors = [call.x, call.w13, call.w2, *(t for t in (call.w3,) if t is not None)]
    if any(t.dtype != torch.bfloat16 for t in tensors):
        return No("PyTorch's grouped matmul compiles for bf16 alone")
    if any(call.hint(n) % 8 for t in tensors for n in t.shape[-2 if t is not call.x else -1 :]):
        return No("PyTorch's grouped matmul wants sizes that are multiples of 8")
    for t in tensors[1:]:
        rows, columns = (call.hint(s) for s in t.stride()[-2:])
        if not ((columns == 1 and rows % 8 == 0) or (rows == 1 and columns % 8 == 0)):
            return No("PyTorch's grouped matmul wants dense matrices")
    return YES


def _accepts_sorted(call: Call, arch: Arch) -> Verdict:
    reason = None if call.format == "mxfp4" and call.x.dtype in _FLOATS else _plain(call)
    if reason is None and arch.is_cuda:
        reason = "reads how many rows an expert gets, which would wait for the GPU"
    return No(reason) if reason else YES


def _accepts_dense(call: Call, arch: Arch) -> Verdict:
    reason = _plain(call)
    if reason is None and call.weight_on == "input":
        reason = "the routing weight stands before the experts"
    if reason is None and experts_of(call)[0] > _UNROLLED_EXPERTS:
        reason = f"would compute {experts_of(call)[0]} experts on every token"
    return No(reason) if reason else YES


register_kernel("moe", "aten.unrolled", accepts=_accepts_unrolled, inline=True, merit=50)(unrolled)
# The kernels of `moe_kernels.py` stand here: 25 and 30.
register_kernel("moe", "aten.gathered", accepts=_accepts_gathered, inline=True, merit=20)(gathered)
register_kernel("moe", "aten.grouped", accepts=_accepts_grouped, inline=True, merit=15)(grouped)
register_kernel("moe", "cpu.sorted", accepts=_accepts_sorted, merit=10)(sorted_experts)
register_kernel("moe", "aten.dense", accepts=_accepts_dense, inline=True, merit=5)(unrolled)


@register_kernel("moe_route", "aten", accepts=lambda call, arch: YES, inline=True, merit=5)
def aten_route(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The reference's formula, traced into the graph so that Inductor can fuse it."""
    found: tuple[Tensor, Tensor] = route_op.reference(*args, **kwargs)
    return found
