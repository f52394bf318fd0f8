"""FlashInfer's candidates on one GPU: against the ops' references, and against our kernels and PyTorch in one run.

    python benchmarks/flashinfer_kernels.py [--only gdn] [--out benchmarks/results/flashinfer-h200.json]

Errors are relative to the norm of the reference (fp32). Times are medians of CUDA graph replays over four rotated sets
of inputs: the adapter as a whole, from the op's arguments to its result, and "kernel alone", where FlashInfer's call
can be told from what stands around it and is shared by all layers. FlashInfer compiles its kernels at first use; they
are built side by side beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _timing import copy_bandwidth, graph_time
from torch import Tensor, nn

from sm12x_compile import collect, sm12x
from sm12x_compile.arch import of_device
from sm12x_compile.lowering.flashinfer.lengths import last_token_length
from sm12x_compile.lowering.flashinfer.pages import page_size, page_table
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call, kernels

SETS = 4
bf16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def attention(B: int, Hq: int, Hkv: int, S: int, T: int, D: int, sinks: bool = False, **masks: Any) -> dict[str, Any]:
    q = randn(B, S, Hq, D).transpose(1, 2)
    given = dict(q=q, k=randn(B, Hkv, T, D), v=randn(B, Hkv, T, D), scale=D**-0.5, **masks)
    return given | ({"sinks": randn(Hq)} if sinks else {})


def latent(B: int, T: int, H: int = 128) -> dict[str, Any]:
    return dict(
        q_nope=randn(B, H, 1, 512), q_rope=randn(B, H, 1, 64), latent=randn(B, T, 512), k_rope=randn(B, T, 64),
        w_uk=None, w_uv=None, scale=192**-0.5,
    )  # fmt: skip


def delta_rule(B: int, T: int, Hk: int, Hv: int) -> dict[str, Any]:
    q, k = randn(B, T, Hk, 128), randn(B, T, Hk, 128)
    g, beta = -torch.rand(B, T, Hv, device="cuda"), torch.rand(B, T, Hv, device="cuda")
    return dict(q=q, k=k, v=randn(B, T, Hv, 128), g=g, beta=beta, scale=128**-0.5, qk_l2norm="rsqrt",
                initial_state=randn(B, Hv, 128, 128, dtype=torch.float32))  # fmt: skip


def filled(T: int) -> dict[str, Any]:
    """A static cache, filled to its end: the position is known on the device."""
    return dict(causal=True, q_offset=torch.tensor(T - 1, device="cuda"))


Row = tuple[str, str, str, list[str], Callable[[], dict[str, Any]]]
ROWS: list[Row] = [
    ("attention", "decode, static cache, B 1, T 8192, 32/8 x 128", "flashinfer.xqa", ["triton.decode"],
     lambda: attention(1, 32, 8, 1, 8192, 128, **filled(8192))),
    ("attention", "decode, static cache, B 8, T 8192, 32/8 x 128", "flashinfer.xqa", ["triton.decode"],
     lambda: attention(8, 32, 8, 1, 8192, 128, **filled(8192))),
    ("attention", "decode, sinks, B 8, T 8192, 64/8 x 64", "flashinfer.xqa", ["triton.decode"],
     lambda: attention(8, 64, 8, 1, 8192, 64, sinks=True, **filled(8192))),
    ("attention", "decode, known length, B 8, T 8192, 32/8 x 128", "flashinfer.fa2", ["triton.decode", "torch.sdpa"],
     lambda: attention(8, 32, 8, 1, 8192, 128)),
    ("attention", "prefill, causal, T 4096, 32/8 x 128", "flashinfer.fa2", ["triton.prefill", "torch.sdpa"],
     lambda: attention(1, 32, 8, 4096, 4096, 128, causal=True)),
    ("attention", "prefill, causal, B 4, T 1024, 32/8 x 128", "flashinfer.fa2", ["triton.prefill", "torch.sdpa"],
     lambda: attention(4, 32, 8, 1024, 1024, 128, causal=True)),
    ("attention", "prefill, sinks, T 4096, 64/8 x 64", "flashinfer.fa2", ["triton.prefill"],
     lambda: attention(1, 64, 8, 4096, 4096, 64, sinks=True, causal=True)),
    ("mla", "latent decode, B 1, T 4096, 128 heads", "flashinfer.mla_fa2", ["triton.mla_decode"],
     lambda: latent(1, 4096)),
    ("mla", "latent decode, B 8, T 8192, 128 heads", "flashinfer.mla_fa2", ["triton.mla_decode"],
     lambda: latent(8, 8192)),
    ("gated_delta_rule", "prefill, B 1, T 8192, 16/32 heads", "flashinfer.gdn", ["triton.delta_chunked"],
     lambda: delta_rule(1, 8192, 16, 32)),
    ("gated_delta_rule", "prefill, B 4, T 2048, 16/32 heads", "flashinfer.gdn", ["triton.delta_chunked"],
     lambda: delta_rule(4, 2048, 16, 32)),
    ("gated_delta_rule", "prefill, B 1, T 8192, 2/8 heads", "flashinfer.gdn", ["triton.delta_chunked"],
     lambda: delta_rule(1, 8192, 2, 8)),
]  # fmt: skip


def bound(op: str, given: dict[str, Any]) -> Call:
    arguments = OPS[op].signature.bind(**given)
    arguments.apply_defaults()
    return Call(op, dict(arguments.arguments))


def runner(op: str, name: str, call: Call) -> Callable[[], Any] | str:
    """The kernel on this call, or why it declines."""
    kernel = next(k for k in kernels(op) if k.name == name)
    verdict = kernel.accepts(call, of_device())
    if not verdict:
        return str(getattr(verdict, "reason", verdict))
    return partial(kernel.run if kernel.overload is None else kernel.overload, **call.arguments)


def xqa_alone(call: Call) -> Callable[[], Any]:
    """xqa with its page table and lengths made before, as all layers of a model share them."""
    a = call.arguments
    B, T = a["k"].shape[0], a["k"].shape[2]
    page = page_size(T) or 0
    apart = a["k"].shape[1] * T // page if B > 1 else 0
    table = page_table(B, T, page, apart, a["q"].device)
    length = last_token_length(B, T, a["causal"], a["q_offset"], a["q_shift"], a["kv_len"], a["q"].device)
    op = torch.ops.sm12x_flashinfer.xqa
    return partial(op, a["q"], a["k"], a["v"], table, length, apart, a["scale"], -1, a["sinks"])


def parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(row: Row) -> dict[str, Any]:
    op, name, theirs, ours, make = row
    calls = [bound(op, make()) for _ in range(SETS)]
    true = parts(OPS[op].reference(**calls[0].arguments))
    found: dict[str, Any] = {"op": op, "call": name, "relative_error": {}, "ms": {}, "declined": {}}
    for kernel in [theirs, *ours]:
        try:
            runs = [runner(op, kernel, call) for call in calls]
            if isinstance(runs[0], str):
                found["declined"][kernel] = runs[0]
                continue
            got = parts(runs[0]())
            pairs = zip(got, true, strict=True)
            errors = [float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs]
            found["relative_error"][kernel] = max(errors)
            found["ms"][kernel] = round(1e3 * graph_time(runs), 5)  # type: ignore[arg-type]
            if kernel == "flashinfer.xqa":
                found["ms"]["flashinfer.xqa, kernel alone"] = round(1e3 * graph_time([xqa_alone(c) for c in calls]), 5)
        except Exception as error:
            traceback.print_exc()
            found["declined"][kernel] = f"{type(error).__name__}: {str(error)[:300]}"
    del calls, true
    torch.cuda.empty_cache()
    return found


class Decoder(nn.Module):
    """Attention over a static cache, as a model writes it."""

    def __init__(self, B: int = 2, H: int = 8, Hkv: int = 2, T: int = 256, D: int = 128) -> None:
        super().__init__()
        self.shape = (B, H, Hkv, D)
        self.qkv = nn.Linear(H * D, (H + 2 * Hkv) * D, bias=False, dtype=bf16, device="cuda")
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(B, Hkv, T, D, dtype=bf16, device="cuda"))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        B, H, Hkv, D = self.shape
        q, k, v = self.qkv(x).view(B, -1, H + 2 * Hkv, D).transpose(1, 2).split([H, Hkv, Hkv], dim=1)
        self.k.index_copy_(2, position, k)
        self.v.index_copy_(2, position, v)
        mask = torch.arange(self.k.shape[2], device=x.device) <= position[:, None]
        return F.scaled_dot_product_attention(q, self.k, self.v, mask[None, None], enable_gqa=True)


def end_to_end() -> dict[str, Any]:
    """Thirty steps through torch.compile with CUDA graphs and xqa, against the same module in eager mode."""
    torch.manual_seed(0)
    model = Decoder().eval()
    xs = [randn(2, 1, 1024) for _ in range(30)]
    with torch.no_grad():
        wanted = [model(x, torch.tensor([t], device="cuda")).clone() for t, x in enumerate(xs)]
        model.k.zero_(), model.v.zero_()
        compiled = torch.compile(model, backend=sm12x, options={"kernels": ["flashinfer.xqa"], "cuda_graphs": True})
        with collect() as report:
            found = [compiled(x, torch.tensor([t], device="cuda")).clone() for t, x in enumerate(xs)]
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True)]
    return {"kernels": sorted({str(site.kernel) for site in report.sites}), "worst relative error": max(errors)}


def prebuild() -> None:
    """Start every nvcc build at once; what fails here fails again, and is reported, where it is used."""
    from flashinfer.attention import BatchAttentionWithAttentionSinkWrapper as SinkWrapper
    from flashinfer.jit.attention import modules
    from flashinfer.jit.xqa import gen_xqa_module

    i32, room = torch.int32, torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    builds: dict[str, Callable[[], Any]] = {
        "xqa 128": lambda: gen_xqa_module(bf16, bf16, 64, 128, 4, False, bf16).build(verbose=False),
        "xqa 64": lambda: gen_xqa_module(bf16, bf16, 64, 64, 8, False, bf16).build(verbose=False),
        "mla": lambda: modules.gen_batch_mla_module("fa2", bf16, bf16, bf16, i32, 512, 64, False).build(verbose=False),
        "prefill": lambda: modules.gen_batch_prefill_module(
            "fa2", bf16, bf16, bf16, i32, 128, 128, 0, False, False, False).build(verbose=False),
        "sinks": lambda: SinkWrapper(room, "HND", backend="fa2", head_dim_qk=64, head_dim_vo=64),
    }  # fmt: skip

    def build(name: str, make: Callable[[], Any]) -> None:
        begin = time.time()
        try:
            make()
            print(f"built {name} in {time.time() - begin:.0f} s", flush=True)
        except Exception as error:
            print(f"{name} failed after {time.time() - begin:.0f} s: {str(error)[:500]}", flush=True)

    threads = [Thread(target=build, args=item) for item in builds.items()]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "flashinfer": version("flashinfer-python"), "copy_TB_per_s": round(copy_bandwidth() / 1e12, 3), "rows": [],
    }  # fmt: skip

    def save() -> None:
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    rows = [row for row in ROWS if options.only in row[2]]
    if any(row[2] != "flashinfer.gdn" for row in rows):
        prebuild()
    for row in rows:
        found["rows"].append(measure(row))
        print(json.dumps(found["rows"][-1]), flush=True)
        save()
    if not options.only:
        try:
            found["thirty steps through torch.compile"] = end_to_end()
        except Exception:
            found["thirty steps through torch.compile"] = traceback.format_exc()[-1500:]
        print(found["thirty steps through torch.compile"], flush=True)
        save()


if __name__ == "__main__":
    os.environ.setdefault("MAX_JOBS", "6")
    main()
