"""Whether a graph is to be recorded: every reason, its sentence, and who comes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sm12x_compile.cuda_graphs.decision import Decision, decide
from sm12x_compile.options import Options

from .fakes import Tracer


def decision(
    device: str = "cuda", dynamic: int = -1, gradients: bool = False, patches: dict[str, Any] | None = None,
    **options: Any,
) -> Decision:  # fmt: skip
    tracer = Tracer()
    gm = tracer.graph(lambda x: x.relu(), tracer.tensor(2, 8, device=device, dynamic=dynamic))
    return decide(gm, Options.parse(options), patches or {}, gradients=gradients)


MODE = {"triton.cudagraphs": True}


@pytest.mark.parametrize(("given", "asked"), [({}, False), ({"cuda_graphs": True}, True), ({"patches": MODE}, True)])
def test_static_shapes_on_a_gpu_are_recorded(given: dict[str, Any], asked: bool) -> None:
    assert decision(**given) == Decision(True, None, asked)


def test_sizes_that_change_are_recorded_if_asked() -> None:
    no = decision(dynamic=1)
    assert not no.wanted and no.reason is not None
    assert no.reason.startswith("dim 1 of x_1 changes from call to call")
    assert decision(dynamic=1, cuda_graphs=True).wanted
    assert decision(dynamic=1, patches=MODE).wanted


def test_gradients() -> None:
    assert "needs gradients" in str(decision(gradients=True).reason)
    assert decision(gradients=True, cuda_graphs=True).wanted


@pytest.mark.parametrize(
    ("given", "reason", "asked"),
    [
        (dict(cuda_graphs=False), "cuda_graphs=False", False),
        (dict(cuda_graphs=False, patches=MODE), "cuda_graphs=False", False),  # the option is nearer than the mode
        (dict(cuda_graphs=False, device="cpu"), "cuda_graphs=False", False),
        (dict(codegen="eager"), "codegen='eager' runs the graph op by op", False),
        (dict(codegen="eager", patches=MODE), "codegen='eager' runs the graph op by op", True),
    ],
)
def test_turned_off(given: dict[str, Any], reason: str, asked: bool) -> None:
    assert decision(**given) == Decision(False, reason, asked)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_no_gpu(asked: bool, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    reason = "the graph does not run on CUDA" if there else "no CUDA device"
    assert decision("cpu", cuda_graphs=asked or "auto") == Decision(False, reason, asked)


def test_inductors_own_setting_counts_as_asked() -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert decision().asked and decision(dynamic=1).wanted
    assert not decision().asked


def test_a_graph_that_makes_its_tensors_on_the_gpu() -> None:
    tracer = Tracer()
    gm = tracer.graph(lambda x: x.sum() + torch.ones((), device="cuda"), tracer.tensor(device="cpu"))
    assert decide(gm, Options(), {}, gradients=False).wanted
