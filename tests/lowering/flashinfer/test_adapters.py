"""The arguments that the adapters build, given to stand-ins that compute what FlashInfer documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.flashinfer.plans import Plans
from sm12x_compile.lowering.select import lower
from sm12x_compile.normalize import normalize
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.pipeline import clean
from sm12x_compile.report import Site

from .cases import CASES, Case
from .check import agrees, check
from .stand_ins import ENTRIES

Enter = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapter(case: Case, enter: Enter) -> None:
    enter(ENTRIES)
    check(case)


def lowered(case: Case, layers: int = 1) -> tuple[GraphModule, list[Tensor], list[Site]]:
    """A graph with the case's call, or several, and the case's kernel in it; what it takes; its sites."""
    arguments = case.call().arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in arguments.items() if name not in tensors}
    whole = {name: t if t._base is None else t._base for name, t in tensors.items()}
    inputs = list({id(t): t for t in whole.values()}.values())
    place = {name: next(k for k, t in enumerate(inputs) if t is whole[name]) for name in tensors}

    def run(*given: Tensor) -> Any:
        views = {
            name: given[place[name]].as_strided(t.shape, t.stride(), t.storage_offset()) for name, t in tensors.items()
        }
        found: list[Any] = []
        for layer in range(layers):
            if layer:  # each with a query of its own
                views = {name: t + layer if name == "q" else t for name, t in views.items()}
            result = OPS[case.op].overload(**rest, **views)
            found += result if isinstance(result, (tuple, list)) else [result]
        return tuple(found)

    with torch.no_grad():
        gm = normalize(make_fx(run, pre_dispatch=True, tracing_mode="fake")(*inputs))
    calls = [(Site(case.op, case.op, "", ""), n) for n in gm.graph.nodes if n.target is OPS[case.op].overload]
    card = CARDS["rtx5090"]
    lower(gm, calls, Options(kernels=(case.kernel,)), card)
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, inputs, [site for site, _ in calls]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_a_graph(case: Case, enter: Enter) -> None:
    """Traced with fake tensors, and then run."""
    enter(ENTRIES)
    gm, inputs, sites = lowered(case)
    assert [site.kernel for site in sites] == [case.kernel]
    found = gm(*inputs)
    agrees(case, found[0] if len(found) == 1 else tuple(found), case.call())


def test_layers_share_the_page_table() -> None:
    case = next(case for case in CASES if case.name == "xqa: each row has a position")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sm12x_compile.lowering.flashinfer.installed.refusal", lambda *args, **kwargs: None)
        graphs = [lowered(case, layers)[0] for layers in (1, 3)]
    tables, kernels = (
        [sum(name in str(node.target) for node in gm.graph.nodes) for gm in graphs]
        for name in ("arange", "sm12x_flashinfer.xqa")
    )
    assert tables[0] == tables[1] > 0 and kernels == [1, 3]


def test_plans_are_made_once_and_dropped_in_turn() -> None:
    made: list[int] = []
    plans, cpu = Plans(kept=2), torch.device("cpu")

    def ask(shape: int) -> Any:
        return plans.get(cpu, shape, lambda workspace: made.append(shape) or (shape, workspace.data_ptr()))

    assert [ask(shape)[0] for shape in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]  # 2 was used least when 3 came
    assert ask(1)[1] == ask(2)[1]  # one workspace
    plans.clear()
    ask(2)
    assert made == [1, 2, 3, 2, 2]


def test_a_plan_that_fails_is_not_kept() -> None:
    plans = Plans()

    def fail(workspace: Tensor) -> None:
        raise ValueError("does not fit")

    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit"):
            plans.get(torch.device("cpu"), 1, fail)
    assert plans.get(torch.device("cpu"), 1, lambda workspace: 7) == 7
