"""Quick start: a Hugging Face model, one argument more, and a report of what happened.

The model is built from its config, so nothing is downloaded; one from `from_pretrained(...)` works the same
way. Add ``.cuda()`` where you have a GPU.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sm12x_compile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=2, initializer_range=0.06,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(0, 512, (1, 64))

compiled = torch.compile(model, backend="sm12x", options={"codegen": "eager"})  # leave out options on a GPU

with torch.no_grad():  # without it a graph counts as training and is left as it is
    expected = model(prompt, use_cache=False).logits
    actual = compiled(prompt, use_cache=False).logits
difference = float((actual - expected).abs().max())
print(f"largest difference against eager: {difference:.1e}")

# What happened, and a test of it that can stand in your own suite.
print(sm12x_compile.explain(model, prompt, use_cache=False, options={"codegen": "eager"}))
sm12x_compile.assert_rewritten(model, {"input_ids": prompt, "use_cache": False}, attention=4)

assert difference < 1e-4
