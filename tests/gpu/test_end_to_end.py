"""Compiled models on a GPU, through Inductor and CUDA graphs, against eager; skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sm12x_compile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMMON: dict[str, Any] = dict(
    vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=32),
    "gemma2": dict(sliding_window=32, query_pre_attn_scalar=64),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32),
    "deepseek_v3": dict(q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48,
                        first_k_dense_replace=2, num_key_value_heads=4, head_dim=16),
}  # fmt: skip
LATENT = ("deepseek_v3",)


def build(name: str, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **MODELS[name]})
    with torch.device("cuda"):
        # `batched_mm`: the grouped one has no fp64, and synchronises with the host in fp32.
        experts = {"experts_implementation": "batched_mm"} if "num_local_experts" in MODELS[name] else {}
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", **experts
        )
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all() or parameter.std() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().to(dtype)


def bound(eager: torch.Tensor, exact: torch.Tensor) -> float:
    """Twice the error that eager makes in the same dtype, against fp64."""
    return 2.0 * float((eager.double() - exact).abs().max()) + 1e-6


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_prefill(name: str, dtype: torch.dtype, cuda_graphs: bool) -> None:
    torch._dynamo.reset()
    model, exact = build(name, dtype), build(name, torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    for length in (65, 1000):
        ids = torch.randint(3, 256, (2, length), device="cuda")
        with torch.inference_mode(), sm12x_compile.collect() as report:
            compiled = torch.compile(
                model, backend=sm12x_compile.sm12x, dynamic=False, options={"cuda_graphs": cuda_graphs}
            )
            for _ in range(5):  # a recording is replayed from the fourth call on
                found = compiled(input_ids=ids, use_cache=False).logits
            eager = model(input_ids=ids, use_cache=False).logits
            truth = exact(input_ids=ids, use_cache=False).logits
        assert report.count("mla" if name in LATENT else "attention") == 2, str(report)
        assert float((found.double() - truth).abs().max()) <= bound(eager, truth)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("name", "batch"), [*((name, 2) for name in MODELS), ("deepseek_v3", 1)])
def test_static_decode(name: str, batch: int, cuda_graphs: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    model, exact = build(name, torch.bfloat16), build(name, torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = torch.randint(3, 256, (batch, 80), device="cuda")
    kernel = "triton.decode"
    if name in LATENT:
        kernel = "triton.mla_absorbed" if batch == 1 else "absorbed + triton.mla_decode"

    def run(forward: Any, eager: Any) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=256)
        eager(input_ids=ids[:, :60], past_key_values=cache, use_cache=True)
        outs = []
        for t in range(60, 80):
            token = ids[:, t : t + 1].clone()
            outs.append(forward(input_ids=token, past_key_values=cache, use_cache=True).logits)
        return torch.cat(outs, 1)

    with torch.inference_mode(), sm12x_compile.collect() as report:
        compiled = torch.compile(model, backend=sm12x_compile.sm12x,
                                 options={"cuda_graphs": cuda_graphs, "select": "static"})  # fmt: skip
        found = run(compiled, model)
        eager, truth = run(model, model), run(exact, exact)
    assert not report.near_misses, str(report)
    assert any(s.kernel == kernel for s in report.sites), str(report)
    assert float((found.double() - truth).abs().max()) <= bound(eager, truth)
    assert not [w for w in report.warnings if "left as it is" in w]


@pytest.mark.parametrize("S", [1, 7, 100])
def test_kernels_return_the_strides_that_their_fake_promises(S: int) -> None:
    """Inductor asserts them; a view after the op hangs on them."""
    from sm12x_compile.arch import of_device
    from sm12x_compile.ops import OPS
    from sm12x_compile.registry import Call, kernels

    q = torch.randn(2, 4, S, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 100, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = torch.ops.sm12x.attention(q.to("meta"), k.to("meta"), v.to("meta"), 0.1)
    bound = OPS["attention"].signature.bind(q, k, v, 0.1)
    bound.apply_defaults()
    call = Call("attention", dict(bound.arguments))
    for kernel in kernels("attention"):
        if kernel.overload is not None and kernel.accepts(call, of_device()):
            found = kernel.overload(q, k, v, 0.1)
            assert found.stride() == expected.stride(), kernel.name
            torch.testing.assert_close(found, torch.ops.sm12x.attention(q, k, v, 0.1), atol=2e-2, rtol=2e-2)
