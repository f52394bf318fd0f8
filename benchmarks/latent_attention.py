"""Decode of one latent-attention layer on the CPU: ours against Inductor on the same code, in one run.

    python benchmarks/latent_attention.py --out benchmarks/results/latent_attention-cpu.json

The layer is written as DeepSeek's models are: the cache holds latents, and every step expands all of it through
`kv_b_proj`. Each contender is a process of its own; the figure is the median of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS, LATENT, NOPE, ROPE, VALUE = 2048, 16, 512, 128, 64, 128
SETTLE = 2.0  # seconds before anything is timed, and at least as many that are


class Layer(nn.Module):
    """One decode step at position `at` of a cache of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a_proj = nn.Linear(HIDDEN, LATENT + ROPE, bias=False)
        self.kv_a_norm = nn.RMSNorm(LATENT)
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.o_proj = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)

    def forward(self, x: Tensor, latents: Tensor, ropes: Tensor, at: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.q_proj(x).view(B, S, HEADS, -1).transpose(1, 2)
        new, rope = self.kv_a_proj(x).split([LATENT, ROPE], dim=-1)
        latents.index_copy_(1, at, self.kv_a_norm(new))
        ropes.index_copy_(1, at, rope)
        T = latents.shape[1]
        k, v = self.kv_b_proj(latents).view(B, T, HEADS, -1).transpose(1, 2).split([NOPE, VALUE], dim=-1)
        k = torch.cat([k, ropes[:, None].expand(-1, HEADS, -1, -1)], dim=-1)
        keep = torch.arange(T, device=x.device) <= at[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def measure(contender: str, tokens: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = Layer().eval()
    if contender == "sm12x":
        from sm12x_compile import sm12x

        backend: Any = sm12x
    else:
        backend = "inductor"
    compiled = layer if contender == "eager" else torch.compile(layer, backend=backend)
    x = torch.randn(1, 1, HIDDEN)
    latents, ropes = torch.randn(1, tokens, LATENT), torch.randn(1, tokens, ROPE)
    positions = cycle(range(tokens // 2, tokens))
    times: list[float] = []

    def step() -> tuple[Tensor, Tensor]:
        at = torch.tensor([next(positions)])
        start = time.perf_counter()
        out = compiled(x, latents, ropes, at)
        times.append(time.perf_counter() - start)
        return out, at

    with torch.inference_mode():
        step()
        until = time.perf_counter() + SETTLE  # the compiler's processes end meanwhile
        while time.perf_counter() < until:
            step()
        times.clear()
        until = time.perf_counter() + SETTLE
        while len(times) < steps or time.perf_counter() < until:
            out, at = step()
        wanted = layer(x, latents, ropes, at)
    return {
        "contender": contender, "ms": round(statistics.median(times) * 1e3, 3),
        "difference_from_eager": float((out - wanted).abs().max() / wanted.abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", help="measure one contender in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tokens, options.steps)))
        return
    rows = []
    for contender in ("eager", "inductor", "sm12x"):
        command = [sys.executable, __file__, "--one", contender, "--tokens", str(options.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    times = {row["contender"]: row["ms"] for row in rows}
    report = {
        "device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads(),
        "hidden": HIDDEN, "heads": HEADS, "latent": LATENT, "rope": ROPE, "tokens": options.tokens, "rows": rows,
        "inductor_over_sm12x": round(times["inductor"] / times["sm12x"], 1),
    }  # fmt: skip
    print(f"Inductor / sm12x: {report['inductor_over_sm12x']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
