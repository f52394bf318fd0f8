"""Four layers with Qwen3-Next's dimensions (three of them linear attention) on a GPU: ours, eager, Inductor.

    python benchmarks/qwen3_next_layers.py [--out benchmarks/results/qwen3_next_layers-h200.json]

First call of a prompt of 2,048 tokens (tracing, compiling, kernels; all caches cold) and the same prompt again; a
decode step behind it over a StaticCache, as a CUDA graph on both sides. Every contender has a process of its own.
Random weights in bf16, batch 1. Times of runs are medians of CUDA events. Errors are relative, of all logits, against
the same weights in fp32: in bf16 some tokens go to other experts, whoever computes, so that contenders differ from
each other as much as from the truth.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _timing import median_ms

CONTENDERS = ("eager", "sm12x", "inductor")
TOKENS, SLOTS, LIMIT_S = 2048, 4096, 240
CONFIG: dict[str, Any] = dict(
    num_hidden_layers=4, hidden_size=2048, vocab_size=32000, num_experts=128, num_experts_per_tok=10,
    moe_intermediate_size=512, shared_expert_intermediate_size=512,
)  # fmt: skip


def first(step: Callable[[], Any]) -> float:
    """Seconds of the first call, compilation included."""
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return round(time.perf_counter() - begin, 1)


def compiled(model: Any, contender: str, graphs: bool) -> Any:
    if contender == "eager":
        return model
    if contender == "inductor":
        return torch.compile(model, mode="reduce-overhead" if graphs else None)
    import sm12x_compile

    return torch.compile(model, backend=sm12x_compile.sm12x, options={"cuda_graphs": graphs})


def measure(contender: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    collect: Any = nullcontext
    if contender == "sm12x":
        from sm12x_compile import collect
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = AutoConfig.for_model("qwen3_next", **CONFIG)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 32000, (1, TOKENS + 1), device="cuda")
    prompt, token = ids[:, :TOKENS], ids[:, TOKENS:]
    row: dict[str, Any] = {"contender": contender}

    def error(found: torch.Tensor, truth: torch.Tensor) -> float:
        return float((found.float() - truth).norm() / truth.norm())

    wide = copy.deepcopy(model).float()
    wide.set_experts_implementation("eager")
    with torch.inference_mode():
        truth = wide(input_ids=ids, use_cache=False).logits
    del wide

    with torch.inference_mode(), collect() as report:
        prefill = compiled(model, contender, graphs=False)

        def whole() -> torch.Tensor:
            return prefill(input_ids=prompt, use_cache=False).logits

        row["prefill_first_s"] = first(whole)
        row["prefill_ms"] = round(median_ms(whole, repeats=15), 3)
        row["prefill_error"] = error(whole(), truth[:, :TOKENS])

        cache = StaticCache(config=model.config, max_cache_len=SLOTS)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        decode = compiled(model, contender, graphs=True)

        def step() -> torch.Tensor:
            if contender != "eager":
                torch.compiler.cudagraph_mark_step_begin()
            return decode(input_ids=token, past_key_values=cache, use_cache=True).logits

        found: list[torch.Tensor] = []
        row["decode_first_s"] = first(lambda: found.append(step().clone()))
        row["decode_error"] = error(found[0], truth[:, TOKENS:])
        row["decode_ms"] = round(median_ms(step, repeats=15), 3)
    if report is not None:
        row["graphs"], row["warnings"] = report.graphs, report.warnings
        row["seconds"] = {stage: round(seconds, 2) for stage, seconds in report.seconds.items()}
        row["kernels"] = sorted({f"{site.pattern}: {site.kernel}" for site in report.rewritten})
    return row


def in_its_own_process(contender: str) -> dict[str, Any]:
    """A contender's row; caches of compiled code are empty."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--one", contender]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **caches}
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"contender": contender, "failed": f"not done after {LIMIT_S} s"}
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1]) if lines else {"contender": contender, "failed": done.stderr.strip()[-1500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--contenders", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help="measure one contender in this process")
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(measure(given.one)))
        return
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": []}
    for contender in given.contenders:
        report["rows"].append(in_its_own_process(contender))
        print(json.dumps(report["rows"][-1]), flush=True)
        if given.out:
            with open(given.out, "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
