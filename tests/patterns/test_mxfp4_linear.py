"""MXFP4 weights decoded in the forward pass: found by what their bytes become, and nothing else taken for them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sm12x_compile

from .decodings import ACCEPTED, REFUSED, Decode, table

N, K = 24, 96


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Packed(nn.Module):
    """A linear layer on a weight that `decode` makes of bytes; `use` is the product."""

    def __init__(self, decode: Decode, use: Callable[..., Tensor] = F.linear, low: int = 100, high: int = 140):
        super().__init__()
        self.decode, self.use = decode, use
        self.register_buffer("packed", torch.randint(0, 256, (N, K // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.randint(low, high, (N, K // 32), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        w = self.decode(self.packed, self.scales)
        return self.use(x.to(w.dtype), w)


def compiled(model: nn.Module, *args: Tensor) -> tuple[Tensor, sm12x_compile.Report]:
    with sm12x_compile.collect() as report:
        step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True)
        return step(*args), report


def assert_close(ours: Tensor, eager: Tensor) -> None:
    assert ours.dtype == eager.dtype
    tolerance = 8 * torch.finfo(eager.dtype).eps * eager.double().abs().max().item()
    torch.testing.assert_close(ours.double(), eager.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ACCEPTED)
def test_spellings(name: str) -> None:
    model, x = Packed(ACCEPTED[name]), torch.randn(2, 5, K)
    ours, report = compiled(model, x)
    assert report.count("mxfp4_linear") == 1 and not report.warnings, str(report)
    assert not report.near_misses, str(report)
    assert report.rewritten[0].kernel == "cpu.tiled"
    assert_close(ours, model(x))


@pytest.mark.parametrize("name", REFUSED)
def test_told_apart(name: str) -> None:
    decode, reason = REFUSED[name]
    model, x = Packed(decode, low=110), torch.randn(3, K)
    ours, report = compiled(model, x)
    assert report.count("mxfp4_linear") == 0
    assert any(re.search(reason, site.reason) for site in report.near_misses), str(report)
    torch.testing.assert_close(ours, model(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_byte_with_every_scale(name: str) -> None:
    """One row for each scale, all bytes in it; scales 0 and 255 as the tags say."""
    decode = ACCEPTED[name]

    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous())
            self.register_buffer("scales", torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous())

        def forward(self, x: Tensor) -> Tensor:
            w = decode(self.packed, self.scales)
            return F.linear(x.to(w.dtype), w)

    model = All()
    with sm12x_compile.collect() as report:
        step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
        # Column by column: each result is one weight.
        ours, eager = step(torch.eye(512)), model(torch.eye(512))
    (site,) = report.rewritten
    dense = decode(model.packed, model.scales)
    defined = torch.ops.sm12x.mxfp4_weight(model.packed, model.scales, dense.dtype)
    differ = [s for s in range(256) if not _same(dense[s], defined[s])]
    assert differ == [s for s in (0, 255) if f"scale_{s}" in site.tags], "eager differs where the tags say so alone"
    finite = [s for s in range(255) if defined[s].isfinite().all()]
    assert len(finite) == 253  # six times 2^126 and 2^127 are too large
    subnormal = 0.0 if dense.dtype == torch.float32 else 2.0**-126  # bf16 products on a CPU flush what is smaller
    torch.testing.assert_close(ours[:, finite], defined[finite].T, rtol=0, atol=subnormal)
    assert _same(ours[:, finite[1:]], eager[:, finite[1:]])
    assert ours[:, 255].isnan().all()


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---------------------------------------------------------------- products


def halves(x: Tensor, w: Tensor) -> Tensor:
    q, k = w.chunk(2, 0)
    return F.linear(x, q) * F.linear(x, k).sigmoid()


USES = {
    "matmul": (lambda x, w: x @ w.T, 1),
    "weight_first": (lambda x, w: (w @ x.flatten(0, 1).T).T, 1),
    "einsum": (lambda x, w: torch.einsum("bsk,nk->bns", x, w), 1),
    "heads": (lambda x, w: torch.einsum("bsk,hdk->bhsd", x, w.view(3, 8, K)), 1),
    "mm": (lambda x, w: torch.mm(x.flatten(0, 1), w.t()), 1),
    "addmm": (lambda x, w: torch.addmm(w.new_ones(N), x.flatten(0, 1), w.t()), 1),
    "one_row": (lambda x, w: torch.mv(w, x[0, 0]), 1),
    "halves": (halves, 2),
    "some_rows": (lambda x, w: F.linear(x, w[3:9]), 1),
    "expanded_and_permuted": (lambda x, w: torch.tensordot(x, w.t(), dims=([2], [0])), 1),
}


@pytest.mark.parametrize("name", USES)
def test_products(name: str) -> None:
    use, sites = USES[name]
    model, x = Packed(ACCEPTED["table_stack_and_ldexp"], use), torch.randn(2, 5, K)
    ours, report = compiled(model, x)
    assert report.count("mxfp4_linear") == sites, str(report)
    assert_close(ours, model(x))


def test_bias_and_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        class Biased(Packed):
            def forward(self, x: Tensor) -> Tensor:
                w = self.decode(self.packed, self.scales).to(x.dtype)
                return F.linear(x, w, self.bias.to(x.dtype))

        model, x = Biased(ACCEPTED["e8m0_dtype"]), torch.randn(4, K, dtype=dtype)
        torch._dynamo.reset()
        ours, report = compiled(model, x)
        assert report.count("mxfp4_linear") == 1
        assert_close(ours, model(x))


def test_dynamic_tokens() -> None:
    model = Packed(ACCEPTED["e8m0_dtype"])
    step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, dynamic=True)
    with sm12x_compile.collect() as report:
        for tokens in (3, 8, 17):
            x = torch.randn(tokens, K)
            assert_close(step(x), model(x))
    assert report.graphs == 1 and report.count("mxfp4_linear") == 1


NOT_LINEAR = {
    "summed over the rows": lambda x, w: x[..., :N] @ w,
    "read twice": lambda x, w: F.linear(x, w) * w.abs().max(),
    "normed": lambda x, w: F.linear(x, w / w.norm(dim=-1, keepdim=True)),
    "embedding": lambda x, w: w[x.long().clamp(0, N - 1)[..., 0]],
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_other_readers_get_the_dense_weight(name: str) -> None:
    model, x = Packed(ACCEPTED["table_stack_and_ldexp"], NOT_LINEAR[name]), torch.randn(2, 5, K)
    ours, report = compiled(model, x)
    assert any(re.search("MXFP4 weight|summed over|not understood", s.reason) for s in report.near_misses), str(report)
    torch.testing.assert_close(ours, model(x), rtol=1e-5, atol=1e-5)


def test_a_changed_weight_is_read() -> None:
    model, x = Packed(ACCEPTED["table_stack_and_ldexp"]), torch.randn(3, K)
    step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    assert_close(step(x), model(x))
    model.packed.copy_(torch.randint(0, 256, model.packed.shape, dtype=torch.uint8))
    model.scales.add_(1)
    assert_close(step(x), model(x))


def test_a_written_weight() -> None:
    """Decoded before the bytes are written, multiplied after."""

    class Writing(Packed):
        def forward(self, x: Tensor) -> Tensor:
            w = self.decode(self.packed, self.scales)
            self.packed.bitwise_xor_(255)
            return F.linear(x, w)

    model, x = Writing(ACCEPTED["table_stack_and_ldexp"]), torch.randn(3, K)
    other = Writing(ACCEPTED["table_stack_and_ldexp"])
    other.load_state_dict(model.state_dict())
    step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    for _ in range(3):
        assert_close(step(x), other(x))


def test_a_table_that_is_an_input_is_no_constant() -> None:
    class Own(Packed):
        def __init__(self) -> None:
            super().__init__(ACCEPTED["e8m0_dtype"])
            self.register_buffer("table", table())

        def forward(self, x: Tensor) -> Tensor:
            codes = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(-2)
            values = self.table[codes.long()].unflatten(-1, (-1, 32))
            w = (values * torch.exp2(self.scales.float() - 127)[..., None]).flatten(-2)
            return F.linear(x, w)

    model, x = Own(), torch.randn(3, K)
    assert_close(compiled(model, x)[0], model(x))
    model.table.mul_(3)
    step = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    assert_close(step(x), model(x))


@pytest.mark.parametrize("spare", ["scales", "packed"])
def test_tensors_with_spare_rows(spare: str) -> None:
    """Rows of one tensor that belong to no row of the other: taken as they are meant, or refused."""

    class Spare(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.decode(self.packed[:N], self.scales[:N]))

    model, x = Spare(ACCEPTED["table_stack_and_ldexp"]), torch.randn(3, K)
    held = getattr(model, spare)
    setattr(model, spare, torch.cat([held, held.flip(0)]))
    ours, report = compiled(model, x)
    assert_close(ours, model(x))
    assert report.count("mxfp4_linear") + len(report.near_misses) > 0
