"""FlashInfer's kernels on a card that has them, against the references; and in CUDA graphs through torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sm12x_compile import collect, sm12x
from sm12x_compile.arch import of_device
from sm12x_compile.lowering.flashinfer import installed
from sm12x_compile.lowering.flashinfer.plans import Plans
from sm12x_compile.registry import kernels

from .cases import CASES, Case
from .check import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(installed.release() is None, reason="flashinfer-python is not installed"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees(case: Case) -> None:
    kernel = next(k for k in kernels(case.op) if k.name == case.kernel)
    verdict = kernel.accepts(case.call("cuda"), of_device())
    if not verdict:
        pytest.skip(getattr(verdict, "reason", "declined"))
    check(case, of_device(), "cuda")


class Prompt(nn.Module):
    """Causal attention over a prompt, with projections around it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(512, 8 * 128, bias=False)
        self.out = nn.Linear(512, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(x).view(B, S, 8, 128).transpose(1, 2).split([4, 2, 2], dim=1)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(found.transpose(1, 2).reshape(B, S, 512))


def test_planned_kernels_live_in_cuda_graphs() -> None:
    """Plans outlast the memory pools of Inductor's graphs: shapes replayed in turn, with other work between."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Prompt().to("cuda", torch.bfloat16).eval()
    inputs = [torch.randn(2, S, 512, device="cuda", dtype=torch.bfloat16) for S in (64, 130, 64, 257, 130)]
    options = {"kernels": ["flashinfer.fa2"], "cuda_graphs": True}
    with torch.no_grad(), collect() as report:
        compiled = torch.compile(model, backend=sm12x, dynamic=False, options=options)
        for _ in range(4):
            for x in inputs:
                torch.compiler.cudagraph_mark_step_begin()
                x = torch.randn_like(x)
                found = compiled(x).clone()
                torch.randn(1 << 22, device="cuda").sum()
                expected = model(x)
                assert float((found - expected).float().norm() / expected.float().norm()) < 1e-2
    assert {site.kernel for site in report.sites} == {"flashinfer.fa2"}, str(report)


def test_a_new_shape_is_not_planned_while_a_graph_is_captured() -> None:
    plans, device = Plans(), torch.device("cuda", torch.cuda.current_device())
    assert plans.get(device, "known", lambda workspace: workspace.numel()) == 128 << 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert plans.get(device, "known", lambda workspace: 0) == 128 << 20  # planned on another stream
        with pytest.raises(RuntimeError, match="run the model once"):
            plans.get(device, "new", lambda workspace: 0)
