"""What the user sees of the backend: names, options, modes, warnings, logs, and a graph that is left as it is."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from torch import Tensor, nn
from torch._dynamo.backends import registry as dynamo_registry
from torch._dynamo.exc import InvalidBackend
from torch.fx import GraphModule

import sm12x_compile
from sm12x_compile import OptionError, backend, registry, sm12x

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    torch._dynamo.reset()
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield
    torch._dynamo.reset()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def heads(length: int = 5, count: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, length, 4, generator=generator) for _ in range(count))


class Layer(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.qkv(x).chunk(3, -1))


def tokens() -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(7))


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend=sm12x, options={"codegen": "eager", **options})


# ------------------------------------------------------------------ found by name


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Dynamo's tables of backends, without ours, and as they were afterwards."""
    torch.compiler.list_backends()  # fills them
    for table in ("_BACKENDS", "_COMPILER_FNS"):
        monkeypatch.setattr(dynamo_registry, table, dict(getattr(dynamo_registry, table)))
        getattr(dynamo_registry, table).pop("sm12x", None)
    return dynamo_registry._BACKENDS


def declared() -> str:
    """What pyproject.toml declares for the name."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return tomllib.loads(text)["project"]["entry-points"]["torch_dynamo_backends"]["sm12x"]


def discover(monkeypatch: pytest.MonkeyPatch, where: Path) -> None:
    """Install the entry point where Python looks for them, and let Dynamo look, as in a fresh process."""
    info = where / "sm12x_entry_point-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sm12x-entry-point\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nsm12x = {declared()}\n")
    monkeypatch.syspath_prepend(str(where))
    dynamo_registry._discover_entrypoint_backends.__wrapped__()


def test_by_name(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert EntryPoint("sm12x", declared(), "torch_dynamo_backends").load() is sm12x
    with pytest.raises(InvalidBackend):
        torch.compile(attend, backend="sm12x")(*heads())
    discover(monkeypatch, tmp_path)
    assert "sm12x" in torch.compiler.list_backends()
    with sm12x_compile.collect() as report:
        step = torch.compile(attend, backend="sm12x", options={"codegen": "eager"})
        torch.testing.assert_close(step(*heads()), attend(*heads()))
    assert report.count("attention") == 1
    assert dynamo_registry._COMPILER_FNS["sm12x"] is sm12x


def test_uninstall(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    discover(monkeypatch, tmp_path)
    step = torch.compile(attend, backend="sm12x", options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        step(*heads())
        step(*heads())
        assert report.graphs == 1
        sm12x_compile.uninstall()
        assert "sm12x" not in dynamo_registry._COMPILER_FNS
        torch.testing.assert_close(step(*heads()), attend(*heads()))
        assert report.graphs == 2, "what was compiled is forgotten"
        again = torch.compile(lambda *x: attend(*x), backend="sm12x", options={"codegen": "eager"})
        torch.testing.assert_close(again(*heads()), attend(*heads()))
    assert report.count("attention") == 3


def test_uninstall_of_a_name_given_by_hand(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sm12x_compile.uninstall"], "entry_points", lambda **wanted: [])
    dynamo_registry.register_backend(sm12x, name="sm12x")
    assert torch.compile(attend, backend="sm12x", options={"codegen": "eager"})(*heads()).shape == (2, 2, 5, 4)
    others = set(dynamo_registry._COMPILER_FNS) - {"sm12x"}
    sm12x_compile.uninstall()
    with pytest.raises(InvalidBackend):
        torch.compile(attend, backend="sm12x")(*heads())
    assert others <= set(dynamo_registry._COMPILER_FNS)
    sm12x_compile.uninstall()  # twice is as good as once


# ------------------------------------------------------------------ options and modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codgen": "eager"}, "unknown option 'codgen' (did you mean 'codegen'?)"),
        ({"codegen": "triton"}, "option codegen='triton': choose one of 'inductor', 'eager'"),
        ({"arch": "rtx5080"}, "option 'arch': unknown arch 'rtx5080'; known: auto, rtx5090"),
        ({"select": "best"}, "option select='best': choose one of 'auto', 'race', 'static'"),
    ],
)
def test_option_errors_reach_the_user(options: dict[str, Any], message: str) -> None:
    """Not a fallback and a line in a log: the call fails, with the sentence that says what to write."""
    with pytest.raises(OptionError) as error:
        torch.compile(attend, backend=sm12x, options=options)(*heads())
    assert message in str(error.value)
    with pytest.raises(OptionError):
        sm12x(GraphModule({}, torch.fx.Graph()), [], options=options)


def test_options_arrive() -> None:
    with sm12x_compile.collect() as report:
        compiled(attend, patterns=["-attention"])(*heads())
    assert report.sites == []
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        compiled(attend, arch="rtx5090")(*heads())
    assert (report.arch, report.planned) == ("rtx5090", True)
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        compiled(attend)(*heads())
    assert (report.arch, report.planned) == ("cpu", False)


@pytest.mark.parametrize("why", ["gradient", "autocast", "nothing to rewrite"])
def test_the_arch_is_told_for_graphs_that_are_left_too(why: str) -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=why == "autocast"):
            return x @ x.mT

    with sm12x_compile.collect() as report, torch.set_grad_enabled(why == "gradient"):
        compiled(function, arch="gb10")(torch.randn(3, 3, requires_grad=why == "gradient"))
    assert (report.arch, report.planned, report.sites) == ("gb10", True, [])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gets the mode's settings; on the CPU `reduce-overhead` says, loudly, that there is no CUDA graph."""
    patches: list[dict[str, Any] | None] = []
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, inputs, config_patches: patches.append(config_patches) or gm)
    asked = mode == "reduce-overhead"
    with sm12x_compile.collect() as report, pytest.warns(UserWarning) if asked else warnings.catch_warnings():
        step = torch.compile(attend, backend=sm12x, mode=mode)
        torch.testing.assert_close(step(*heads()), attend(*heads()))
    expected = torch._inductor.list_mode_options(mode) | ({"triton.cudagraphs": False} if asked else {})
    assert patches == [expected or None]
    assert report.cuda_graph == (False, "no CUDA device")
    assert any("a CUDA graph was asked for" in w for w in report.warnings) == asked


@pytest.mark.parametrize(("wanted", "reason"), [
    ("auto", "no CUDA device"), (True, "no CUDA device"), (False, "cuda_graphs=False"),
])  # fmt: skip
def test_cuda_graphs(wanted: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches: list[dict[str, Any]] = []
    monkeypatch.setattr(
        inductor, "compile_fx", lambda gm, inputs, config_patches: patches.append(config_patches or {}) or gm
    )
    loud = pytest.warns(UserWarning, match="no CUDA device") if wanted is True else warnings.catch_warnings()
    with sm12x_compile.collect() as report, loud:
        torch.compile(attend, backend=sm12x, options={"cuda_graphs": wanted})(*heads())
    assert not patches[0].get("triton.cudagraphs")
    assert report.cuda_graph == (False, reason)
    assert report.cuda_graphs == [(False, reason)]


# ------------------------------------------------------------------ graphs that are left


class Spy:
    """Stands for Inductor's `compile_fx` and for the backend, and keeps the graphs that both were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_dynamo: list[GraphModule] = []
        self.of_inductor: list[GraphModule] = []
        self.nodes: list[list[str]] = []
        monkeypatch.setattr(inductor, "compile_fx", self.compile_fx)

    def compile_fx(self, gm: GraphModule, inputs: list[Tensor], config_patches: Any = None) -> Any:
        self.of_inductor.append(gm)
        return gm.forward

    def backend(self, gm: GraphModule, inputs: list[Tensor], **given: Any) -> Any:
        self.of_dynamo.append(gm)
        self.nodes.append([n.format_node() for n in gm.graph.nodes])
        return sm12x(gm, inputs, **given)


def is_untouched(spy: Spy) -> bool:
    (mine,), (theirs,), (nodes,) = spy.of_dynamo, spy.of_inductor, spy.nodes
    return theirs is mine and [n.format_node() for n in mine.graph.nodes] == nodes


def raising(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("injected")


@pytest.mark.parametrize("stage", ["normalize", "recognise", "lower", None])
def test_a_failure_leaves_dynamos_graph(stage: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    if stage:
        monkeypatch.setattr(f"sm12x_compile.pipeline.{stage}", raising)
    with sm12x_compile.collect() as report:
        found = torch.compile(attend, backend=spy.backend)(*heads())
    torch.testing.assert_close(found, attend(*heads()))
    assert is_untouched(spy) == bool(stage)
    assert report.count("attention") == (0 if stage else 1)
    assert report.warnings == (["a graph was left as it is: ZeroDivisionError: injected"] if stage else [])


def test_nothing_to_rewrite_leaves_dynamos_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    with sm12x_compile.collect() as report:
        torch.compile(lambda x: (x @ x.mT).relu(), backend=spy.backend)(tokens())
    assert is_untouched(spy) and report.warnings == [] and report.sites == []


def test_a_near_miss_leaves_dynamos_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    with sm12x_compile.collect() as report:
        torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1).sqrt() @ v, backend=spy.backend)(*heads())
    assert is_untouched(spy) and report.warnings == [] and len(report.near_misses) == 1


def test_a_rewritten_graph_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    given: list[GraphModule] = []

    def compile_fx(gm: GraphModule, inputs: list[Tensor], config_patches: Any = None) -> Any:
        given.append(gm)
        return raising() if len(given) == 1 else gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    with sm12x_compile.collect() as report:
        found = torch.compile(attend, backend=spy.backend)(*heads())
    torch.testing.assert_close(found, attend(*heads()))
    assert given[0] is not given[1] and given[1] is spy.of_dynamo[0]
    assert report.sites == []
    (warning,) = report.warnings
    assert warning.startswith("a graph was left as it is: its rewritten form did not compile (ZeroDivisionError: inj")


def test_an_interpreted_graph_whose_inputs_alias_later() -> None:
    """Compiled for separate tensors and called with one that overlaps a written one: the original graph runs."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k.mul_(2.0)
        return attend(q, k, v)

    inputs = heads()
    steps: list[Any] = []
    order: list[int] = []

    def keep(gm: GraphModule, example_inputs: list[Tensor]) -> Any:
        steps.append(sm12x(gm, example_inputs, options={"codegen": "eager"}))

        def run(*given: Tensor) -> Any:
            order[:] = [next(k for k, x in enumerate(inputs) if x is g) for g in given]
            return steps[0](*given)

        return run

    with sm12x_compile.collect() as report:
        torch.compile(function, backend=keep)(*inputs)
    assert report.count("attention") == 1
    for same in ((0, 1), (1, 2), (0, 2)):
        ours, theirs = (list(heads(seed=2)) for _ in range(2))
        for arguments in (ours, theirs):
            arguments[same[1]] = arguments[same[0]][:]  # another tensor on the same memory
        expected = function(*theirs)
        (found,) = steps[0](*(ours[k] for k in order))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------ gradients


def gradient_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "gradients" in str(w.message)]


def test_gradient_warning_is_said_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_said", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            with sm12x_compile.collect() as report:
                compiled(Layer())(tokens())
            assert report.warnings == [backend.GRADIENTS]
    assert gradient_warnings(caught) == [backend.GRADIENTS]
    assert "torch.inference_mode()" in backend.GRADIENTS and "torch.no_grad()" in backend.GRADIENTS


def test_gradient_graph_is_dynamos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_said", {backend.GRADIENTS})
    spy = Spy(monkeypatch)
    torch.compile(Layer(), backend=spy.backend)(tokens()).sum().backward()
    assert is_untouched(spy)


@pytest.mark.parametrize("case", ["no_grad", "inference_mode", "nothing requires any", "switched on inside"])
def test_gradient_is_needed_or_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_said", {backend.GRADIENTS})
    model = Layer().requires_grad_(case != "nothing requires any")

    def function(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(case == "switched on inside"):
            return model(x)

    contexts = {"inference_mode": torch.inference_mode, "nothing requires any": torch.enable_grad}
    with contexts.get(case, torch.no_grad)(), sm12x_compile.collect() as report:
        compiled(function if case == "switched on inside" else model)(tokens())
    assert report.count("attention") == (case != "switched on inside")
    assert (backend.GRADIENTS in report.warnings) == (case == "switched on inside")


# ------------------------------------------------------------------ report and log


def test_seconds_of_each_stage() -> None:
    with sm12x_compile.collect() as report:
        compiled(attend)(*heads())
    assert list(report.seconds) == ["normalize", "match", "lower"]
    assert all(0 < s < 60 for s in report.seconds.values())
    before = dict(report.seconds)
    with sm12x_compile.collect() as report:
        torch.compile(lambda *x: attend(*x) + 1, backend=sm12x)(*heads())
    assert list(report.seconds) == ["normalize", "match", "lower", "inductor"] and report.seconds != before


def test_one_line_in_the_log_for_each_site(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x))
            return (x @ x.mT).softmax(-1).sqrt() @ x

    with caplog.at_level(logging.INFO, "sm12x_compile"):
        compiled(Model())(tokens())
    lines = [r.getMessage() for r in caplog.records if r.name == "sm12x_compile" and r.levelno == logging.INFO]
    assert len(lines) == 3, lines
    assert lines[0].startswith("first: attention -> sm12x::attention {") and "'mask': 'none'" in lines[0]
    assert lines[1].startswith("second: attention -> sm12x::attention {")
    assert "near miss of attention: " in lines[2] and "between softmax and values" in lines[2]
    assert not [r for r in caplog.records if r.name == "sm12x_compile" and r.levelno > logging.INFO]


def test_the_log_says_why_a_graph_is_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.mT

    with caplog.at_level(logging.INFO, "sm12x_compile"):
        compiled(function)(tokens())
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "sm12x_compile"] == [
        ("INFO", "graph left as it is: contains an autocast region; convert the model: model.to(torch.bfloat16)")
    ]
    caplog.clear()
    monkeypatch.setattr("sm12x_compile.pipeline.normalize", raising)
    with caplog.at_level(logging.INFO, "sm12x_compile"):
        compiled(attend)(*heads())
    (record,) = [r for r in caplog.records if r.name == "sm12x_compile"]
    assert record.levelname == "WARNING" and record.exc_info is not None


def test_nothing_is_logged_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Below a warning nothing is printed unless the user asks."""
    assert not logging.getLogger("sm12x_compile").handlers
    compiled(attend)(*heads())
    assert not [r for r in caplog.records if r.name.startswith("sm12x_compile") and r.levelno >= logging.WARNING]


# ------------------------------------------------------------------ copies


def test_copies_of_a_compiled_model() -> None:
    model, x = Layer(), tokens()
    step = compiled(model)
    expected = step(x)
    torch.testing.assert_close(expected, model(x))
    twin = copy.deepcopy(step)
    with torch.no_grad():
        model.qkv.weight.mul_(-1.0)
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(step(x), model(x))
    assert not torch.allclose(step(x), expected)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_compiled_model_on_disk(how: str) -> None:
    model, x = Layer(), tokens()
    step = compiled(model)
    expected = step(x)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(step))
    else:
        buffer = io.BytesIO()
        torch.save(step, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        torch.testing.assert_close(loaded(x), expected)
    assert report.count("attention") == 1, "compiled by this backend again"


def test_the_registry_is_as_it_was() -> None:
    """Compiling registers nothing."""
    before = {op: [k.name for k in registry.kernels(op)] for op in registry._kernels}
    compiled(attend)(*heads())
    assert before == {op: [k.name for k in registry.kernels(op)] for op in registry._kernels}
