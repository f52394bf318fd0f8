"""A tiny gpt-oss checkpoint as published: experts in MXFP4, everything else in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sm12x_compile.quantize import quantize_mxfp4

PACKED = ("gate_up_proj", "down_proj")


def write_gpt_oss(folder: Path, *, shards: int = 1) -> None:
    """config.json and safetensors with ``*_blocks`` ``[E, N, K / 32, 16]`` and ``*_scales`` ``[E, N, K / 32]``."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=100, hidden_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96, sliding_window=8,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for name, value in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict().items():
        if name.endswith(PACKED):
            packed, scales = quantize_mxfp4(value.mT * 8)  # larger than at their start, so that experts matter
            tensors[name + "_blocks"] = packed.unflatten(-1, (-1, 16)).contiguous()
            tensors[name + "_scales"] = scales
        else:
            tensors[name] = value.contiguous()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {n: f"model-{k % shards + 1:05}-of-{shards:05}.safetensors" for k, n in enumerate(names)}
        for file in set(files.values()):
            of_it = {n: tensors[n] for n in names if files[n] == file}
            save_file(of_it, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
