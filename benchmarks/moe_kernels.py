"""Routed experts on one GPU, from router logits to the weighted sum: our kernels and torch's grouped product.

    python benchmarks/moe_kernels.py [--out benchmarks/results/moe_kernels-h200.json]

Every time is the median of CUDA graph replays over four rotated sets of weights, inputs and routings. Routing is
included everywhere: in ours one launch, in torch's softmax and topk. "grouped_mm" is what Hugging Face runs for plain
weights (sort, two `_grouped_mm`, un-sort); for MXFP4 it works on weights that were dequantised before, so it moves four
times the bytes. The floor is the bytes of the experts hit over the copy bandwidth of this run, `of copy` our share of
that bandwidth. "SM12x tiles" are those of an RTX 5090 on the GPU at hand; "as pairs" is without sorting.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _timing import copy_bandwidth, graph_time, matmul_rate
from torch import Tensor

from sm12x_compile.arch import Arch, by_name, of_device
from sm12x_compile.lowering.triton.expert_tiles import PairPlan, Plan, expert_plan
from sm12x_compile.lowering.triton.experts import expert_bytes, run_experts
from sm12x_compile.lowering.triton.moe_route import moe_route
from sm12x_compile.ops.mxfp4 import dequantize_fp4


@dataclass(frozen=True)
class Shape:
    name: str
    experts: int
    top_k: int
    width: int
    inner: int
    swiglu_oai: bool = False

    def attributes(self) -> dict[str, Any]:
        return dict(activation="swiglu_oai", limit=7.0, interleaved=True) if self.swiglu_oai else {}


SHAPES = [Shape("128 experts, top-8", 128, 8, 2048, 768), Shape("32 experts, top-4", 32, 4, 2880, 2880, True)]
TOKENS = (1, 2, 4, 16, 256, 4096)
SETS = 4


@dataclass
class Inputs:
    x: Tensor
    logits: Tensor
    weights: dict[str, Any]
    plain: tuple[Tensor, Tensor]


def weights(s: Shape, packed: bool) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The op's weight arguments, and the same weights in bf16."""
    sizes = ((2 * s.inner, s.width), (s.width, s.inner))
    if not packed:
        w13, w2 = (torch.randn(s.experts, n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for n, k in sizes)
        return dict(w13=w13, w2=w2), (w13, w2)
    bytes_ = [torch.randint(256, (s.experts, n, k // 2), device="cuda", dtype=torch.uint8) for n, k in sizes]
    scales = [torch.randint(118, 122, (s.experts, n, k // 32), device="cuda", dtype=torch.uint8) for n, k in sizes]
    w13, w2 = (
        torch.stack([dequantize_fp4("b", b[e], c[e], "mxfp4").bfloat16() for e in range(s.experts)])
        for b, c in zip(bytes_, scales, strict=True)
    )
    given = dict(w13=bytes_[0], w2=bytes_[1], w13_scale=scales[0], w2_scale=scales[1], format="mxfp4")
    return given, (w13, w2)


def ours(s: Shape, plan: Plan | PairPlan, i: Inputs) -> Tensor:
    ids, p = moe_route(i.logits, s.top_k, renormalise=True)
    return run_experts(plan, i.x, ids, p, **i.weights, **s.attributes())


def activate(s: Shape, h: Tensor) -> Tensor:
    if not s.swiglu_oai:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    gate, up = h[..., 0::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def grouped_mm(s: Shape, x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    p, ids = logits.softmax(-1).topk(s.top_k, dim=-1)
    p = p / p.sum(-1, keepdim=True)
    flat = ids.reshape(-1)
    order = flat.argsort()
    ends = torch.histc(flat.float(), bins=s.experts, min=0, max=s.experts - 1).cumsum(0).to(torch.int32)
    h = activate(s, torch._grouped_mm(x[order // s.top_k], w13.mT, offs=ends))
    y = torch._grouped_mm(h, w2.mT, offs=ends) * p.reshape(-1, 1)[order].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(x.shape[0], s.top_k, -1).sum(1)


def relative_error(s: Shape, i: Inputs, out: Tensor) -> float:
    """Against fp32 on the same bf16 operands, all experts one after the other."""
    p, ids = i.logits.softmax(-1).topk(s.top_k, dim=-1)
    p, truth = p / p.sum(-1, keepdim=True), torch.zeros(i.x.shape, device="cuda")
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        h = activate(s, i.x[t].float() @ i.plain[0][e].float().T)
        truth.index_add_(0, t, (h @ i.plain[1][e].float().T) * p[t, j, None])
    return float((out.float() - truth).norm() / truth.norm())


def measure(s: Shape, packed: bool, T: int, made: list[Any], bandwidth: float) -> dict[str, Any]:
    x = [torch.randn(T, s.width, device="cuda", dtype=torch.bfloat16) for _ in made]
    sets = [Inputs(a, torch.randn(T, s.experts, device="cuda"), *m) for a, m in zip(x, made, strict=True)]
    size = expert_bytes(made[0][0]["w13"], made[0][0]["w2"])

    def planned(card: Arch, tokens: int) -> Plan | PairPlan:
        return expert_plan(card, tokens, s.top_k, s.experts, torch.bfloat16, packed, size)

    plan = {"ours": planned(of_device(0), T), "SM12x tiles": planned(by_name("rtx5090"), T)}
    if T <= 16:
        sorts = isinstance(plan["ours"], Plan) and plan["ours"].sort
        plan["as pairs" if sorts else "sorted"] = planned(of_device(0), 1 if sorts else 16)
    errors = {name: relative_error(s, sets[0], ours(s, p, sets[0])) for name, p in plan.items()}
    assert max(errors.values()) < 8e-3, errors
    ms = {name: graph_time([partial(ours, s, p, i) for i in sets]) for name, p in plan.items()}
    chosen = [i.logits.topk(s.top_k).indices for i in sets]
    ms["routing"] = graph_time([partial(moe_route, i.logits, s.top_k, renormalise=True) for i in sets])
    operands = [(i.x, i.logits, *i.plain) for i in sets]
    torch._dynamo.reset()
    inductor = torch.compile(grouped_mm, dynamic=False)
    for name, function in (("grouped_mm eager", grouped_mm), ("grouped_mm Inductor", inductor)):
        try:
            ms[name] = graph_time([partial(function, s, *o) for o in operands], replays=9)
        except Exception as error:
            print(name, type(error).__name__, str(error)[:200], flush=True)
    hit = sum(len(c.unique()) for c in chosen) / len(chosen)
    tensors = [t for t in made[0][0].values() if isinstance(t, Tensor)]
    least = hit * sum(t.numel() * t.element_size() for t in tensors) / s.experts + 4 * T * s.width
    floor = least / bandwidth
    return {
        "shape": s.name, "weights": "mxfp4" if packed else "bf16", "T": T, "experts hit": round(hit, 1),
        "ms": {k: round(v * 1e3, 4) for k, v in ms.items()}, "floor_ms": round(floor * 1e3, 4),
        "of copy": round(floor / ms["ours"], 3), "relative_error": max(errors.values()),
        "TFLOPS": round(6 * T * s.top_k * s.width * s.inner / ms["ours"] / 1e12, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_TB_per_s": round(bandwidth / 1e12, 3), "matmul_TFLOPS": round(matmul_rate() / 1e12, 1), "rows": [],
    }  # fmt: skip
    for shape in SHAPES:
        for packed in (False, True):
            made = [weights(shape, packed) for _ in range(SETS)]
            for T in TOKENS:
                row = measure(shape, packed, T, made, bandwidth)
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
            del made
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
