"""Experts whose weights are MXFP4 in the model and decoded in its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import sm12x_compile
from sm12x_compile import pipeline
from sm12x_compile.ops.mxfp4 import dequantize_fp4

from .decodings import ACCEPTED, table

E, K, D, H = 4, 2, 64, 96
MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {}


def model(build: Callable[[torch.dtype], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    MODELS[build.__name__] = build
    return build


def exact(packed: Tensor, scales: Tensor) -> Tensor:
    return dequantize_fp4("moe", packed, scales, "mxfp4", dtype=torch.float64)


def decode(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return ACCEPTED["table_stack_and_ldexp"](packed, scales).to(dtype)


class Experts(nn.Module):
    """Packed w13 ``[E, 2 H, D]`` and w2 ``[E, D, H]`` and a router."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False, dtype=dtype)
        self.dtype = dtype
        for name, rows, columns in (("w13", 2 * H, D), ("w2", D, H)):
            self.register_buffer(name, torch.randint(0, 256, (E, rows, columns // 2), dtype=torch.uint8))
            scales = torch.randint(118, 125, (E, rows, columns // 32), dtype=torch.uint8)
            self.register_buffer(name + "_scales", scales)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = self.router(x).softmax(-1, dtype=torch.float32).topk(K)
        return (p / p.sum(-1, keepdim=True)).to(x.dtype), ids

    def reference(self, x: Tensor) -> Tensor:
        """The equation, in fp64, token by token."""
        p, ids = self.route(x)
        w13, w2 = exact(self.w13, self.w13_scales), exact(self.w2, self.w2_scales)
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t in range(x.shape[0]):
            for j in range(K):
                gate, up = (w13[ids[t, j]] @ x[t].double()).chunk(2)
                out[t] += p[t, j].double() * (w2[ids[t, j]] @ (F.silu(gate) * up))
        return out


@model
def all_decoded_then_gathered(dtype):
    class Model(Experts):
        def forward(self, x):
            p, ids = self.route(x)
            w13 = decode(self.w13, self.w13_scales, self.dtype)[ids]
            w2 = decode(self.w2, self.w2_scales, self.dtype)[ids]
            gate, up = torch.einsum("td,tknd->tkn", x, w13).chunk(2, dim=-1)
            return torch.einsum("tkh,tkdh,tk->td", F.silu(gate) * up, w2, p)

    return Model(dtype)


@model
def bytes_gathered_then_decoded(dtype):
    class Model(Experts):
        def forward(self, x):
            p, ids = self.route(x)
            w13 = decode(self.w13[ids], self.w13_scales[ids], self.dtype)
            w2 = decode(self.w2[ids], self.w2_scales[ids], self.dtype)
            gate, up = torch.matmul(w13, x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
            y = torch.matmul(w2, (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
            return (y * p.unsqueeze(-1)).sum(1)

    return Model(dtype)


@model
def loop_that_decodes_one_expert_at_a_time(dtype):
    class Model(Experts):
        def forward(self, x):
            p, ids = self.route(x)
            out = torch.zeros_like(x)
            for e in range(E):
                share = torch.where(ids == e, p, 0).sum(-1, keepdim=True)
                gate, up = F.linear(x, decode(self.w13[e], self.w13_scales[e], self.dtype)).chunk(2, dim=-1)
                out = out + share * F.linear(F.silu(gate) * up, decode(self.w2[e], self.w2_scales[e], self.dtype))
            return out

    return Model(dtype)


@model
def every_expert_on_every_token(dtype):
    class Model(Experts):
        def forward(self, x):
            p, ids = self.route(x)
            share = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, p)
            w13 = decode(self.w13, self.w13_scales, self.dtype)
            w2 = decode(self.w2, self.w2_scales, self.dtype)
            gate, up = torch.einsum("td,end->etn", x, w13).chunk(2, dim=-1)
            return torch.einsum("etd,te->td", torch.bmm(F.silu(gate) * up, w2.mT), share)

    return Model(dtype)


@model
def blocks_in_a_dimension_of_their_own(dtype):
    """As checkpoints hold them, ``[E, N, K / 32, 16]``, decoded with a table of bytes."""

    class Model(Experts):
        def __init__(self, dtype):
            super().__init__(dtype)
            self.w13, self.w2 = self.w13.unflatten(-1, (-1, 16)), self.w2.unflatten(-1, (-1, 16))

        def reference(self, x):
            flat = Experts(self.dtype)
            state = {n: b.flatten(-2) if b.dim() == 4 else b for n, b in self.state_dict().items()}
            flat.load_state_dict(state)
            return flat.reference(x)

        def decoded(self, blocks, scales):
            pairs = torch.cartesian_prod(table(), table()).flip(-1)
            values = pairs[blocks.int()].flatten(-2)
            return (values * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2).to(self.dtype)

        def forward(self, x):
            p, ids = self.route(x)
            w13, w2 = self.decoded(self.w13, self.w13_scales), self.decoded(self.w2, self.w2_scales)
            gate, up = torch.einsum("td,tknd->tkn", x, w13[ids]).chunk(2, dim=-1)
            return torch.einsum("tkh,tkdh,tk->td", F.silu(gate) * up, w2[ids], p)

    return Model(dtype)


@model
def gate_and_up_apart(dtype):
    class Model(Experts):
        def __init__(self, dtype):
            super().__init__(dtype)
            for name in ("w13", "w13_scales"):
                gate, up = getattr(self, name).chunk(2, dim=1)
                self.register_buffer(name + "_gate", gate.clone())
                self.register_buffer(name + "_up", up.clone())

        def forward(self, x):
            p, ids = self.route(x)
            w1 = decode(self.w13_gate, self.w13_scales_gate, self.dtype)[ids]
            w3 = decode(self.w13_up, self.w13_scales_up, self.dtype)[ids]
            w2 = decode(self.w2, self.w2_scales, self.dtype)[ids]
            h = F.silu(torch.einsum("td,tknd->tkn", x, w1)) * torch.einsum("td,tknd->tkn", x, w3)
            return torch.einsum("tkh,tkdh,tk->td", h, w2, p)

    return Model(dtype)


@model
def module_list_of_packed_layers(dtype):
    class PackedLinear(nn.Module):
        def __init__(self, packed, scales):
            super().__init__()
            self.register_buffer("packed", packed.clone())
            self.register_buffer("scales", scales.clone())

        def forward(self, x):
            return F.linear(x, decode(self.packed, self.scales, x.dtype))

    class Model(Experts):
        def __init__(self, dtype):
            super().__init__(dtype)
            self.experts = nn.ModuleList(
                nn.ModuleList(
                    [PackedLinear(self.w13[e], self.w13_scales[e]), PackedLinear(self.w2[e], self.w2_scales[e])]
                )
                for e in range(E)
            )

        def forward(self, x):
            p, ids = self.route(x)
            out = torch.zeros_like(x)
            for e, (w13, w2) in enumerate(self.experts):
                share = (p * (ids == e)).sum(-1, keepdim=True)
                gate, up = w13(x).chunk(2, dim=-1)
                out = out + share * w2(F.silu(gate) * up)
            return out

    return Model(dtype)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compile_and_keep(function: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[GraphModule]]:
    """A compiled model and the graphs that it became."""
    graphs: list[GraphModule] = []
    original = sm12x_compile.backend.hoist

    def hoist(gm: GraphModule, **given: Any) -> Any:
        found = original(gm, **given)
        graphs.append(gm)
        return found

    monkeypatch.setattr(sm12x_compile.backend, "hoist", hoist)
    return torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}), graphs


def dense_weights(graph: GraphModule, least: int) -> list[str]:
    """Floating-point tensors of the graph that are as large as a decoded weight."""
    values = ((n, n.meta.get("val")) for n in graph.graph.nodes)
    return [
        f"{n.format_node()} {tuple(v.shape)}"
        for n, v in values
        if isinstance(v, Tensor) and v.is_floating_point() and v.numel() >= least
    ]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.nightly)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_reach_the_op(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MODELS[name](dtype)
    step, graphs = compile_and_keep(moe, monkeypatch)
    with sm12x_compile.collect() as report:
        for tokens in (5, 1):
            x = torch.randn(tokens, D).to(dtype)
            ours, eager, reference = step(x), moe(x), moe.reference(x)
            error, allowed = (y.double() - reference for y in (ours, eager))
            scale = reference.abs().max() * torch.finfo(dtype).eps
            assert error.abs().max() <= allowed.abs().max() + 4 * scale
    sites = [s for s in report.rewritten if s.pattern == "moe"]
    assert len(sites) == report.graphs == len(graphs), str(report)
    assert all(s.tags["format"] == "mxfp4" and s.kernel == "cpu.sorted" for s in sites), str(report)
    for graph in graphs:
        assert not dense_weights(graph, D * H), "a decoded weight is in the graph"


def test_the_search_for_dense_weights_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MODELS["all_decoded_then_gathered"](torch.bfloat16)
    graphs: list[GraphModule] = []
    original = pipeline.normalize
    monkeypatch.setattr(pipeline, "normalize", lambda gm: graphs.append(original(gm)) or graphs[-1])
    monkeypatch.setattr(pipeline, "recognise", lambda normal, options: [])
    step = torch.compile(moe, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    step(torch.randn(3, D).bfloat16())
    assert dense_weights(graphs[0], D * H)


def test_no_expert_and_wrong_experts() -> None:
    """ids below 0 or not below E give nothing, packed weights or not."""
    moe = Experts(torch.float32)
    x, p = torch.randn(4, D), torch.rand(4, K)
    ids = torch.tensor([[0, -1], [E, 2], [-3, E + 5], [3, 3]])
    call = lambda ids, p: torch.ops.sm12x.moe(  # noqa: E731
        x, ids, p, moe.w13, moe.w2, w13_scale=moe.w13_scales, w2_scale=moe.w2_scales, format="mxfp4"
    )
    from sm12x_compile.lowering.moe_cpu import sorted_experts

    found = sorted_experts(
        x, ids, p, moe.w13, moe.w2, w13_scale=moe.w13_scales, w2_scale=moe.w2_scales, format="mxfp4"
    )
    torch.testing.assert_close(found, call(ids, p), rtol=1e-5, atol=1e-5)
    assert (found[2] == 0).all()


class MixedUp(Experts):
    def forward(self, x):
        p, ids = self.route(x)
        w13 = decode(self.w13, self.w13_scales, self.dtype)[ids]
        gate, up = torch.einsum("td,tknd->tkn", x, w13).chunk(2, dim=-1)
        return torch.einsum("tkh,tkdh,tk->td", F.silu(gate) * up, self.plain[ids], p)


def test_one_packed_matrix_is_refused() -> None:
    moe = MixedUp(torch.float32)
    moe.plain = nn.Parameter(torch.randn(E, D, H))
    x = torch.randn(3, D)
    with sm12x_compile.collect() as report:
        ours = torch.compile(moe, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(x)
    assert report.count("moe") == 0
    assert any("some matrices of the experts are MXFP4" in s.reason for s in report.near_misses), str(report)
    torch.testing.assert_close(ours, moe(x), rtol=1e-5, atol=1e-5)
