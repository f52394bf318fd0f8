"""The gated delta rule on a CPU: our op against Hugging Face's reference function, in eager mode and under Inductor.

    python benchmarks/gated_delta_rule_cpu.py [--out results.json]

Each case times a prompt (or one token) of one layer's recurrence, without projections. Inductor's compile time is that
of the first call. One process a contender would be stricter; here Dynamo is reset in between. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sm12x_compile


def operands(tokens: int, channels: bool, state: bool) -> dict[str, Any]:
    """Operands with the head dimensions of Qwen3-Next and Kimi Linear (K = V = 128), four heads."""
    generator = torch.Generator().manual_seed(0)
    H, K = 4, 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = {
        "query": normal(1, tokens, H, K), "key": normal(1, tokens, H, K), "value": normal(1, tokens, H, K),
        "g": -normal(1, tokens, H, *((K,) if channels else ())).abs(), "beta": normal(1, tokens, H).sigmoid(),
    }  # fmt: skip
    return {**made, "initial_state": normal(1, H, K, K) if state else None}


def median_ms(run: Callable[[], Any], seconds: float = 1.5) -> float:
    run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 200):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def compiled(function: Callable[..., Any], given: dict[str, Any], backend: Any) -> tuple[float, float]:
    """Seconds of the first call, and milliseconds of the later ones."""
    torch._dynamo.reset()

    def call(**tensors: Any) -> Any:
        return function(**tensors, output_final_state=True, use_qk_l2norm_in_kernel=True)

    fast = torch.compile(call, backend=backend, dynamic=False)
    started = time.perf_counter()
    fast(**given)
    first = time.perf_counter() - started
    return first, median_ms(lambda: fast(**given))


def case(name: str, function: Callable[..., Any], tokens: int, channels: bool, inductor: bool) -> dict[str, Any]:
    given = operands(tokens, channels, state=tokens == 1)
    eager = median_ms(lambda: function(**given, output_final_state=True, use_qk_l2norm_in_kernel=True))
    first, ours = compiled(function, given, sm12x_compile.sm12x)
    row = {"case": name, "tokens": tokens, "hf_eager_ms": eager, "ours_ms": ours, "ours_first_call_s": first}
    if inductor:
        first, theirs = compiled(function, given, "inductor")
        row |= {"hf_inductor_ms": theirs, "hf_inductor_first_call_s": first}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--no-inductor", action="store_true")
    options = parser.parse_args()
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    rows = []
    with torch.no_grad():
        for tokens in (1, *options.tokens):
            step = tokens == 1
            gdn = qwen.torch_recurrent_gated_delta_rule if step else qwen.torch_chunk_gated_delta_rule
            kda = kimi.recurrent_kimi_delta_attention if step else kimi.chunk_kimi_delta_attention
            for name, function, channels in (("decay per head", gdn, False), ("decay per channel", kda, True)):
                # Inductor needs minutes for the unrolled loops of a long prompt.
                rows.append(case(name, function, tokens, channels, not options.no_inductor and tokens <= 128))
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(), "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
