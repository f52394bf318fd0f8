"""Linear layers of one row on a CPU: which are shared out among the threads, and that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from sm12x_compile import collect, sm12x
from sm12x_compile.arch import by_name
from sm12x_compile.lowering import linear_cpu
from sm12x_compile.lowering.linear_cpu import KERNEL, share_linears
from sm12x_compile.options import Options

from ..cuda_graphs.fakes import Tracer

LARGE = (2048, 512)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def shared(function: Callable[..., Any], *shapes: tuple[int, ...], **given: Any) -> tuple[GraphModule, int, int]:
    """The graph, how many layers are shared out in it, and how many are left."""
    dtype, arch = given.pop("dtype", torch.float32), given.pop("arch", "cpu")
    tracer = Tracer()
    gm = tracer.graph(function, *(tracer.tensor(*s, dtype=dtype, device="cpu") for s in shapes))
    sites = share_linears(gm, Options.parse(given), by_name(arch))
    gm.graph.lint()
    gm.recompile()
    assert {s.kernel for s in sites} <= {KERNEL}
    return gm, len(sites), len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row(lead: tuple[int, ...], bias: bool) -> None:
    shapes = [(*lead, 512), LARGE, *([(2048,)] if bias else [])]
    gm, found, left = shared(lambda x, *w: F.linear(x, *w), *shapes)
    assert (found, left) == (1, 0)
    torch.manual_seed(0)
    inputs = [torch.randn(s) for s in shapes]
    result = gm(*inputs)
    expected = F.linear(*(t.double() for t in inputs))
    assert result.shape == expected.shape and result.stride() == expected.stride()
    assert float((result.double() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("x", "w", "given"),
    [
        ((2, 512), LARGE, {}),
        ((1, 512), (2040, 512), {}),  # not large, and no whole blocks
        ((1, 512), (2056, 512), {}),
        ((1, 512), (1024, 512), {}),
        ((1, 512), LARGE, dict(dtype=torch.bfloat16)),
        ((1, 512), LARGE, dict(arch="h200")),
        ((1, 512), LARGE, dict(kernels=["-aten.row_linear"])),
        ((1, 512), LARGE, dict(patterns=["-linear"])),
    ],
)
def test_left_alone(x: tuple[int, ...], w: tuple[int, ...], given: dict[str, Any]) -> None:
    assert shared(F.linear, x, w, **given)[1:] == (0, 1)


def test_left_alone_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert shared(F.linear, (1, 512), LARGE)[1:] == (0, 1)


def test_a_transposed_weight_is_left_alone() -> None:
    assert shared(lambda x, w: F.linear(x, w.mT), (1, 2048), LARGE)[1:] == (0, 1)


class Step(nn.Module):
    """One token attends to a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(128, 128), nn.Linear(128, 128, bias=False)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.q(x).view(1, 1, 4, 32).transpose(1, 2)
        scores = torch.softmax(q @ k.mT * 32**-0.5, -1)
        return self.out((scores @ v).transpose(1, 2).reshape(1, 1, 128))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_in_a_model(codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "LARGE", 128 * 128)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Step().eval()
    inputs = torch.randn(1, 1, 128), torch.randn(1, 4, 40, 32), torch.randn(1, 4, 40, 32)
    with torch.no_grad(), collect() as report:
        found = torch.compile(model, backend=sm12x, options={"codegen": codegen})(*inputs)
        expected = model.double()(*(t.double() for t in inputs))
    assert [s.kernel for s in report.sites].count(KERNEL) == 2, str(report)
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < 1e-5
