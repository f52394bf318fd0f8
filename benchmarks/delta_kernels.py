"""The gated delta rule with Qwen3-Next's dimensions on one GPU: prefill, a decoding step, verifying four drafts.

    python benchmarks/delta_kernels.py [--out benchmarks/results/delta_kernels-h200.json] [--rows step KDA ..]

Every time is the median of CUDA graph replays over rotated inputs and states, in a graph on both sides. "fla" is
flash-linear-attention, if it is installed: its chunked and its recurrent kernel, with the l2 norm and without repeated
heads. It has no kernel that verifies drafts: there stands its recurrent kernel over four tokens, which keeps no way
back. The floor is bytes over the copy bandwidth of this run. "SM12x tiles" are those of an RTX 5090 on the GPU at hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from _timing import copy_bandwidth, graph_time
from torch import Tensor

from sm12x_compile.arch import Arch, by_name, of_device
from sm12x_compile.lowering.triton.causal_conv1d import causal_conv1d, causal_conv1d_update
from sm12x_compile.lowering.triton.delta_chunked import chunked_launches, run_chunked, run_launch
from sm12x_compile.lowering.triton.delta_tiles import CHUNK, chunk_tiles, parts, step_tiles
from sm12x_compile.lowering.triton.delta_update import run_update, run_verify
from sm12x_compile.ops import causal_conv1d as conv_op
from sm12x_compile.ops import gated_delta_rule as delta_op

K = V = 128
SCALE = K**-0.5
PREFILL = [(1, 8192, 16, 32), (1, 8192, 2, 8), (4, 2048, 16, 32), (1, 2048, 16, 32), (1, 32768, 2, 8)]
CHANNELS = 8192  # of Qwen3-Next's convolution: q, k and v of a layer
DRAFTS = 4
KINDS = ("step", "GDN", "KDA", "convolution")
Inputs = tuple[Tensor, ...]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def inputs(B: int, T: int, Hk: int, Hv: int, per_channel: bool = False) -> Inputs:
    """q, k, v, g, beta."""
    g = -torch.rand((B, T, Hv, K) if per_channel else (B, T, Hv), device="cuda")
    return randn(B, T, Hk, K), randn(B, T, Hk, K), randn(B, T, Hv, V), g, torch.rand(B, T, Hv, device="cuda").bfloat16()


def public(name: str) -> Callable[..., Any] | None:
    """A kernel of flash-linear-attention, or None if it is not installed."""
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError:
        return None
    found: Callable[..., Any] = getattr(module, name)
    return found


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 5)


def prefill(B: int, T: int, Hk: int, Hv: int, bandwidth: float, per_channel: bool = False) -> dict[str, Any]:
    sets = [inputs(B, T, Hk, Hv, per_channel) for _ in range(4)]
    truth = delta_op.reference(*sets[0], SCALE, None, "rsqrt")
    row: dict[str, Any] = {"prefill": "KDA" if per_channel else "GDN", "B": B, "T": T, "Hk": Hk, "Hv": Hv, "ms": {}}
    row["relative_errors"] = {}  # of o and of the state, against the fp32 reference

    def chosen(card: Arch) -> tuple[Any, int]:
        chunks = -(-T // CHUNK)
        tiles = chunk_tiles(card, K, V, per_channel, B * Hv, chunks)
        return tiles, parts(card, tiles, K, V, B * Hv, chunks)

    for name, card in (("ours", of_device(0)), ("ours, SM12x tiles", by_name("rtx5090"))):
        tiles, count = chosen(card)
        run = partial(run_chunked, tiles, count)
        o, state = run(*sets[0], SCALE, None, "rsqrt")
        errors = [float((a - b).norm() / b.norm()) for a, b in ((o.float(), truth[0].float()), (state, truth[1]))]
        row["relative_errors"][name] = errors
        row["ms"][name] = milliseconds(graph_time([partial(run, *x, SCALE, None, "rsqrt") for x in sets]))
        if card is of_device(0):
            row["parts"] = count
            launches = chunked_launches(tiles, count, *sets[0], SCALE, None, "rsqrt")[2]
            row["kernels_ms"] = {
                launch.kernel: milliseconds(graph_time([partial(run_launch, launch)] * 2, replays=8))
                for launch in launches
            }
    theirs = None if per_channel else public("chunk_gated_delta_rule")
    if theirs is not None:
        row["ms"]["fla"] = milliseconds(
            graph_time(
                [
                    partial(theirs, q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
                    for q, k, v, g, beta in sets
                ]
            )
        )
    moved = sum(x.numel() * x.element_size() for x in (*sets[0], sets[0][2])) + truth[1].numel() * 4
    row["floor_ms"] = milliseconds(moved / bandwidth)
    return row


def step(B: int, bandwidth: float) -> dict[str, Any]:
    Hk, Hv = 16, 32
    sets = [inputs(B, 1, Hk, Hv) for _ in range(4)]
    drafts = [inputs(B, DRAFTS, Hk, Hv) for _ in range(4)]
    pools = [randn(B, Hv, K, V, dtype=torch.float32) for _ in range(4)]
    journals = [torch.zeros(B, 2, DRAFTS, Hv, K + V + 1, device="cuda") for _ in range(4)]
    slots, turn = torch.arange(B, device="cuda"), torch.zeros(B, dtype=torch.int64, device="cuda")
    accepted = torch.full((B,), 2, device="cuda")
    ms: dict[str, dict[str, float]] = {"decode": {}, f"verify {DRAFTS}": {}}
    for name, card in (("ours", of_device(0)), ("ours, SM12x tiles", by_name("rtx5090"))):
        tiles = step_tiles(card, K, V, B * Hv)
        calls = [
            partial(run_update, tiles, *x, pool, slots, SCALE, "rsqrt") for x, pool in zip(sets, pools, strict=True)
        ]
        ms["decode"][name] = milliseconds(graph_time(calls))
        calls = [
            partial(run_verify, tiles, *x, pool, journal, slots, accepted, turn, SCALE, "rsqrt")
            for x, pool, journal in zip(drafts, pools, journals, strict=True)
        ]
        ms[f"verify {DRAFTS}"][name] = milliseconds(graph_time(calls))
    theirs = public("fused_recurrent_gated_delta_rule")
    if theirs is not None:
        for name, tokens in (("decode", sets), (f"verify {DRAFTS}", drafts)):
            calls = [
                partial(
                    theirs, q, k, v, g=g, beta=beta, scale=SCALE, initial_state=pool, output_final_state=True,
                    use_qk_l2norm_in_kernel=True,
                )
                for (q, k, v, g, beta), pool in zip(tokens, pools, strict=True)
            ]  # fmt: skip
            ms[name]["fla"] = milliseconds(graph_time(calls))
    floor = 2 * pools[0].numel() * 4 / bandwidth
    return {"step": "GDN", "B": B, "Hk": Hk, "Hv": Hv, "ms": ms, "floor_ms": milliseconds(floor)}


def convolution(bandwidth: float) -> dict[str, Any]:
    """Both layouts of x: channels last, as projections leave it, and positions last."""
    w = randn(CHANNELS, 4)
    ms = {}
    for name, last in (("channels last", True), ("positions last", False)):
        xs = [randn(1, 8192, CHANNELS).mT if last else randn(1, CHANNELS, 8192) for _ in range(4)]
        y, _ = causal_conv1d(xs[0], w, None, "silu")
        truth, _ = conv_op.reference(xs[0], w, None, "silu")
        assert float((y - truth).norm() / truth.norm()) < 1e-2
        ms[name] = milliseconds(graph_time([partial(causal_conv1d, x, w, None, "silu") for x in xs]))
    for B in (1, 32):
        xs, pools = ([randn(B, CHANNELS, n) for _ in range(4)] for n in (1, 4))
        slots = torch.arange(B, device="cuda")
        calls = [
            partial(causal_conv1d_update, x, w, pool, slots, None, "silu") for x, pool in zip(xs, pools, strict=True)
        ]
        ms[f"update, B {B}"] = milliseconds(graph_time(calls))
    floor = 2 * 8192 * CHANNELS * 2 / bandwidth
    return {"convolution": "width 4, silu", "T": 8192, "C": CHANNELS, "ms": ms, "floor_ms": milliseconds(floor)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--rows", nargs="+", choices=KINDS, default=KINDS, help="measure these, keep the others in --out"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_TB_per_s": round(bandwidth / 1e12, 3), "rows": [],
    }  # fmt: skip
    work: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        *(("step", partial(step, B, bandwidth)) for B in (1, 32)),
        *(("GDN", partial(prefill, *shape, bandwidth)) for shape in PREFILL),
        ("KDA", partial(prefill, 1, 8192, 32, 32, bandwidth, per_channel=True)),
        ("convolution", partial(convolution, bandwidth)),
    ]
    measured: dict[int, dict[str, Any]] = {}
    if options.out and options.out.exists():
        measured = dict(enumerate(json.loads(options.out.read_text())["rows"]))
    for place, (kind, measure) in enumerate(work):
        if kind not in options.rows:
            continue
        measured[place] = measure()
        print(json.dumps(measured[place]), flush=True)
        report["rows"] = [measured[k] for k in sorted(measured)]
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    errors = [e for row in report["rows"] for pair in row.get("relative_errors", {}).values() for e in pair]
    assert max(errors) < 1e-2, "a kernel disagrees with the reference"


if __name__ == "__main__":
    main()
