"""`moe_weights`: experts are quantised to MXFP4 once, reported, and quantised again when a weight changes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import sm12x_compile
from sm12x_compile.ops.mxfp4 import E2M1_VALUES, dequantize_fp4
from sm12x_compile.prepared import STORE
from sm12x_compile.quantize import quantize_mxfp4

E, K, D, H = 4, 2, 64, 96


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    STORE.forget()
    with torch.no_grad():
        yield
    STORE.forget()


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_block_has_the_best_of_its_two_scales(dtype: torch.dtype) -> None:
    """Against a search through all numbers and all scales around."""
    w = (torch.randn(16, 64) * torch.logspace(-20, 20, 16)[:, None]).to(dtype)
    packed, scales = quantize_mxfp4(w)
    ours = dequantize_fp4("moe", packed, scales, "mxfp4", dtype=torch.float64)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    blocks, found = (t.double().unflatten(-1, (-1, 32)) for t in (w, ours))
    assert torch.equal(found.signbit(), blocks.signbit())
    error = (found - blocks).square().sum(-1)
    for shift in (0, 1):  # the standard's scale, and its double
        scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2 + shift)
        nearest = (blocks.unsqueeze(-1) / scale.unsqueeze(-1) - values).abs().amin(-1) * scale
        assert (error <= nearest.square().sum(-1) * (1 + 1e-9)).all()


def test_ties_go_to_the_even_code() -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(E2M1_VALUES[:8])]
    w = torch.zeros(1, 32)
    w[0, :7], w[0, 7] = torch.tensor(middles), 6.0
    packed, scales = quantize_mxfp4(w)
    assert scales.item() == 127
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten()[:7]
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6]


def test_what_is_mxfp4_already_stays() -> None:
    packed = torch.randint(0, 256, (32, 48), dtype=torch.uint8)
    packed[:, ::16] |= 7  # the largest number in each block, or its scale is not unique
    scales = torch.randint(1, 250, (32, 3), dtype=torch.uint8)
    w = dequantize_fp4("moe", packed, scales, "mxfp4")
    again = dequantize_fp4("moe", *quantize_mxfp4(w), "mxfp4")
    assert torch.equal(w, again)


def test_extremes() -> None:
    w = torch.zeros(5, 32)
    w[1, 3], w[2, 3], w[3, 3] = torch.nan, torch.inf, torch.finfo(torch.float32).max
    w[4] = torch.finfo(torch.float32).tiny
    packed, scales = quantize_mxfp4(w)
    found = dequantize_fp4("moe", packed, scales, "mxfp4", dtype=torch.float64)
    assert (found[0] == 0).all() and found[1:3].isnan().all() and found[3:].isfinite().all()
    assert found[3, 3] > 0.7 * w[3, 3].double() and torch.equal(found[4], w[4].double())
    with pytest.raises(ValueError, match="multiple of the block of 32"):
        quantize_mxfp4(torch.zeros(2, 48))


# ---------------------------------------------------------------- models


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.w13, self.w2 = nn.Linear(D, E, bias=False), weight(E, 2 * H, D), weight(E, D, H)

    def quantised(self) -> None:
        for w in (self.w13, self.w2):
            w.copy_(dequantize_fp4("moe", *quantize_mxfp4(w), "mxfp4"))

    def forward(self, x: Tensor) -> Tensor:
        p, ids = self.router(x).softmax(-1).topk(K)
        gate, up = torch.einsum("td,tknd->tkn", x, self.w13[ids]).chunk(2, -1)
        return torch.einsum("tkh,tkdh,tk->td", F.silu(gate) * up, self.w2[ids], p)


class Transposed(nn.Module):
    """Gate and up apart, stored the other way round, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.w2 = nn.Linear(D, E, bias=False), weight(E, H, D)
        self.w1, self.w3, self.b1, self.b3 = weight(E, D, H), weight(E, D, H), weight(E, H), weight(E, H)

    def quantised(self) -> None:
        for w in (self.w1, self.w3, self.w2):
            w.copy_(dequantize_fp4("moe", *quantize_mxfp4(w.mT.contiguous()), "mxfp4").mT)

    def forward(self, x: Tensor) -> Tensor:
        p, ids = self.router(x).softmax(-1).topk(K)
        gate = torch.einsum("td,tkdh->tkh", x, self.w1[ids]) + self.b1[ids]
        up = torch.einsum("td,tkdh->tkh", x, self.w3[ids]) + self.b3[ids]
        return torch.einsum("tkh,tkhd,tk->td", F.gelu(gate) * up, self.w2[ids], p)


class Layers(nn.Module):
    """Experts that own their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.ModuleList(nn.Linear(D, H) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(H, D) for _ in range(E))

    def quantised(self) -> None:
        for layer in (*self.up, *self.down):
            layer.weight.copy_(dequantize_fp4("moe", *quantize_mxfp4(layer.weight), "mxfp4"))

    def forward(self, x: Tensor) -> Tensor:
        p, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + (p * (ids == e)).sum(-1, keepdim=True) * self.down[e](F.gelu(self.up[e](x)))
        return out


def compiled(model: nn.Module, how: str = "mxfp4", codegen: str = "eager") -> Callable[..., Any]:
    options = {"codegen": codegen, "moe_weights": how}
    return torch.compile(model, backend=sm12x_compile.sm12x, options=options)


@pytest.mark.parametrize("how", ["mxfp4", "mxfp4_only"])
@pytest.mark.parametrize("build", [Stacked, Transposed, Layers])
def test_experts_are_those_of_the_quantised_model(build: type[nn.Module], how: str) -> None:
    """The oracle is eager on weights that were rounded to MXFP4 before."""
    model, oracle = build(), build()
    oracle.load_state_dict(model.state_dict())
    oracle.quantised()
    matrices = [p for n, p in model.named_parameters() if n[0] in "wud" and "bias" not in n]
    originals = [StorageWeakRef(p.untyped_storage()) for p in matrices]
    step = compiled(model, how)
    with sm12x_compile.collect() as report:
        for tokens in (5, 5, 1, 3):
            x = torch.randn(tokens, D)
            torch.testing.assert_close(step(x), oracle(x), rtol=1e-4, atol=1e-5)
    assert {s.tags.get("weights") for s in report.rewritten if s.pattern == "moe"} == {"quantised to mxfp4"}
    assert len(report.weights) == 2, "each weight is quantised once, whatever the number of graphs"
    for line in report.weights:
        assert 0.05 < line["relative_error"] < 0.2 and line["dropped"] == (how == "mxfp4_only")
        assert 7.3 < line["bytes_before"] / line["bytes_after"] < 7.6
    assert "2 quantised to mxfp4" in str(report)
    gc.collect()
    assert all(original.expired() == (how == "mxfp4_only") for original in originals), "nobody else holds them"
    assert all((w.untyped_storage().nbytes() == 4) == (how == "mxfp4_only") for w in matrices)


def test_inductor() -> None:
    model, oracle = Stacked(), Stacked()
    oracle.load_state_dict(model.state_dict())
    oracle.quantised()
    step, x = compiled(model, codegen="inductor"), torch.randn(3, D)
    torch.testing.assert_close(step(x), oracle(x), rtol=1e-4, atol=1e-5)


def test_a_change_is_quantised_again() -> None:
    model, oracle, x = Stacked(), Stacked(), torch.randn(5, D)
    step = compiled(model)

    def check(quantised: int) -> None:
        oracle.load_state_dict(model.state_dict())
        oracle.quantised()
        with sm12x_compile.collect() as report:
            torch.testing.assert_close(step(x), oracle(x), rtol=1e-4, atol=1e-5)
        assert report.graphs == 0 or quantised == 2
        assert len(report.weights) == quantised

    step(x)
    check(0)
    model.w2.mul_(0.5)
    check(1)
    model.load_state_dict(Stacked().state_dict())
    check(2)
    model.w13.data = torch.randn(E, 2 * H, D) / 8
    check(1)
    model.w13.data += torch.randn(E, 2 * H, D) / 8
    check(1)


def test_given_up_weights_are_not_read_unnoticed() -> None:
    model, x = Stacked(), torch.randn(5, D)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    step = compiled(model, "mxfp4_only")
    expected = step(x)
    assert model(x).isnan().all(), "eager reads what is gone"
    with pytest.raises(RuntimeError):
        model.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(step(x), expected)


def test_a_weight_that_is_read_elsewhere_is_not_given_up() -> None:
    class Regularised(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.w2.abs().mean()

    model, x = Regularised(), torch.randn(5, D)
    first = compiled(model, "mxfp4_only")(x)
    assert first.isfinite().all() and model.w2.isfinite().all() and model.w13.isnan().all()


def test_experts_that_cannot_be_quantised_say_why() -> None:
    class Given(Stacked):
        def forward(self, x: Tensor, w2: Tensor) -> Tensor:
            p, ids = self.router(x).softmax(-1).topk(K)
            gate, up = torch.einsum("td,tknd->tkn", x, self.w13[ids]).chunk(2, -1)
            return torch.einsum("tkh,tkdh,tk->td", F.silu(gate) * up, w2[ids], p)

    model, x, w2 = Given(), torch.randn(5, D), torch.randn(E, D, H)
    with sm12x_compile.collect() as report:
        torch.testing.assert_close(compiled(model)(x, w2), model(x, w2), rtol=1e-4, atol=1e-5)
    (site,) = (s for s in report.rewritten if s.pattern == "moe")
    assert any(k == "moe_weights=mxfp4" and "no parameters" in why for k, why in site.refused)
    assert not report.weights
