"""Tiny models of decoder families that no other test names, each from the settings that its own config knows.

A family is a name, what one graph of it must hold, and the settings that are its own. The names are data: what is
rewritten is decided by the equations alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

Phase = Literal["prefill", "decode"]
VOCAB = 128

# Given to a config where it has such a field.
_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, sliding_window=6,
    # experts
    num_experts_per_tok=2, num_local_experts=4, num_experts=4, n_routed_experts=4, moe_intermediate_size=16,
    n_shared_experts=1, n_group=1, topk_group=1, shared_expert_intermediate_size=16, moe_num_shared_experts=1,
    moe_shared_expert_intermediate_size=16, moe_latent_size=16, shared_intermediate_size=48, first_k_dense_replace=1,
    num_dense_layers=1, interleave_moe_layer_step=1, intermediate_size_mlp=48, attention_chunk_size=6,
    # state-space layers
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, mamba_d_ssm=64,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, chunk_size=8, n_groups=1, conv_L_cache=3,
    # names of other times
    n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=48, d_model=32, n_heads=4, n_layers=2,
    ffn_hidden_size=48, ffn_dim=48, word_embed_proj_dim=32, rotary_dim=8, query_pre_attn_scalar=8, lru_width=32,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, altup_num_inputs=2, laurel_rank=4,
    num_kv_shared_layers=0,
)  # fmt: skip
_WINDOW = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A config by name, how often each pattern is rewritten in one graph, and the config's own settings."""

    name: str
    sites: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)


def _dense(name: str, **settings: Any) -> Family:
    return Family(name, {"attention": 2}, settings)


def _mixture(name: str, layers: int = 2, route: bool = True, **settings: Any) -> Family:
    sites = {"attention": 2, "moe": layers, "moe_route": layers if route else 0}
    return Family(name, sites, settings)


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        _mixture("afmoe", 1),
        _mixture("aria_text"),
        _mixture("cohere2_moe"),
        _mixture("exaone_moe", 1),
        _mixture("flex_olmo"),
        _mixture("granitemoeshared"),
        Family("granitemoehybrid", {"causal_conv1d": 1, "attention": 1, "moe": 2, "moe_route": 2},
               dict(layer_types=["mamba", "attention"], mamba_expand=2)),
        _mixture("hy_v3", 1),
        _mixture("laguna", 1),
        # Chosen by logits, weighed by their sigmoid, before the experts.
        _mixture("llama4_text", route=False, moe_layers=[0, 1], layer_types=["chunked_attention", "full_attention"]),
        _mixture("mellum"),
        _mixture("mimo_v2_flash", 1),
        Family("minimax", {"attention": 1, "moe": 2, "moe_route": 2},
               dict(layer_types=["linear_attention", "full_attention"], block_size=8)),
        Family("nemotron_h", {"causal_conv1d": 1, "attention": 1, "moe": 1, "moe_route": 1},
               dict(layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=None)),
        _mixture("solar_open"),
        _dense("apertus"),
        _dense("arcee"),
        Family("bamba", {"causal_conv1d": 1, "attention": 1}, dict(attn_layer_indices=[1], mamba_expand=2)),
        _dense("bloom"),
        _dense("cohere2", layer_types=_WINDOW),
        _dense("exaone4", layer_types=_WINDOW),
        Family("falcon_h1", {"causal_conv1d": 2, "attention": 2}),
        _dense("gemma3n_text", layer_types=_WINDOW, activation_sparsity_pattern=[0.5, 0.0], intermediate_size=[48, 48]),
        _dense("glm4"),
        _dense("gpt_neox"),
        _dense("helium"),
        _dense("hunyuan_v1_dense"),
        Family("lfm2", {"causal_conv1d": 1, "attention": 1}, dict(layer_types=["conv", "full_attention"])),
        _dense("mpt"),
        _dense("nemotron"),
        _dense("olmo3"),
        _dense("opt"),
        _dense("seed_oss"),
        _dense("smollm3"),
        _dense("stablelm"),
        _dense("starcoder2"),
        _dense("vaultgemma"),
    )
}  # fmt: skip


def exists(name: str) -> bool:
    """Whether the installed transformers has the family."""
    return name in transformers.CONFIG_MAPPING


def build(family: Family) -> Any:
    """The model in fp32 and eval mode; the same weights every time."""
    config_class = transformers.CONFIG_MAPPING[family.name]
    default = config_class()
    settings = {k: v for k, v in _SMALL.items() if hasattr(default, k)} | family.settings
    config = config_class(**{k: v for k, v in settings.items() if v is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            empty = parameter.numel() > 1 and float(parameter.abs().max()) < 0.02
            if empty or not torch.isfinite(parameter).all():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def calls(model: Any, phase: Phase, forward: Any) -> Iterator[Tensor]:
    """The logits of a prompt, or of two tokens after one; the prompt itself is then not compiled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(3, VOCAB, (2, 10))
    with torch.no_grad():
        if phase == "prefill":
            yield forward(input_ids=ids, use_cache=False).logits
            return
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for step in range(2):
            yield forward(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits
