"""gpt-oss in MXFP4 from a checkpoint in the published layout: packed in the model, packed in the graph."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

import sm12x_compile
from sm12x_compile import huggingface

from .checkpoints import write_gpt_oss

IMPLEMENTATIONS = ["grouped_mm", "batched_mm"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    write_gpt_oss(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def load(path: Path, **given: Any) -> Any:
    return huggingface.from_pretrained(path, dtype=torch.bfloat16, **given).eval()


def dequantised(path: Path) -> Any:
    """transformers' own way: bf16 experts."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config).eval()


def test_eager_is_what_transformers_decodes(checkpoint: Path) -> None:
    model, oracle, ids = load(checkpoint), dequantised(checkpoint), torch.randint(0, 100, (2, 7))
    for layer, other in zip(model.model.layers, oracle.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            ours, theirs = getattr(layer.mlp.experts, name), getattr(other.mlp.experts, name)
            assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    assert torch.equal(model(ids).logits, oracle(ids).logits)


def test_the_model_holds_packed_weights_alone(checkpoint: Path) -> None:
    model = load(checkpoint)
    experts = model.model.layers[0].mlp.experts
    assert sorted(n for n, _ in experts.named_parameters()) == ["down_proj_bias", "gate_up_proj_bias"]
    held = sum(b.nbytes for n, b in experts.named_buffers())
    assert held == 4 * (192 * 64 + 64 * 96) * 17 // 32
    assert all(b.dtype == torch.uint8 for n, b in experts.named_buffers())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_end_to_end(checkpoint: Path, implementation: str) -> None:
    """Prompt and a few tokens with a static cache, against dequantised eager."""
    model, oracle = load(checkpoint), dequantised(checkpoint)
    model.set_experts_implementation(implementation)
    oracle.set_experts_implementation(implementation)
    step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    ids = torch.randint(0, 100, (2, 7))
    with sm12x_compile.collect() as report:
        for tokens in (ids, ids[:, :1]):
            ours, theirs = step(tokens).logits.float(), oracle(tokens).logits.float()
            assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    sites = [s for s in report.rewritten if s.pattern == "moe"]
    assert len(sites) == 2 * report.graphs, str(report)
    assert all(s.tags["format"] == "mxfp4" and s.kernel == "cpu.sorted" for s in sites), str(report)
    assert not any("expert" in s.module for s in report.near_misses), str(report)


@pytest.mark.nightly
def test_generate(checkpoint: Path) -> None:
    model, oracle = load(checkpoint), dequantised(checkpoint)
    ids = torch.randint(2, 100, (1, 5))
    expected = oracle.generate(ids, max_new_tokens=4, do_sample=False)
    model.forward = torch.compile(model.forward, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert report.count("moe") > 0
    assert torch.equal(found, expected)


def test_shards_and_a_checkpoint_without_packed_weights(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    write_gpt_oss(tmp_path / "sharded", shards=3)
    names = huggingface.packed_names(tmp_path / "sharded")
    assert names == sorted(f"model.layers.{k}.mlp.experts.{n}" for k in range(2) for n in ("down_proj", "gate_up_proj"))
    assert load(tmp_path / "sharded")(torch.tensor([[3, 4]])).logits.isfinite().all()
    dequantised(tmp_path / "sharded").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no MXFP4 weights"):
        load(tmp_path / "plain")


def test_any_module_with_stacked_weights_can_be_kept_packed() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 64, 8))

    module = Experts()
    huggingface.keep_packed(module, ["w"])
    assert module.w_blocks.shape == (3, 8, 2, 16) and module.w_scales.shape == (3, 8, 2)
    module.w_blocks.fill_(0x22)
    module.w_scales.fill_(128)
    assert module.w.shape == (3, 64, 8) and (module.w == 2).all()
    with pytest.raises(ValueError, match="no parameter"):
        huggingface.keep_packed(module, ["w"])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'sm12x-compile\[hf\]'"):
        huggingface.from_pretrained(checkpoint)
