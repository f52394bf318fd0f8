"""`generate()` with a static cache: one graph for all decode steps, which reads the cache in place.

The cache is allocated once at its full length. Attention is told how far it is filled by a tensor, so a step
costs what has been written, not what has been allocated, and no step recompiles.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sm12x_compile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, initializer_range=0.06, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 512, (1, 16))
settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation="static")

# On a GPU `generate` would compile a static-cache model by itself, with Inductor; ask it not to.
expected = model.generate(prompt, **settings, disable_compile=True)

model.forward = torch.compile(model.forward, backend="sm12x", options={"codegen": "eager"})
with sm12x_compile.collect() as report:  # everything that is compiled in here, over all calls
    tokens = model.generate(prompt, **settings, disable_compile=True)

print("new tokens:", tokens[0, 16:].tolist())
print(report)
print(f"{report.graphs} graphs for a prompt of 16 tokens and 11 decode steps")

assert tokens.tolist() == expected.tolist()
assert not report.near_misses
assert [site.tags["mask"] for site in report.rewritten] == ["causal", "causal", "length", "length"]
