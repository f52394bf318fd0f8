"""Attention inside compiled models, on a GPU: ours, eager, Inductor, in one run; every contender in its own process.

    python benchmarks/attention_models.py --out benchmarks/results/attention_models-h200.json

Cases: gpt-oss attention with sinks at 4,096 tokens; a StaticCache decode with 2,048 of 32,768 slots filled, beside
the same decode with a cache of 2,048 slots; whole decode steps of a llama and of two dense layers with DeepSeek-V3's
dimensions at 8,064 tokens. Times are medians of CUDA events; decode runs as a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _timing import median_ms

CONTENDERS = ("eager", "inductor", "sm12x")
CASES = ("sinks_prefill_4096", "cache_2048_of_32768", "cache_2048_of_2048", "llama_decode", "deepseek_decode")


def compiled(function: Callable[..., Any], contender: str) -> Callable[..., Any]:
    if contender == "eager":
        return function
    if contender == "inductor":
        return torch.compile(function, mode="reduce-overhead")
    import sm12x_compile

    return torch.compile(function, backend=sm12x_compile.sm12x, options={"cuda_graphs": True})


def gpt_oss_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """As Hugging Face writes it: repeated heads, a float mask, sinks as a column, softmax in bf16."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    t = torch.arange(k.shape[2], device=q.device)
    low = torch.full((), torch.finfo(q.dtype).min, device=q.device, dtype=q.dtype)
    mask = torch.where(t[None] <= t[:, None], torch.zeros_like(low), low)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = torch.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def sinks_prefill(contender: str) -> dict[str, Any]:
    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator("cuda").manual_seed(seed)
        shapes = ((1, 64, 4096, 64), (1, 8, 4096, 64), (1, 8, 4096, 64), (64,))
        return tuple(torch.randn(s, generator=g, device="cuda", dtype=torch.bfloat16) for s in shapes)

    sets = [inputs(s) for s in range(4)]
    function = compiled(gpt_oss_attention, contender)
    reference = gpt_oss_attention(*(x.double() for x in sets[0]))
    error = (function(*sets[0]).double() - reference).norm() / reference.norm()
    del reference
    turn = iter(range(10**9))
    return {"ms": median_ms(lambda: function(*sets[next(turn) % 4])), "relative_error": float(error)}


def static_cache_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, filled: torch.Tensor
) -> torch.Tensor:
    """The attention of one decode step over a StaticCache, as Hugging Face writes it: write the new key and value,
    mask by the filled length, repeat the heads of the whole cache, SDPA."""
    position = torch.arange(1, device=q.device) + filled
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    mask = (torch.arange(keys.shape[2], device=q.device) <= position[:, None])[None, None]
    B, heads, T, D = keys.shape
    groups = q.shape[1] // heads
    full_k = keys[:, :, None].expand(B, heads, groups, T, D).reshape(B, heads * groups, T, D)
    full_v = values[:, :, None].expand(B, heads, groups, T, D).reshape(B, heads * groups, T, D)
    out = torch.nn.functional.scaled_dot_product_attention(q, full_k, full_v, attn_mask=mask)
    return out.transpose(1, 2).reshape(B, 1, -1)


def static_cache(contender: str, slots: int) -> dict[str, Any]:
    """Attention alone, 2,047 slots filled; four caches in turn, so that a step does not find its cache in the L2."""

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

        keys, values = draw(1, 8, slots, 128), draw(1, 8, slots, 128)
        for cache in (keys, values):
            torch._dynamo.mark_static_address(cache)
        filled = torch.tensor(2047, device="cuda")
        return draw(1, 32, 1, 128), draw(1, 8, 1, 128), draw(1, 8, 1, 128), keys, values, filled

    def layers(*sets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([static_cache_step(*s) for s in sets])

    sets = [inputs(s) for s in range(4)]
    expected = layers(*[tuple(x.double() if x.is_floating_point() else x.clone() for x in s) for s in sets])
    step = compiled(layers, contender)
    found = step(*sets).clone()
    error = float((found.double() - expected).norm() / expected.norm())
    del expected
    return {"ms": median_ms(lambda: step(*sets)) / 4, "relative_error": error}


LLAMA: dict[str, Any] = dict(
    hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    num_hidden_layers=8, vocab_size=32000, max_position_embeddings=65536,
)  # fmt: skip
DEEPSEEK: dict[str, Any] = dict(
    hidden_size=7168, num_attention_heads=128, num_key_value_heads=128, intermediate_size=18432,
    num_hidden_layers=2, first_k_dense_replace=2, vocab_size=32000, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=65536,
)  # fmt: skip


def decode(contender: str, name: str, slots: int, filled: int, config: dict[str, Any]) -> dict[str, Any]:
    """One decode step of a Hugging Face model over a StaticCache."""
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    torch.manual_seed(0)
    with torch.device("cuda"):
        settings = AutoConfig.for_model(name, **config)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 1000, (1, filled), device="cuda")
    with torch.inference_mode():

        def prepared() -> Any:
            cache = StaticCache(config=model.config, max_cache_len=slots)
            model(input_ids=ids[:, : filled - 64], past_key_values=cache, use_cache=True)
            return cache

        step = compiled(model, contender)

        def run(cache: Any, forward: Callable[..., Any], token: int) -> torch.Tensor:
            if contender != "eager":
                torch.compiler.cudagraph_mark_step_begin()
            one = ids[:, token : token + 1].clone()
            return forward(input_ids=one, past_key_values=cache, use_cache=True).logits.clone()

        theirs, ours = prepared(), prepared()
        expected = torch.cat([model(input_ids=ids[:, t : t + 1], past_key_values=theirs, use_cache=True).logits
                              for t in range(filled - 64, filled - 56)])  # fmt: skip
        found = torch.cat([run(ours, step, t) for t in range(filled - 64, filled - 56)])
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        return {"ms": median_ms(lambda: run(ours, step, 0)), "relative_difference_to_eager": float(error)}


def measure(case: str, contender: str) -> dict[str, Any]:
    with torch.inference_mode():
        if case == "sinks_prefill_4096":
            return sinks_prefill(contender)
        if case.startswith("cache_"):
            return static_cache(contender, int(case.split("_")[-1]))
    if case == "deepseek_decode":
        return decode(contender, "deepseek_v3", 8192, 8128, DEEPSEEK)
    return decode(contender, "llama", 1024, 512, LLAMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="attention_models.json")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTENDER"), help="measure one contender in this process")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(measure(*given.one)))
        return
    rows: list[dict[str, Any]] = []
    for case in given.cases:
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--one", case, contender]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            result = json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-600:]}
            rows.append({"case": case, "contender": contender, **result})
            print(rows[-1], flush=True)
    import transformers

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with open(given.out, "w") as file:
        json.dump({"device": device, "versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
