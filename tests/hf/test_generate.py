"""`generate()`: the same tokens, greedily and in fp32, with either cache."""

from __future__ import annotations

import pytest
import torch

import sm12x_compile
from sm12x_compile.model_zoo import build


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_same_tokens(name: str, cache: str | None) -> None:
    model = build(name)
    prompt = torch.tensor([[7, 11, 13, 17, 19, 23, 29, 31, 37, 41]])
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation=cache,
                    disable_compile=True)  # fmt: skip
    eager = model.generate(prompt, **settings)

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        compiled = model.generate(prompt, **settings)
    assert compiled.tolist() == eager.tolist()
    assert eager.shape[1] == prompt.shape[1] + 8
    assert len(report.rewritten) == len(report.sites) > 0
