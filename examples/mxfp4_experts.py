"""Experts in four bits (MXFP4): a checkpoint that is packed already, and bf16 experts quantised on request.

A packed weight that a model decodes in its forward pass is recognised by what its bytes become, and is read packed; the
decoded weight never exists. `huggingface.from_pretrained` keeps gpt-oss checkpoints packed in the model.
"""

import tempfile

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

import sm12x_compile
from sm12x_compile import huggingface
from sm12x_compile.quantize import quantize_mxfp4

torch.manual_seed(0)
torch.set_grad_enabled(False)
config = GptOssConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4,
    num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
model = GptOssForCausalLM(config).bfloat16().eval()
ids = torch.randint(2, 128, (1, 9))

# 1. Quantise the experts of a model in bf16. "mxfp4_only" would give the originals up as well.
step = torch.compile(model, backend="sm12x", options={"codegen": "eager", "moe_weights": "mxfp4"})
with sm12x_compile.collect() as report:
    quantised = step(ids).logits
print(report)
assert len(report.weights) == 4

# 2. A checkpoint as published: `<weight>_blocks` and `<weight>_scales` instead of the experts' weights.
with tempfile.TemporaryDirectory() as folder:
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed, scales = quantize_mxfp4(value.mT)
            tensors |= {name + "_blocks": packed.unflatten(-1, (-1, 16)).contiguous(), name + "_scales": scales}
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(folder)
    kept = huggingface.from_pretrained(folder, dtype=torch.bfloat16).eval()

experts = kept.model.layers[0].mlp.experts
print({name: tuple(buffer.shape) for name, buffer in experts.named_buffers()})
torch._dynamo.reset()
with sm12x_compile.collect() as report:
    packed_logits = torch.compile(kept, backend="sm12x", options={"codegen": "eager"})(ids).logits
print(report)
assert [site.tags["format"] for site in report.rewritten if site.pattern == "moe"] == ["mxfp4"] * 2
assert torch.allclose(packed_logits.float(), quantised.float(), atol=0.02)
