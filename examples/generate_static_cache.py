"""`generate()` with a static cache, then the same tokens from a loop of one's own.

A static cache is allocated once at its full length, so every decode step has the same shapes: one graph, no
recompiles. `generate` runs the prompt in eager mode and compiles the decode step, as its `CompileConfig` says.
"""

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import sm12x_compile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, initializer_range=0.06, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 512, (1, 16))
settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation="static")
expected = model.generate(prompt, **settings, disable_compile=True)

# On a GPU: CompileConfig(backend="sm12x", mode=None). The rest is for trying it out on a CPU.
how = CompileConfig(backend="sm12x", mode=None, options={"codegen": "eager"})
how._compile_all_devices = True
with sm12x_compile.collect() as report:  # everything that is compiled in here, over all calls
    tokens = model.generate(prompt, **settings, compile_config=how)
print("generate():", tokens[0, 16:].tolist())
print(report)
assert tokens.tolist() == expected.tolist()
assert report.graphs == 1 and len(report.rewritten) == 2

# `generate` makes the mask outside of the model and passes it in: all that the graph can know of it is that it
# hides keys. In a loop of one's own the model makes the mask, and the graph shows what it means: keys up to the
# length that the cache counts in a tensor. A kernel then reads the cache only as far as it is filled.
cache = StaticCache(config=config, max_cache_len=64)
decode = torch.compile(model, backend="sm12x", options={"codegen": "eager"})
with torch.no_grad(), sm12x_compile.collect() as report:
    logits = model(prompt, past_key_values=cache).logits
    loop = [logits[:, -1:].argmax(-1)]
    for _ in range(11):
        logits = decode(loop[-1], past_key_values=cache).logits
        loop.append(logits.argmax(-1))
print("own loop:  ", torch.cat(loop, 1)[0].tolist())
print(report)
assert torch.cat(loop, 1).tolist() == expected[:, 16:].tolist()
assert report.graphs == 1
assert [site.tags["mask"] for site in report.rewritten] == ["length", "length"]
