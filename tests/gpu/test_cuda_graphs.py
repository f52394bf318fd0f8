"""Decode steps as CUDA graphs on a GPU: one launch, no weight or cache copied, eager's tokens; skipped elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile.cuda_graphs.recording import MAX_MOVES, MAX_NUMBERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMMON: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, num_key_value_heads=4,
    head_dim=16, first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
    moe_intermediate_size=64,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32),
    "qwen3_next": dict(**EXPERTS, num_hidden_layers=4, shared_expert_intermediate_size=64, linear_num_key_heads=2,
                       linear_num_value_heads=4),
    "deepseek_v3": LATENT,
    "qwen3_moe": EXPERTS,
    "gemma3_text": dict(num_hidden_layers=3, sliding_window=32, sliding_window_pattern=3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def build(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **FAMILIES[name]})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1 or not torch.isfinite(parameter).all():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend=sm12x_compile.sm12x, options=options)


def trace(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The profiler's events of one call."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def calls(events: list[dict[str, Any]], name: str) -> int:
    return sum(e.get("cat") == "cuda_runtime" and e["name"].startswith(name) for e in events)


def copied_bytes(events: list[dict[str, Any]]) -> int:
    return sum(int(e["args"].get("bytes", 0)) for e in events if e.get("cat") == "gpu_memcpy")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_step_is_one_graph(name: str) -> None:
    """Across the sliding window as well: 24 tokens are filled, the window is 32, 64 steps follow."""
    transformers = pytest.importorskip("transformers")
    model = build(name)
    prompt = torch.randint(3, 256, (1, 24), device="cuda")

    def start() -> Any:
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        return cache

    def step(forward: Any, cache: Any, token: Tensor) -> Tensor:
        logits: Tensor = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits

    def state(cache: Any) -> list[Any]:
        """The numbers and tensors that a cache holds, layer by layer."""
        held = [leaf for layer in cache.layers for leaf in torch.utils._pytree.tree_leaves(vars(layer))]
        return [x for x in held if isinstance(x, (Tensor, int))]

    theirs, ours = start(), start()
    token = prompt[:, -1:].clone(memory_format=torch.contiguous_format)
    with sm12x_compile.collect() as report:
        fast = compiled(model)
        expected, kept = [], []
        for _ in range(64):
            expected.append(step(model, theirs, token))
            kept.append(step(fast, ours, token))
            token = expected[-1].argmax(-1)
    for want, got in zip(expected, kept, strict=True):  # kept: results of earlier steps are not overwritten
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        best = want.topk(2).values
        if float(best[..., 0] - best[..., 1]) > 5e-3:
            assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(state(ours), state(theirs), atol=2e-3, rtol=2e-3)
    assert report.graphs == 1, report.recompiles
    assert report.cuda_graph == (True, None), str(report)
    assert not report.syncs
    non_static = torch._dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    events = trace(lambda: step(fast, ours, token))
    assert calls(events, "cudaGraphLaunch") == 1
    around = {n: calls(events, n) for n in ("cudaLaunchKernel", "cudaMemcpy", "cudaMemset")}
    assert sum(around.values()) <= 4, f"token ids, at most two positions, and the logits: {around}"
    assert copied_bytes(events) <= 2 * kept[0].numel() * kept[0].element_size(), "no weight and no cache is copied"
    assert non_static <= 2 * report.graphs, "the token ids, nothing else"


def test_results_of_earlier_calls_stay() -> None:
    """Kept after the recording is in use, when CUDA graph trees overwrite silently; views and shared memory too."""
    layer = torch.nn.Linear(64, 64, device="cuda")

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = layer(x).relu()
        return y, y[1:], (y * 2).T

    fast = compiled(function)
    for _ in range(6):
        fast(torch.randn(4, 64, device="cuda"))
    inputs = [torch.randn(4, 64, device="cuda") for _ in range(5)]
    results = [fast(x) for x in inputs]
    for x, (whole, part, scaled) in zip(inputs, results, strict=True):
        want = function(x)
        torch.testing.assert_close((whole, part, scaled), want, atol=1e-3, rtol=1e-3)
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert scaled.stride() == want[2].stride()


def test_a_custom_op_that_waits_is_not_recorded() -> None:
    """It fails in a capture, and no graph of the process could be recorded after that."""

    @torch.library.custom_op("sm12x_test::waits", mutates_args=())
    def waits(x: Tensor) -> Tensor:
        return x + x.sum().item()

    waits.register_fake(torch.empty_like)
    layer = torch.nn.Linear(64, 64, device="cuda")
    x = torch.randn(4, 64, device="cuda")
    with sm12x_compile.collect() as report:
        fast = compiled(lambda x: waits(layer(x)) * 2)
        for _ in range(8):
            torch.testing.assert_close(fast(x), waits(layer(x)) * 2, atol=1e-2, rtol=1e-3)
    recorded, reason = report.cuda_graph
    assert not recorded and reason is not None and "waits for the GPU" in reason and "test_cuda_graphs.py" in reason
    with sm12x_compile.collect() as report:
        other = compiled(lambda x: layer(x) * 3)
        for _ in range(6):
            torch.testing.assert_close(other(x), layer(x) * 3, atol=1e-3, rtol=1e-3)
    assert report.cuda_graph == (True, None)
    assert calls(trace(lambda: other(x)), "cudaGraphLaunch") == 1


def write_and_read(x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
    cache.index_copy_(0, position.view(1), x)
    return cache.sum(0) + x


def test_a_cache_of_ones_own_is_not_copied() -> None:
    """Inductor alone records nothing that writes such an argument."""
    ours, theirs = torch.zeros(4096, 512, device="cuda"), torch.zeros(4096, 512, device="cuda")
    with sm12x_compile.collect() as report:
        fast = compiled(write_and_read)
        for k in range(12):
            x, position = torch.randn(1, 512, device="cuda"), torch.tensor(k, device="cuda")
            want = write_and_read(x, theirs, position)
            torch.testing.assert_close(fast(x, ours, position), want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours, theirs)
    assert report.cuda_graph == (True, None)
    events = trace(lambda: fast(x, ours, position))
    assert calls(events, "cudaGraphLaunch") == 1 and copied_bytes(events) < 1 << 16


def test_a_cache_that_moves() -> None:
    """Right for every cache, and recorded no more than a few times."""
    with sm12x_compile.collect() as report:
        fast = compiled(write_and_read)
        caches = [torch.zeros(64, 512, device="cuda") for _ in range(2 * MAX_MOVES + 4)]
        for k, cache in enumerate([*caches, *caches[:2]]):
            other = cache.clone()
            x, position = torch.randn(1, 512, device="cuda"), torch.tensor(k % 64, device="cuda")
            want = write_and_read(x, other, position)
            torch.testing.assert_close(fast(x, cache, position), want, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(cache, other)
    recorded, reason = report.cuda_graph
    assert not recorded and reason is not None and "lies elsewhere from call to call" in reason


def test_two_caches_in_turn() -> None:
    caches = [torch.zeros(64, 512, device="cuda") for _ in range(2)]
    others = [c.clone() for c in caches]
    with sm12x_compile.collect() as report:
        fast = compiled(write_and_read)
        for k in range(24):
            x, position, which = torch.randn(1, 512, device="cuda"), torch.tensor(k, device="cuda"), k // 4 % 2
            want = write_and_read(x, others[which], position)
            torch.testing.assert_close(fast(x, caches[which], position), want, atol=1e-3, rtol=1e-3)
    assert report.cuda_graph == (True, None)
    assert calls(trace(lambda: fast(x, caches[0], position)), "cudaGraphLaunch") == 1


def test_a_position_on_the_host() -> None:
    """A 0-d tensor on the CPU is copied before the launch; an int is filled in."""
    table = torch.randn(64, 512, device="cuda")

    def by_tensor(x: Tensor, position: Tensor) -> Tensor:
        return x + position * table.sum(0)

    def by_int(x: Tensor, position: int) -> Tensor:
        rows = torch.arange(64, device="cuda")
        return x + torch.where(rows <= position, 1.0, 0.0) @ table

    for function, kind in ((by_tensor, torch.tensor), (by_int, int)):
        torch._dynamo.reset()
        with sm12x_compile.collect() as report:
            fast = compiled(function)
            for k in range(3, 20):
                x = torch.randn(512, device="cuda")
                torch.testing.assert_close(fast(x, kind(k)), function(x, kind(k)), atol=1e-2, rtol=1e-3)
        assert report.cuda_graphs[-1] == (True, None), str(report)
        assert calls(trace(lambda: fast(x, kind(21))), "cudaGraphLaunch") == 1  # noqa: B023


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def prompts() -> Iterator[tuple[Tensor, ...]]:
    for length in range(16, 16 + 3 * MAX_NUMBERS):
        yield tuple(torch.randn(1, 2, length, 64, device="cuda") for _ in range(3))


def test_sizes_that_change_are_not_recorded() -> None:
    with sm12x_compile.collect() as report:
        fast = compiled(attend)
        for given in prompts():
            torch.testing.assert_close(fast(*given), attend(*given), atol=1e-2, rtol=1e-2)
    assert report.cuda_graphs[0] == (True, None)  # one length, as long as there was one
    recorded, reason = report.cuda_graphs[1]
    assert not recorded and reason is not None and "each size would be a recording of its own" in reason
    assert calls(trace(lambda: fast(*given)), "cudaGraphLaunch") == 0


def test_sizes_that_change_are_recorded_a_few_times_if_asked() -> None:
    with pytest.warns(UserWarning, match="a number that it is given changes"), sm12x_compile.collect() as report:
        fast = compiled(attend, cuda_graphs=True)
        lengths = list(prompts())
        for given in (*lengths, lengths[1]):
            torch.testing.assert_close(fast(*given), attend(*given), atol=1e-2, rtol=1e-2)
    assert not report.cuda_graph[0]
    assert calls(trace(lambda: fast(*lengths[-1])), "cudaGraphLaunch") == 0


def test_nothing_is_left_behind() -> None:
    from torch._inductor import compile_fx, config, cudagraph_utils

    before = (compile_fx.cudagraphify, config.triton.cudagraphs, list(cudagraph_utils.cudagraphs_log.handlers))
    fast = compiled(attend)
    given = next(prompts())
    for _ in range(5):
        fast(*given)
    assert (compile_fx.cudagraphify, config.triton.cudagraphs, list(cudagraph_utils.cudagraphs_log.handlers)) == before
    assert torch.cuda.get_sync_debug_mode() == 0


def test_turned_off() -> None:
    with sm12x_compile.collect() as report:
        fast = compiled(attend, cuda_graphs=False)
        given = next(prompts())
        for _ in range(5):
            fast(*given)
    assert report.cuda_graph == (False, "cuda_graphs=False")
    assert calls(trace(lambda: fast(*given)), "cudaGraphLaunch") == 0


def test_a_recording_in_parts_names_what_is_between() -> None:
    def function(x: Tensor) -> Tensor:
        y = (x @ x.mT).softmax(-1)
        return (y.cpu() + 1).cuda() @ x

    with sm12x_compile.collect() as report:
        fast = compiled(function)
        for _ in range(6):
            x = torch.randn(64, 64, device="cuda")
            torch.testing.assert_close(fast(x), function(x), atol=1e-2, rtol=1e-2)
    assert report.syncs and "test_cuda_graphs.py" in report.syncs[0]
    assert report.cuda_graph[1] is not None and report.syncs[0] in report.cuda_graph[1]
