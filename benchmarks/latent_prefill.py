"""A prompt through latent attention with DeepSeek-V3's dimensions on one GPU: time and peak memory.

    python benchmarks/latent_prefill.py [--out benchmarks/results/latent_prefill-h200.json]

From the queries and the latents of the prompt to the heads' results, as models write it (expand, join with the rotary
part, SDPA). "ours" and "Inductor" compile the same code; medians of CUDA graph replays over rotated inputs. Peak memory
is what a call allocates beside its inputs.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _timing import graph_time, matmul_rate
from torch import Tensor

from sm12x_compile import collect, sm12x
from sm12x_compile.ops import mla

H, N, R, V, L = 128, 128, 64, 128, 512
SCALE = (N + R) ** -0.5
SHAPES = [(1, 512), (1, 2048), (1, 8192), (4, 2048)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(B: int, T: int) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q = randn(B, T, H, N + R).transpose(1, 2)
    return q[..., :N], q[..., N:], randn(B, T, L), randn(B, T, R), randn(H * (N + V), L) * L**-0.5


def as_written(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor) -> Tensor:
    B, T, _ = latent.shape
    k, v = F.linear(latent, weight).view(B, T, H, N + V).transpose(1, 2).split([N, V], dim=-1)
    k = torch.cat([k, k_rope[:, None].expand(-1, H, -1, -1)], dim=-1)
    q = torch.cat([q, q_rope], dim=-1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2).flatten(2)


def peak(call: Any) -> int:
    """Bytes that a call allocates at its peak, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(found: Tensor, x: Inputs) -> float:
    """Against fp64, a few heads at a time: the scores of all would not fit."""
    q, q_rope, latent, k_rope, weight = (t[:1].double() if t.dim() > 2 else t.double() for t in x)
    both = weight.view(H, N + V, L)
    wrong = whole = 0.0
    for h in range(0, H, 32):
        truth = mla.reference(
            q[:, h : h + 1], q_rope[:, h : h + 1], latent, k_rope, both[h : h + 1, :N], both[h : h + 1, N:], SCALE,
            causal=True,
        )  # fmt: skip
        wrong += float((found[:1, :, h * V : (h + 1) * V].double() - truth[:, 0]).square().sum())
        whole += float(truth.square().sum())
    return float((wrong / whole) ** 0.5)


def measure(B: int, T: int) -> dict[str, Any]:
    sets = [inputs(B, T) for _ in range(2)]
    torch._dynamo.reset()
    contenders = {"ours": torch.compile(as_written, backend=sm12x), "Inductor": torch.compile(as_written)}
    row: dict[str, Any] = {"B": B, "T": T, "ms": {}, "peak_MiB": {}}
    for name, function in contenders.items():
        with collect() as report:
            out = function(*sets[0])
        error = relative_error(out, sets[0])
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        if report.sites:
            row["kernel"], row["relative_error"] = report.sites[0].kernel, error
        del out
        row["peak_MiB"][name] = round(peak(partial(function, *sets[1])) / 2**20, 1)
        row["ms"][name] = round(graph_time([partial(function, *x) for x in sets], replays=9) * 1e3, 4)
    row["flops"] = 2.0 * B * T * L * H * (N + V) + B * H * T * T * (N + R + V)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rate = matmul_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "matmul_TFLOP_per_s": round(rate / 1e12, 1), "rows": [],
    }  # fmt: skip
    for B, T in SHAPES:
        row = measure(B, T)
        row["floor_ms"] = round(row.pop("flops") / rate * 1e3, 4)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
