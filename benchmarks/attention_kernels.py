"""Our Triton attention kernels beside PyTorch's SDPA, on one GPU, in one run.

    python benchmarks/attention_kernels.py [--out benchmarks/results/attention_kernels-h200.json] [--only decode]

Every time is the median of CUDA graph replays over four rotated sets of random inputs, decode with its combining
kernel. The floor is the larger of bytes / copy bandwidth and FLOPs / matmul rate, both measured in this run. "SM12x
tiles" are the tiles that an RTX 5090 would get, on the GPU at hand: they say what is lost by small tiles, not how fast
an SM12x card is. SDPA knows no sinks and no softcap; there it runs without them, so the ratio flatters it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _timing import copy_bandwidth, graph_time, host_time, matmul_rate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sm12x_compile.arch import by_name, of_device
from sm12x_compile.lowering.triton.attention_decode import attention_decode, run_decode
from sm12x_compile.lowering.triton.attention_prefill import attention_prefill, run_prefill
from sm12x_compile.lowering.triton.tiles import decode_splits, decode_tiles, prefill_tiles
from sm12x_compile.ops.attention import attention, attention_cost

SETS = 4
BACKENDS = {"sdpa": None, "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Work:
    """One row: shapes, masks, and which kernel it measures."""

    name: str
    B: int
    Hq: int
    Hkv: int
    S: int
    T: int
    D: int
    DV: int
    masks: dict[str, Any] = field(default_factory=dict)
    filled: int | None = None  # keys that are there, of T slots
    fill_by: str = "kv_len"  # or "q_offset": how the kernel learns of it

    @property
    def is_decode(self) -> bool:
        return self.S <= 16


PREFILL = [
    Work("prefill causal 32/8 x 128", 1, 32, 8, 4096, 4096, 128, 128, {"causal": True}),
    Work("prefill causal 32/8 x 128, T 16384", 1, 32, 8, 16384, 16384, 128, 128, {"causal": True}),
    Work("prefill full 32/8 x 128", 1, 32, 8, 4096, 4096, 128, 128),
    Work("gpt-oss, sinks, 64/8 x 64", 1, 64, 8, 4096, 4096, 64, 64, {"causal": True, "sinks": True}),
    Work("gpt-oss, sinks, window 128", 1, 64, 8, 4096, 4096, 64, 64,
         {"causal": True, "sinks": True, "window_left": 127}),
    Work("prefill causal 32/32 x 80", 1, 32, 32, 4096, 4096, 80, 80, {"causal": True}),
    Work("prefill causal 32/32 x 96", 1, 32, 32, 4096, 4096, 96, 96, {"causal": True}),
    Work("prefill causal 16/16 x 192/128", 1, 16, 16, 4096, 4096, 192, 128, {"causal": True}),
    Work("prefill causal 16/8 x 256", 1, 16, 8, 4096, 4096, 256, 256, {"causal": True}),
    Work("gemma2, softcap, 16/8 x 256", 1, 16, 8, 4096, 4096, 256, 256, {"causal": True, "softcap": 50.0}),
]  # fmt: skip
DECODE = [
    Work("decode B8 T8192 32/8 x 128", 8, 32, 8, 1, 8192, 128, 128),
    Work("decode B1 T8192 32/8 x 128", 1, 32, 8, 1, 8192, 128, 128),
    Work("decode B8 T8192 gpt-oss, sinks, 64/8 x 64", 8, 64, 8, 1, 8192, 64, 64, {"sinks": True}),
    Work("decode B8 T8192 16/8 x 256", 8, 16, 8, 1, 8192, 256, 256),
    Work("decode B8 T8192 32/8 x 128, 4 queries", 8, 32, 8, 4, 8192, 128, 128, {"causal": True, "q_shift": 8188}),
    Work("decode B1 T2048 32/8 x 128", 1, 32, 8, 1, 2048, 128, 128),
    Work("decode B1, 2048 of 32768 filled, kv_len", 1, 32, 8, 1, 32768, 128, 128, filled=2048),
    Work("decode B1, 2048 of 32768 filled, q_offset", 1, 32, 8, 1, 32768, 128, 128, {"causal": True}, 2048, "q_offset"),
    Work("decode B1, 32768 filled", 1, 32, 8, 1, 32768, 128, 128),
]  # fmt: skip

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(work: Work) -> list[Inputs]:
    def states(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(work.B, heads, length, width, device="cuda", dtype=torch.bfloat16)

    return [
        (states(work.Hq, work.S, work.D), states(work.Hkv, work.T, work.D), states(work.Hkv, work.T, work.DV))
        for _ in range(SETS)
    ]


def masks_of(work: Work) -> dict[str, Any]:
    masks = dict(work.masks)
    if masks.get("sinks"):
        masks["sinks"] = torch.randn(work.Hq, device="cuda", dtype=torch.bfloat16)
    if work.filled is not None:
        at = work.filled - (work.S if work.fill_by == "q_offset" else 0)
        masks[work.fill_by] = torch.tensor(at, device="cuda")
    return masks


def floor(work: Work, bandwidth: float, rate: float) -> tuple[float, float]:
    """Least seconds, and FLOPs, of the keys that are really there."""
    T = work.filled or work.T
    a = {name: p.default for name, p in attention.signature.parameters.items()}
    a["q"] = torch.empty(work.B, work.Hq, work.S, work.D, device="meta", dtype=torch.bfloat16)
    a["k"] = torch.empty(work.B, work.Hkv, T, work.D, device="meta", dtype=torch.bfloat16)
    a["v"] = torch.empty(work.B, work.Hkv, T, work.DV, device="meta", dtype=torch.bfloat16)
    cost = attention_cost(a | {key: value for key, value in work.masks.items() if key != "sinks"})
    return max(cost.bytes / bandwidth, cost.flops / rate), cost.flops


def sdpa(work: Work, backend: SDPBackend | None) -> Callable[[Inputs], Tensor] | None:
    """SDPA over the whole cache; None where a window would need a mask tensor, which is another contest."""
    if "window_left" in work.masks or (work.masks.get("causal") and 1 < work.S < work.T):
        return None
    causal = bool(work.masks.get("causal")) and work.S > 1

    def run(x: Inputs) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=work.Hq != work.Hkv)

    return run


def check(work: Work, x: Inputs, masks: dict[str, Any], out: Tensor) -> float:
    """Relative error of one batch against the reference in fp64; a head and its queries at the end are enough."""
    q, k, v = (t[:1] for t in x)
    rows, G = min(work.S, 256), work.Hq // work.Hkv
    given = {name: m.double() if isinstance(m, Tensor) and m.is_floating_point() else m for name, m in masks.items()}
    if "sinks" in given:
        given["sinks"] = given["sinks"][:G]
    given["q_shift"] = given.get("q_shift", 0) + work.S - rows
    part = (t.double() for t in (q[:, :G, -rows:], k[:, :1], v[:, :1]))
    wanted = attention.reference(*part, work.D**-0.5, **given)
    return float((out[:1, :G, -rows:].double() - wanted).norm() / wanted.norm())


def measure(work: Work, bandwidth: float, rate: float) -> dict[str, Any]:
    sets, masks, scale = inputs(work), masks_of(work), work.D**-0.5
    ours = attention_decode if work.is_decode else attention_prefill
    entry = {"ours": lambda x: ours(*x, scale, **masks), "SM12x tiles": lambda x: with_sm12x_tiles(work, x, masks)}
    error = check(work, sets[0], masks, entry["ours"](sets[0]))
    assert error < 8e-3, f"{work.name}: relative error {error:.1e}"
    least, flops = floor(work, bandwidth, rate)
    times: dict[str, float | None] = {}
    for name, call in entry.items():
        times[name] = graph_time([partial(call, x) for x in sets])
    for name, backend in BACKENDS.items():
        contender = sdpa(work, backend)
        try:
            times[name] = contender and graph_time([partial(contender, x) for x in sets])
        except RuntimeError:  # a backend that does not take this shape
            times[name] = None
            torch.cuda.synchronize()
    best = min((t for name, t in times.items() if name.startswith("sdpa") and t), default=None)
    own = times["ours"]
    assert own is not None
    return {
        "name": work.name, "kernel": "decode" if work.is_decode else "prefill", "relative_error": error,
        "ms": {name: None if t is None else round(t * 1e3, 5) for name, t in times.items()},
        "floor_ms": round(least * 1e3, 5), "tflops": round(flops / own / 1e12, 1),
        "ours_over_best_sdpa": None if best is None else round(own / best, 3),
        "host_us": round(host_time(lambda: entry["ours"](sets[0])) * 1e6, 1),
    }  # fmt: skip


def with_sm12x_tiles(work: Work, x: Inputs, masks: dict[str, Any]) -> Tensor:
    card, here = by_name("rtx5090"), of_device(0)
    if not work.is_decode:
        return run_prefill(prefill_tiles(card, work.D, work.DV, torch.bfloat16), *x, work.D**-0.5, **masks)
    rows = work.S * work.Hq // work.Hkv
    tiles = decode_tiles(card, work.D, work.DV, torch.bfloat16, rows)
    splits = decode_splits(here, tiles, work.B * work.Hkv * -(-rows // tiles.block_r), work.T)
    return run_decode(tiles, splits, *x, work.D**-0.5, **masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "copy_TB_per_s": round(bandwidth / 1e12, 3), "matmul_TFLOP_per_s": round(rate / 1e12, 1), "rows": [],
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in report.items() if key != "rows"))
    columns = ["ours", "SM12x tiles", *BACKENDS]
    print(f"{'ms':45}" + "".join(f"{c:>13}" for c in columns) + f"{'floor':>9}{'TF':>6}{'x best':>8}{'host us':>9}")
    for work in PREFILL + DECODE:
        if options.only not in work.name:
            continue
        row = measure(work, bandwidth, rate)
        report["rows"].append(row)
        cells = "".join(f"{row['ms'][c]:13.4f}" if row["ms"][c] else f"{'-':>13}" for c in columns)
        ratio = row["ours_over_best_sdpa"]
        tail = f"{ratio:8.2f}" if ratio else f"{'-':>8}"
        print(f"{work.name:45}{cells}{row['floor_ms']:9.4f}{row['tflops']:6.0f}{tail}{row['host_us']:9.1f}", flush=True)
        torch.cuda.empty_cache()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
