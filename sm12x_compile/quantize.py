"""The option ``moe_weights``: experts in bf16 are quantised to MXFP4 once, at their first call.

Each block of 32 weights along the contracted dimension gets a power of two as its scale, and each weight the nearest
E2M1 number, ties to the even code (OCP Microscaling Formats v1.0, 2023, section 6.3). Of the two scales that may be
best, the standard's and its double (with which the largest weight is never clipped), the one with the smaller squared
error is taken. This loses accuracy; the report gives the error of each weight.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph_view import GraphView
from .hoist import is_static, preparation
from .ops.mxfp4 import dequantize_fp4
from .prepared import Event
from .report import Site

aten = torch.ops.aten
MOE = torch.ops.sm12x.moe.default
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbouring E2M1 numbers
QUANTISED = "quantised to mxfp4"  # a site's tag: it computes something else than the user's code, as was asked for
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 codes and scales of a weight.

    Args:
        weight: ``[..., N, K]``, K a multiple of 32, floating point; a block with a NaN or infinity becomes NaN.

    Returns:
        uint8 ``[..., N, K / 2]``, the even column in the low nibble, and E8M0 bytes ``[..., N, K / 32]``.

    Raises:
        ValueError: K is no multiple of 32.
    """
    if weight.shape[-1] % 32:
        raise ValueError(f"quantize_mxfp4: {weight.shape[-1]} columns are no multiple of the block of 32")
    blocks = weight.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1)
    _, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    tight = (exponent + (127 - 3)).clamp(0, 254)  # 2^(floor(log2(largest)) - 2)
    tight = torch.where(largest == 0, 0, tight)
    best, codes = tight, _codes(blocks, tight)
    loose = (tight + 1).clamp(max=254)
    other = _codes(blocks, loose)
    better = _squared_error(blocks, other, loose) < _squared_error(blocks, codes, tight)
    best = torch.where(better, loose, best)
    codes = torch.where(better.unsqueeze(-1), other, codes)
    best = torch.where(largest.isfinite(), best, 255)
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), best.to(torch.uint8)


def _codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """The nearest E2M1 code of each number, ties to the even one."""
    magnitude = torch.ldexp(blocks.abs(), (127 - scales).unsqueeze(-1))
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for k, middle in enumerate(_MIDDLES):
        # From code k to k + 1; at the middle itself only if k is odd.
        codes += (magnitude > middle) if k % 2 == 0 else (magnitude >= middle)
    return codes | (blocks.signbit().to(torch.uint8) << 3)


def _squared_error(blocks: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    flat = codes.flatten(-2).unflatten(-1, (-1, 2))
    packed = flat[..., 0] | (flat[..., 1] << 4)
    values = dequantize_fp4("moe", packed, scales.to(torch.uint8), "mxfp4")
    return (values.unflatten(-1, (-1, 32)) - blocks).square().sum(-1)


def _quantize_experts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what was lost: relative root mean square error, and the largest absolute one."""
    E, N, K = weight.shape
    packed = torch.empty((E, N, K // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((E, N, K // 32), dtype=torch.uint8, device=weight.device)
    lost = torch.zeros(3, dtype=torch.float64, device=weight.device)
    for e in range(E):  # expert by expert: the intermediates are several times a weight
        packed[e], scales[e] = quantize_mxfp4(weight[e])
        given = weight[e].float()
        error = dequantize_fp4("moe", packed[e], scales[e], "mxfp4") - given
        lost[0] += error.square().sum()
        lost[1] += given.square().sum()
        lost[2] = torch.maximum(lost[2], error.abs().max())
    return packed, scales, torch.stack([(lost[0] / lost[1].clamp(min=1e-300)).sqrt(), lost[2]])


def _fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    E, N, K = weight.shape
    packed = weight.new_empty((E, N, K // 2), dtype=torch.uint8)
    scales = weight.new_empty((E, N, K // 32), dtype=torch.uint8)
    return packed, scales, weight.new_empty(2, dtype=torch.float64)


def _describe(event: Event) -> dict[str, Any]:
    relative, largest = event.results[2].tolist()
    after = sum(t.nbytes for t in event.results[:2])
    return {
        "format": "mxfp4",
        "relative_error": relative,
        "largest_error": largest,
        "bytes_before": sum(t.nbytes for t in event.sources),
        "bytes_after": after,
        "dropped": event.recipe.drops,
        "again": event.again,
    }


QUANTIZE = preparation(
    "mxfp4", _quantize_experts, _fake, title="quantising experts to MXFP4", describe=_describe
)


def quantize_experts(gm: GraphModule, calls: Sequence[tuple[Site, Node]]) -> None:
    """Give calls of ``sm12x::moe`` on plain weights MXFP4 ones; the sites say which, or why not."""
    graph = GraphView(gm)
    for site, node in calls:
        if node.target is not MOE or node.kwargs.get("format", "bf16") != "bf16":
            continue
        reason = _quantize_call(graph, node)
        if reason is None:
            site.tags["weights"] = QUANTISED
        else:
            site.refused.append(("moe_weights=mxfp4", reason))


def _quantize_call(graph: GraphView, node: Node) -> str | None:
    """Rewrite one call, or say why it keeps its weights."""
    from .ops import OPS

    a = OPS["moe"].bind(node)
    matrices = [a[n] for n in ("w13", "w2", "w3") if a[n] is not None]
    if any(m.meta["val"].dtype not in _FLOATS for m in matrices):
        return "quantises weights in bf16, fp16 or fp32"
    columns = {m.meta["val"].shape[-1 if a["layout"] == "enk" else -2] for m in matrices}
    if any(not isinstance(k, int) or k % 32 for k in columns):
        return f"needs rows whose length is a multiple of 32, not {sorted(map(str, columns))}"
    if not all(map(_from_weights, matrices)):
        return "the experts' weights are no parameters or buffers, so they would be quantised at each call"
    with graph.graph.inserting_before(node):
        rows = [m if a["layout"] == "enk" else graph.call(aten.transpose.int, m, 1, 2) for m in matrices]
        if a["w3"] is not None:
            rows = [graph.call(aten.cat.default, [rows[0], rows[2]], 1), rows[1]]
            if a["w13_bias"] is not None:
                a["w13_bias"] = graph.call(aten.cat.default, [a["w13_bias"], a["w3_bias"]], 1)
        for name, matrix in zip(("w13", "w2"), rows, strict=True):
            made = graph.call(QUANTIZE, matrix)
            a[name] = graph.call(operator.getitem, made, 0)
            a[name + "_scale"] = graph.call(operator.getitem, made, 1)
    a |= {"format": "mxfp4", "layout": "enk", "w3": None, "w3_bias": None, "stacked": False}
    positional = ("x", "topk_ids", "topk_weights", "w13", "w2")
    node.args = tuple(a.pop(n) for n in positional)
    defaults = OPS["moe"].signature.parameters
    node.kwargs = {n: v for n, v in a.items() if v is not defaults[n].default}
    return None


def _from_weights(node: Node) -> bool:
    """Whether a tensor is computed from parameters and buffers alone."""
    if node.op != "call_function":
        return is_static(node)
    return bool(node.all_input_nodes) and all(map(_from_weights, node.all_input_nodes))
