"""Tiny mixtures of experts and other decoders, and the calls of each phase."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

VOCAB = 128
Phase = Literal["prompt", "dynamic", "static"]

_BASE: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2, num_experts_per_tok=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
_LINEAR: dict[str, Any] = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
_SMALL = dict(moe_intermediate_size=16, num_experts=4)


@dataclass(frozen=True)
class Mixture:
    """A family: the config's name, its fields, and those of `_BASE` that it does not have."""

    name: str
    config: dict[str, Any]
    without: tuple[str, ...] = ()


FAMILIES: dict[str, Mixture] = {
    m.name: m
    for m in (
        Mixture("mixtral", dict(num_local_experts=4)),
        Mixture("qwen2_moe", dict(**_SMALL, shared_expert_intermediate_size=16)),
        Mixture("qwen3_moe", dict(**_SMALL, norm_topk_prob=True)),
        Mixture("olmoe", dict(num_experts=4)),
        Mixture("phimoe", dict(num_local_experts=4)),
        Mixture("granitemoe", dict(num_local_experts=4)),
        Mixture("minimax_m2", dict(num_local_experts=4)),
        Mixture("gpt_oss", dict(num_local_experts=4, sliding_window=8,
                                layer_types=["sliding_attention", "full_attention"])),
        Mixture("glm4_moe", dict(moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1)),
        Mixture("dots1", dict(moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1,
                              first_k_dense_replace=1, n_shared_experts=1)),
        Mixture("deepseek_v2", dict(_LATENT)),
        Mixture("deepseek_v3", dict(_LATENT)),
        Mixture("glm4_moe_lite", dict(_LATENT), without=("head_dim",)),
        Mixture("longcat_flash", dict(_LATENT, num_hidden_layers=2, ffn_hidden_size=48, moe_topk=2, zero_expert_num=2,
                                      expert_ffn_hidden_size=16),
                without=("n_group", "topk_group", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
                         "intermediate_size")),
        Mixture("qwen3_next", dict(**_LINEAR, **_SMALL, shared_expert_intermediate_size=16)),
        Mixture("qwen3_5_moe_text", dict(**_LINEAR, **_SMALL, shared_expert_intermediate_size=16),
                without=("intermediate_size",)),
        Mixture("hunyuan_v1_moe", dict(num_experts=4, moe_topk=2), without=("num_experts_per_tok",)),
        Mixture("ernie4_5_moe", dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0,
                                     moe_layer_end_index=1), without=("num_experts_per_tok",)),
        Mixture("flex_olmo", dict(num_experts=4)),
        Mixture("llama", {}),
        Mixture("gemma3_text", dict(sliding_window=8, query_pre_attn_scalar=8,
                                    layer_types=["sliding_attention", "full_attention"])),
        Mixture("qwen3_5_text", dict(_LINEAR)),
        Mixture("olmo_hybrid", {**_LINEAR, "linear_num_value_heads": 2}),
        Mixture("deepseek_v32", dict(_LATENT, index_topk=512, index_head_dim=16, index_n_heads=2)),
        Mixture("kimi_linear", {**_LATENT, "q_lora_rank": None, "num_local_experts": 4, "linear_head_dim": 8,
                                "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
                without=("n_routed_experts",)),
        Mixture("lfm2_moe", dict(**_SMALL, layer_types=["full_attention", "full_attention"], num_dense_layers=1)),
    )
}  # fmt: skip


_SWITCH: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, encoder_sparse_step=2, decoder_sparse_step=2,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
# Decoders without experts of several implementations.
DENSE = frozenset({"llama", "gemma3_text", "qwen3_5_text", "olmo_hybrid"})


def build(name: str, experts: str | None) -> Any:
    """A model of the family, fp32, every expert used by some token."""
    family = FAMILIES[name]
    settings = {k: v for k, v in {**_BASE, **family.config}.items() if k not in family.without}
    config = transformers.AutoConfig.for_model(name, **settings)
    return with_random_weights(config, experts)


def with_random_weights(config: Any, experts: str | None) -> Any:
    """A causal language model of the config, fp32; memory that nothing initialises is noise."""
    chosen = {} if experts is None else {"experts_implementation": experts}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, **chosen).float().eval().requires_grad_(False)
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                tensor.normal_(0, 0.1)
    return model


def calls(model: Any, phase: Phase, forward: Any) -> Iterator[Tensor]:
    """The logits of each compiled call of a phase: a prompt, or a prompt and four tokens with a cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(3, VOCAB, (2, 10))
    if phase == "prompt":
        yield forward(input_ids=ids, use_cache=False).logits
        return
    if phase == "dynamic":
        cache: Any = transformers.DynamicCache(config=model.config)
        yield forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
    else:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(input_ids=ids, past_key_values=cache, use_cache=True)  # as `generate` does: not compiled
    for step in range(4):
        yield forward(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits


def build_switch() -> Any:
    """An encoder-decoder whose experts have a capacity and are modules of their own."""
    config = transformers.AutoConfig.for_model("switch_transformers", **_SWITCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.SwitchTransformersForConditionalGeneration(config).eval().requires_grad_(False)


def switch_calls(model: Any, phase: Phase, forward: Any) -> Iterator[Tensor]:
    """As `calls`; traced without a mask, the model refers to the mask that it makes in eager mode only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids, target = torch.randint(3, VOCAB, (2, 10)), torch.randint(3, VOCAB, (2, 6))
    source = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if phase == "prompt":
        yield forward(**source, decoder_input_ids=target, use_cache=False).logits
        return
    if phase == "dynamic":
        caches: list[Any] = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    else:
        caches = [transformers.StaticCache(config=model.config, max_cache_len=n) for n in (16, 10)]
    cache = transformers.EncoderDecoderCache(*caches)
    first = forward if phase == "dynamic" else model
    output = first(**source, decoder_input_ids=target, past_key_values=cache)
    if phase == "dynamic":
        yield output.logits
    encoded = transformers.modeling_outputs.MoEModelOutput(output.encoder_last_hidden_state)
    known = dict(encoder_outputs=encoded, attention_mask=source["attention_mask"], past_key_values=cache)
    for step in range(4):
        yield forward(decoder_input_ids=target[:, step : step + 1], use_cache=True, **known).logits
