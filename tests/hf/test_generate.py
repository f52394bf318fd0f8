"""`generate()`: eager's tokens in fp32, with every cache, greedily and sampled, in at most three graphs.

Three prompts of unequal length, padded on the left, and 40 tokens: past the window of sliding layers. With an
assistant it is one prompt and four graphs: how many drafts there are to verify changes from call to call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile.model_zoo import VOCAB, build

NAMES = ("llama", "gpt_oss", "qwen3_next", "deepseek_v3", "mixtral")
TWO_LAYERS = {"qwen3_next": dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])}
TOKENS = 40
# How the model is compiled (by `generate`, as `compile_config` says, or its `forward` by the user), the cache, and
# what else `generate` is told; with the most graphs that it may cost.
SAMPLED = dict(do_sample=True, top_k=20)
WAYS: dict[str, tuple[str, dict[str, Any], int]] = {
    "static, by generate": ("config", dict(cache_implementation="static"), 1),
    "static": ("forward", dict(cache_implementation="static"), 2),
    "growing": ("forward", {}, 3),
    "static, by generate, sampled": ("config", dict(cache_implementation="static", **SAMPLED), 1),
    "growing, sampled": ("forward", dict(SAMPLED), 3),
    "assisted": ("forward", {}, 4),
}
# Recurrent state can't be rolled back to where a draft was rejected.
ALL = [(name, way) for name in NAMES for way in WAYS if (name, way) != ("qwen3_next", "assisted")]
CI = [
    ("llama", "growing, sampled"), ("gpt_oss", "static"), ("gpt_oss", "static, by generate, sampled"),
    ("qwen3_next", "static, by generate"), ("deepseek_v3", "static, by generate"), ("mixtral", "static"),
    ("llama", "assisted"),
]  # fmt: skip


def prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask ``[3, 10]`` of prompts of 10, 7 and 4 tokens."""
    ids = torch.randint(5, VOCAB, (3, 10), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(10) >= torch.tensor([[0], [3], [6]])).long()
    return ids * mask, mask


@contextmanager
def compiled(model: Any, how: str) -> Iterator[dict[str, Any]]:
    """The settings under which `generate` compiles the model, or a model whose `forward` is compiled."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    if how == "config":
        config = CompileConfig(backend="sm12x", mode=None, fullgraph=True, options={"codegen": "eager"})
        config._compile_all_devices = True  # without it `generate` compiles on accelerators alone
        yield dict(compile_config=config)
    else:
        model.forward = torch.compile(model.forward, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
        yield dict(disable_compile=True)


def check(name: str, way: str) -> None:
    how, settings, graphs = WAYS[way]
    model: Any = build(name, **TWO_LAYERS.get(name, {}))
    ids, mask = prompts()
    settings = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, **settings)
    settings.setdefault("do_sample", False)
    if way == "assisted":
        ids, mask = ids[:1], mask[:1]
        settings |= dict(assistant_model=build(name, layers=1, **TWO_LAYERS.get(name, {})))
    torch.manual_seed(7)
    wanted = model.generate(ids, attention_mask=mask, disable_compile=True, **settings)
    assert wanted.shape[1] == ids.shape[1] + TOKENS
    with compiled(model, how) as more, sm12x_compile.collect() as report, warnings.catch_warnings():
        warnings.filterwarnings("error", message="sm12x")
        torch.manual_seed(7)
        got = model.generate(ids, attention_mask=mask, **settings, **more)
    assert got.tolist() == wanted.tolist()
    assert 1 <= report.graphs <= graphs, report.recompiles
    assert not report.graph_breaks and not report.warnings
    assert len(report.rewritten) == len(report.sites) > 0


@pytest.mark.parametrize(("name", "way"), CI)
def test_same_tokens(name: str, way: str) -> None:
    check(name, way)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "way"), [c for c in ALL if c not in CI])
def test_same_tokens_every_way(name: str, way: str) -> None:
    check(name, way)
