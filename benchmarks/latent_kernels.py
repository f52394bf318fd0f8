"""Latent attention decoding with DeepSeek-V3's dimensions on one GPU: from q and the cache to W_uv's output.

    python benchmarks/latent_kernels.py [--out benchmarks/results/latent_kernels-h200.json] [--sweep]

Every time is the median of CUDA graph replays over four rotated sets of weights and caches. "whole" is the code that
expands the cache, compiled by our backend; where FlashInfer is installed, "own kernels" is the same without its FA3.
"Inductor" is the same code compiled by Inductor, "attention" our kernel between the absorbed projections, "plain torch"
the absorbed form in ordinary ops, "FlashInfer" its paged kernels for that attention. The floor is bytes over the copy
bandwidth of this run. "SM12x tiles" are those of an RTX 5090 on the GPU at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _timing import copy_bandwidth, graph_time
from torch import Tensor

from sm12x_compile import collect, sm12x
from sm12x_compile.arch import by_name, of_device
from sm12x_compile.lowering.triton.mla_decode import mla_splits, mla_tiles, run_mla_decode
from sm12x_compile.lowering.triton.tiles import DecodeTiles
from sm12x_compile.ops import mla
from sm12x_compile.ops.mla import per_head

H, N, R, V, L = 128, 128, 64, 128, 512
SCALE = (N + R) ** -0.5
SHAPES = [(1, 4096), (1, 32768), (8, 8192)]
SETS = 4
PLAIN = {"cuda_graphs": False}  # the graph is captured here
OWN = ["-flashinfer.mla_fa3", "-flashinfer.mla_fa3_token"]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(B: int, T: int) -> list[Inputs]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    made = []
    for _ in range(SETS):
        weight = randn(H, N + V, L) * L**-0.5  # w_uk and w_uv are views of one parameter
        q, q_rope, latent, k_rope = randn(B, H, 1, N), randn(B, H, 1, R), randn(B, T, L), randn(B, T, R)
        made.append((q, q_rope, latent, k_rope, weight[:, :N], weight[:, N:]))
    return made


def as_written(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor) -> Tensor:
    """What models do at every step: all keys and values of all heads from the cache."""
    B, T, _ = latent.shape
    k, v = F.linear(latent, weight).view(B, T, H, N + V).transpose(1, 2).split([N, V], dim=-1)
    k = torch.cat([k, k_rope[:, None].expand(-1, H, -1, -1)], dim=-1)
    return F.scaled_dot_product_attention(torch.cat([q, q_rope], dim=-1), k, v, scale=SCALE)


def plain(x: Inputs) -> Tensor:
    q, q_rope, latent, k_rope, w_uk, w_uv = x
    query = per_head(q, w_uk)
    scores = query[:, :, 0] @ latent.mT + q_rope[:, :, 0] @ k_rope.mT
    mixed = torch.softmax(scores.float() * SCALE, -1).to(latent.dtype) @ latent
    return per_head(mixed[:, :, None], w_uv.mT)


def attention(tiles: DecodeTiles, splits: int, x: tuple[Tensor, ...]) -> Tensor:
    return run_mla_decode(tiles, splits, *x, SCALE)


def flashinfer_attention(backend: str, x: tuple[Tensor, ...], page: int = 64) -> partial[Tensor]:
    """FlashInfer's attention over the same latents seen as pages, planned outside of what is timed."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    q, q_rope, latent, k_rope = x
    B, T, _ = latent.shape
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), backend=backend)
    starts = torch.arange(B + 1, dtype=torch.int32, device="cuda")
    pages = T // page
    wrapper.plan(
        qo_indptr=starts, kv_indptr=starts * pages, num_heads=H, head_dim_ckv=L, head_dim_kpe=R, page_size=page,
        kv_indices=torch.arange(B * pages, dtype=torch.int32, device="cuda"), causal=False, sm_scale=SCALE,
        kv_len_arr=torch.full((B,), T, dtype=torch.int32, device="cuda"), q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    return partial(
        wrapper.run, q_nope=q[:, :, 0].contiguous(), q_pe=q_rope[:, :, 0].contiguous(),
        ckv_cache=latent.view(B * pages, page, L), kpe_cache=k_rope.view(B * pages, page, R),
        out=torch.empty(B, H, L, device="cuda", dtype=q.dtype),
    )  # fmt: skip


def measure(B: int, T: int, bandwidth: float, sweep: bool) -> dict[str, Any]:
    sets = inputs(B, T)
    truth = mla.reference(*(t.double() for t in sets[0]), SCALE)
    torch._dynamo.reset()
    inductor = torch.compile(as_written)
    ours = torch.compile(as_written, backend=sm12x, options=PLAIN)
    alone = torch.compile(as_written, backend=sm12x, options={**PLAIN, "kernels": OWN})
    flashinfer = importlib.util.find_spec("flashinfer") is not None
    written = [(*x[:4], torch.cat([x[4], x[5]], 1).flatten(0, 1)) for x in sets]
    with collect() as site:
        error = float((ours(*written[0]).double() - truth).norm() / truth.norm())
    assert error < 1e-2, f"relative error {error:.1e}"
    latent_sets = [(per_head(x[0], x[4]), *x[1:4]) for x in sets]
    ms: dict[str, float] = {
        "whole": graph_time([partial(ours, *x) for x in written]),
        "Inductor": graph_time([partial(inductor, *x) for x in written], replays=5),
        "plain torch": graph_time([partial(plain, x) for x in sets]),
    }
    if flashinfer:
        ms["own kernels"] = graph_time([partial(alone, *x) for x in written])
    for name, card in (("attention", of_device(0)), ("attention, SM12x tiles", by_name("rtx5090"))):
        tiles = mla_tiles(card, L, H, B * T)
        splits = mla_splits(of_device(0), tiles, B * -(-H // tiles.block_r), T)
        ms[name] = graph_time([partial(attention, tiles, splits, x) for x in latent_sets])
    if flashinfer:
        for backend in ("fa2", "fa3"):
            ms[f"FlashInfer {backend}"] = graph_time([flashinfer_attention(backend, x) for x in latent_sets])
    row: dict[str, Any] = {
        "B": B, "T": T, "kernel": site.sites[0].kernel, "relative_error": error,
        "ms": {k: round(v * 1e3, 4) for k, v in ms.items()},
        "floor_ms": {
            "whole": round(2 * (H * (N + V) * L + B * T * (L + R)) / bandwidth * 1e3, 4),
            "attention": round(2 * B * T * (L + R) / bandwidth * 1e3, 4),
        },
    }  # fmt: skip
    if sweep:
        row["sweep"] = dict(sorted(swept(B, T, latent_sets).items(), key=lambda item: item[1])[:8])
    return row


def swept(B: int, T: int, sets: list[tuple[Tensor, ...]]) -> dict[str, float]:
    found = {}
    shapes = [(64, 64, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2), (16, 64, 8, 3)]
    for shape, per_sm, warps in itertools.product(shapes, (0.25, 0.5, 1.0), (4, 8)):
        tiles = replace(DecodeTiles(*shape), combine_warps=warps)
        groups = B * -(-H // tiles.block_r)
        splits = max(1, min(int(per_sm * 132 / groups), -(-T // (2 * tiles.block_n)), 64))
        try:
            time = graph_time([partial(attention, tiles, splits, x) for x in sets], replays=10)
        except Exception as error:  # a configuration that does not fit
            print(shape, type(error).__name__, flush=True)
            torch.cuda.synchronize()
            continue
        found[f"{shape} splits {splits} combine {warps}"] = round(time * 1e3, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="time other tiles and splits as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_TB_per_s": round(bandwidth / 1e12, 3), "rows": [],
    }  # fmt: skip
    for B, T in SHAPES:
        row = measure(B, T, bandwidth, options.sweep)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
