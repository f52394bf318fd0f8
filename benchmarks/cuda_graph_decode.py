"""Whole decode steps over a StaticCache on a GPU: ours, eager, Inductor's ``mode="reduce-overhead"``, in one run.

    python benchmarks/cuda_graph_decode.py --out benchmarks/results/cuda_graph_decode-h200.json

Real layer dimensions, few layers, random bf16 weights, batch 1, 2,048 tokens in the cache (8,128 for ``deepseek_8k``).
Every contender has a process of its own; they compile side by side and are timed one at a time. Per contender:

* ``ms``: median of a step by CUDA events, the GPU idle before it, so that the host's work counts as well;
* ``stream_ms``: a step when 20 are launched without waiting;
* ``device_ms``, ``launches``, ``kernels``: from a profile of one step: time of its kernels, calls of the CUDA runtime;
* ``relative_difference_to_eager``: norm of the logits' difference over 8 steps with the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import IO, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

CONTENDERS = ("eager", "reduce-overhead", "sm12x")
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gpt_oss": ("gpt_oss", dict(num_hidden_layers=4, num_local_experts=32, vocab_size=32000), 2048, 4096),
    "llama": (
        "llama",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192), 2048, 4096,
    ),
    "qwen3_next": (
        "qwen3_next",
        dict(num_hidden_layers=4, hidden_size=2048, vocab_size=32000, num_experts=128, num_experts_per_tok=10,
             moe_intermediate_size=512, shared_expert_intermediate_size=512), 2048, 4096,
    ),
    "deepseek_v3": (
        "deepseek_v3",
        dict(num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=64, n_group=4, topk_group=2,
             vocab_size=32000), 2048, 4096,
    ),
    "deepseek_8k": (
        "deepseek_v3",
        dict(hidden_size=7168, num_attention_heads=128, num_key_value_heads=128, intermediate_size=18432,
             num_hidden_layers=2, first_k_dense_replace=2, vocab_size=32000, q_lora_rank=1536, kv_lora_rank=512,
             qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=65536), 8000, 8192,
    ),
}  # fmt: skip
CHECKED, WARM, TIMED, STREAMED = 8, 4, 25, 20


def compiled(model: Any, contender: str) -> Callable[..., Any]:
    if contender == "eager":
        return model  # type: ignore[no-any-return]
    if contender == "reduce-overhead":
        return torch.compile(model, mode="reduce-overhead")
    import sm12x_compile

    return torch.compile(model, backend=sm12x_compile.sm12x)


def build(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        settings = AutoConfig.for_model(family, **config)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all() or (parameter.std() == 0 and parameter.dim() > 1):
            torch.nn.init.normal_(parameter, std=0.02)  # some experts are left uninitialised
    return model


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Launches and kernels of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    spans = []
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name.startswith("## Call"):
                continue
            kernels[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name.startswith("cuda") and ("Launch" in event.name or "Mem" in event.name):
            launches[event.name] += 1
    return {
        "device_ms": sum(times.values()) / 1e3,
        "span_ms": (max(e for _, e in spans) - min(s for s, _ in spans)) / 1e3,
        "launches": dict(launches),
        "kernels": [[name[:90], kernels[name], round(us, 1)] for name, us in times.most_common(40)],
    }


def measure(name: str, contender: str, ready: Callable[[], None]) -> dict[str, Any]:
    from transformers import StaticCache

    _, _, filled, slots = MODELS[name]
    model = build(name)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, filled + CHECKED), device="cuda")
    result: dict[str, Any] = {}
    with torch.inference_mode():

        def prepared() -> Any:
            cache = StaticCache(config=model.config, max_cache_len=slots)
            for part in ids[:, :filled].split(2048, 1):  # a long prompt at once would not fit beside the others
                model(input_ids=part, past_key_values=cache, use_cache=True)
            return cache

        def run(forward: Callable[..., Any], cache: Any, token: torch.Tensor) -> torch.Tensor:
            if contender == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            logits: torch.Tensor = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
            return logits.clone() if contender == "reduce-overhead" else logits

        theirs, ours = prepared(), prepared()
        tokens = [ids[:, t : t + 1].clone() for t in range(filled, filled + CHECKED)]
        step = compiled(model, contender)
        expected = torch.cat([run(model, theirs, token) for token in tokens])
        found = torch.cat([run(step, ours, token) for token in tokens])
        difference = (found.double() - expected.double()).norm() / expected.double().norm()
        result["relative_difference_to_eager"] = float(difference)
        one = tokens[0]
        for _ in range(WARM):
            run(step, ours, one)
        torch.cuda.synchronize()
        ready()
        times = []
        for _ in range(TIMED):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(step, ours, one)
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        result["ms"] = sorted(times)[len(times) // 2]
        start.record()
        for _ in range(STREAMED):
            run(step, ours, one)
        stop.record()
        torch.cuda.synchronize()
        result["stream_ms"] = start.elapsed_time(stop) / STREAMED
        result |= profiled(lambda: run(step, ours, one))
        result["weights_gb"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return result


def child(name: str, contender: str) -> None:
    def ready() -> None:
        print("READY", flush=True)
        sys.stdin.readline()

    print("RESULT " + json.dumps(measure(name, contender, ready)), flush=True)


def warm(process: subprocess.Popen[str]) -> bool:
    """Wait until a contender is ready to be timed; False if it ended before."""
    assert process.stdout
    return any(line.startswith("READY") for line in process.stdout)


def go(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Let a warm contender measure alone, and read what it found."""
    output, _ = process.communicate("\n")
    lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1]) if lines else None


def start(model: str, contender: str, errors: IO[str]) -> tuple[subprocess.Popen[str], IO[str]]:
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "3"}  # contenders compile side by side
    process = subprocess.Popen(
        [sys.executable, __file__, "--one", model, contender],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
    )  # fmt: skip
    return process, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="cuda_graph_decode.json")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CONTENDER"), help="measure one contender in this process")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    given = parser.parse_args()
    if given.one:
        child(*given.one)
        return
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        processes = {
            (model, contender): start(model, contender, stack.enter_context(tempfile.TemporaryFile("w+")))
            for model in given.models
            for contender in CONTENDERS
        }
        is_warm = {name: warm(process) for name, (process, _) in processes.items()}
        for (model, contender), (process, errors) in processes.items():
            result = go(process) if is_warm[model, contender] else None
            if result is None:
                process.wait()
                errors.seek(0)
                result = {"failed": errors.read().strip()[-600:]}
            rows.append({"model": model, "contender": contender, **result})
            print({k: v for k, v in rows[-1].items() if k != "kernels"}, flush=True)
    import transformers

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with open(given.out, "w") as file:
        json.dump({"device": device, "versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
