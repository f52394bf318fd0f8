"""Compile time and run time on the CPU: ours against Inductor's, for a 12-layer llama, in one run.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time-cpu.json

Every measurement is a process of its own with Inductor's caches off; contenders take turns, and the figure is
the least of the rounds (other work on the machine only adds).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch


def measure(contender: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2000,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(0, 2000, (1, 256))
    if contender == "sm12x":
        from sm12x_compile import collect, sm12x

        backend: Any = sm12x
    else:
        from contextlib import nullcontext as collect

        backend = "inductor"
    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend)
        start, cpu = time.perf_counter(), time.process_time()
        with collect() as report:
            compiled(input_ids=ids, use_cache=False)
        compile_s, compile_cpu_s = time.perf_counter() - start, time.process_time() - cpu
        times = []
        for _ in range(20):
            start = time.perf_counter()
            compiled(input_ids=ids, use_cache=False)
            times.append(time.perf_counter() - start)
    stages = {k: round(v, 2) for k, v in report.seconds.items()} if report else {}
    return {
        "compile_s": round(compile_s, 2), "compile_cpu_s": round(compile_cpu_s, 2),
        "run_ms": round(sorted(times)[len(times) // 2] * 1e3, 2), "stages": stages,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="compile_time.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help="measure one contender in this process")
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(measure(given.one)))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(given.rounds):
        for contender in ("inductor", "sm12x"):
            done = subprocess.run([sys.executable, __file__, "--one", contender], capture_output=True, text=True)
            lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(done.stderr)
            rows.append({"contender": contender, **json.loads(lines[-1])})
            print(rows[-1], flush=True)
    least = {
        name: {key: min(r[key] for r in rows if r["contender"] == name) for key in ("compile_s", "run_ms")}
        for name in ("inductor", "sm12x")
    }
    ratios = {key: round(least["sm12x"][key] / least["inductor"][key], 3) for key in ("compile_s", "run_ms")}
    print(least, "sm12x / inductor:", ratios)
    with open(given.out, "w") as file:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        json.dump({"device": "cpu", "versions": versions, "rows": rows, "ratio": ratios}, file, indent=1)


if __name__ == "__main__":
    main()
