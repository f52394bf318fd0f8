"""The normal form: functional, pre-dispatch, with everything that Dynamo knew; and every reason to leave a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import sm12x_compile
from sm12x_compile import scalar_index
from sm12x_compile.normalize import NotNormalizable, example_value, normalize

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A decoder layer with a static cache, as small as can be."""

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4, bias=False)
        self.register_buffer("cache", torch.zeros(2, 1, 2, 6, 2))
        self.register_buffer("factor", torch.tensor([2.0]))
        if static:
            torch._dynamo.mark_static_address(self.cache)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        self.cache[0].index_copy_(2, position, k)
        self.cache[1].index_copy_(2, position, v)
        keep = torch.arange(6) <= position[:, None]
        return self.out(F.scaled_dot_product_attention(q, *self.cache, keep).transpose(1, 2).flatten(2)) * self.factor


LAYER_INPUTS = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 3])


def normal_forms(function: Callable[..., Any], *inputs: Any, **options: Any) -> list[tuple[GraphModule, GraphModule]]:
    """Dynamo's graphs of a call, each with its normal form.

    Raises:
        NotNormalizable: what `normalize` raised.
    """
    found: list[tuple[GraphModule, GraphModule]] = []
    refused: list[NotNormalizable] = []

    def backend(gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            found.append((gm, normalize(gm)))
        except NotNormalizable as error:
            refused.append(error)
        return gm.forward

    torch.compile(function, backend=backend, **options)(*inputs)
    if refused:
        raise refused[0]
    return found


def normal_form(function: Callable[..., Any], *inputs: Any, **options: Any) -> GraphModule:
    ((_, normal),) = normal_forms(function, *inputs, fullgraph=True, **options)
    return normal


def calls(gm: GraphModule, target: Any = None) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and target in (None, n.target)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def heads(count: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 2, 5, 4, generator=generator) for _ in range(count))


# ------------------------------------------------------------------ the form


def test_ops_are_aten_before_dispatch() -> None:
    normal = normal_form(Layer(), *LAYER_INPUTS)
    assert len(calls(normal, aten.scaled_dot_product_attention.default)) == 1
    assert len(calls(normal, aten.linear.default)) == 2
    for node in calls(normal):
        assert isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten", node
        assert isinstance(node.meta["val"], Tensor)
    assert not calls(normal, aten._assert_tensor_metadata.default)


def test_casts_leave_no_assertions() -> None:
    normal = normal_form(lambda x: x.to(torch.float64).float() + 1, torch.ones(3))
    assert len(calls(normal)) == 3 and not calls(normal, aten._assert_tensor_metadata.default)


def test_writes_are_values_and_inputs_are_written_at_the_end() -> None:
    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x[:, 1] = 5.0
        y.add_(x.sum())
        x.mul_(2)
        return (x + y) * z

    normal = normal_form(function, torch.ones(2, 3), torch.ones(3), torch.ones(3))
    nodes = calls(normal)
    written = [n for n in nodes if n.target._schema.is_mutable]
    assert [n.target for n in written] == [aten.copy_.default] * 2
    assert nodes[-2:] == written
    placeholders = normal.graph.find_nodes(op="placeholder")
    assert [n.args[0] for n in written] == [p for p in placeholders if not p.name.startswith("z")][:2]
    given = [torch.full((2, 3), 3.0), torch.arange(3.0), torch.tensor([1.0, -1.0, 2.0])]
    theirs = [t.clone() for t in given]
    (found,) = normal(*given)
    torch.testing.assert_close(found, function(*theirs))
    torch.testing.assert_close(given, theirs)


def test_input_only_read_is_not_written() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 0.0
        return y.relu_()

    assert not [n for n in calls(normal_form(function, torch.ones(3))) if n.target._schema.is_mutable]


def test_cache_written_and_read_has_an_edge() -> None:
    """What Dynamo's graph lacks: the attention reads the value that the update made."""
    normal = normal_form(Layer(), *LAYER_INPUTS)
    (sdpa,) = calls(normal, aten.scaled_dot_product_attention.default)
    for operand in sdpa.args[1:3]:
        behind, waiting = set(), [operand]
        while waiting:
            node = waiting.pop()
            behind.add(node.target)
            waiting += node.all_input_nodes
        assert aten.index_copy.default in behind
    assert len(calls(normal, aten.copy_.default)) == 1


def test_same_numbers_and_same_inputs() -> None:
    ours, theirs = Layer(), Layer()
    theirs.load_state_dict(ours.state_dict())
    ((gm, normal),) = normal_forms(ours, *LAYER_INPUTS)
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] != []
    assert len(normal.graph.find_nodes(op="placeholder")) == len(gm.graph.find_nodes(op="placeholder"))
    compiled = torch.compile(theirs, backend=lambda gm, inputs: normalize(gm).forward)
    expected = Layer()
    expected.load_state_dict(ours.state_dict())
    expected.cache.zero_()
    theirs.cache.zero_()
    torch.testing.assert_close(compiled(*LAYER_INPUTS), expected(*LAYER_INPUTS))
    torch.testing.assert_close(theirs.cache, expected.cache)
    assert expected.cache.abs().sum() > 0


def test_sizes_stay_symbolic() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT).masked_fill(~keep, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    normal = normal_form(function, *heads(), dynamic=True)
    sizes = [s for n in calls(normal) if isinstance(n.meta["val"], Tensor) for s in n.meta["val"].shape]
    assert any(isinstance(s, torch.SymInt) for s in sizes)
    placeholders = normal.graph.find_nodes(op="placeholder")
    other = [torch.randn(4, 4, 7, 6) for _ in range(3)]
    symbols = {str(s): n for p in placeholders if isinstance(p.meta["val"], Tensor)
               for s, n in zip(p.meta["val"].shape, other[0].shape, strict=True)}  # fmt: skip
    tensors = iter(other)
    given = [symbols[str(p.meta["val"])] if isinstance(p.meta["val"], torch.SymInt) else next(tensors)
             for p in placeholders]  # fmt: skip
    torch.testing.assert_close(normal(*given)[0], function(*other))


def test_grad_mode_switches_are_dropped() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.set_grad_enabled(False):
            y = y + 1
        torch.set_grad_enabled(False)
        return y

    with torch.enable_grad():
        ((gm, normal),) = normal_forms(function, torch.ones(2))
    assert [n for n in gm.graph.nodes if n.target is torch._C._set_grad_enabled], "nothing to drop"
    assert [n.target for n in calls(normal)] == [aten.mul.Tensor, aten.add.Tensor]
    with torch.inference_mode():
        normal = normal_form(lambda x: x.sin().cos(), torch.ones(2))
    assert [n.target for n in calls(normal)] == [aten.sin.default, aten.cos.default]


def test_inference_mode_inside() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x.sin()

    ((gm, normal),) = normal_forms(function, torch.ones(2))
    assert [n for n in gm.graph.nodes if "inference" in str(n.target)], "nothing to drop"
    assert [n.target for n in calls(normal)] == [aten.sin.default]


# ------------------------------------------------------------------ what Dynamo knew


def test_modules_and_lines_are_kept() -> None:
    model = nn.Sequential(Layer(), nn.ReLU())

    def function(x: Tensor, position: Tensor) -> Tensor:
        return model[1](model[0](x, position))

    normal = normal_form(function, *LAYER_INPUTS)
    (sdpa,) = calls(normal, aten.scaled_dot_product_attention.default)
    path, kind = list(sdpa.meta["nn_module_stack"].values())[-1]
    assert "0" in path and kind is Layer
    assert "F.scaled_dot_product_attention(q, *self.cache, keep)" in sdpa.meta["stack_trace"]
    (relu,) = calls(normal, aten.relu.default)
    assert list(relu.meta["nn_module_stack"].values())[-1][1] is nn.ReLU
    for linear in calls(normal, aten.linear.default):
        assert list(linear.meta["nn_module_stack"].values())[-1][1] is nn.Linear
        assert "self.qkv(x)" in linear.meta["stack_trace"] or "self.out(" in linear.meta["stack_trace"]


def test_sources_of_the_inputs_are_kept() -> None:
    ((gm, normal),) = normal_forms(Layer(static=True), *LAYER_INPUTS)
    pairs = list(zip(gm.graph.find_nodes(op="placeholder"), normal.graph.find_nodes(op="placeholder"), strict=True))
    assert len(pairs) == 7
    for old, new in pairs:
        assert new._dynamo_source is old._dynamo_source
        assert new.meta["tensor_dict"] is old.meta["tensor_dict"]
        assert example_value(new).fake_mode is example_value(old).fake_mode
    assert normal.meta["dynamo_compile_id"] is gm.meta["dynamo_compile_id"]
    assert normal._param_name_to_source is gm._param_name_to_source


@pytest.mark.parametrize("static", [False, True])
def test_static_inputs_are_what_inductor_finds_without_us(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, buffers and static caches stay where they are; else CUDA graphs copy them at each step."""
    seen: list[list[int]] = []
    original = inductor.compile_fx

    def inner(gm: GraphModule, inputs: list[Tensor], **given: Any) -> Callable[..., Any]:
        seen.append(sorted(given["static_input_idxs"]))
        return gm.forward

    def compile_fx(gm: GraphModule, inputs: list[Tensor], **given: Any) -> Any:
        return original(gm, inputs, inner_compile=inner, **{k: v for k, v in given.items() if v is not None})

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    model = Layer(static)
    torch.compile(model, backend=compile_fx)(*LAYER_INPUTS)
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        torch.compile(model, backend=sm12x_compile.sm12x)(*LAYER_INPUTS)
    assert report.count("attention") == 1 and not report.warnings, str(report)
    without, ours = seen
    assert ours == without
    assert len(without) == 5, "two weights, a bias and two buffers"


# ------------------------------------------------------------------ what is left alone


def state_of_torch() -> tuple[Any, ...]:
    """Levels and modes that a failed trace might leave behind."""
    return (
        torch._C._functorch.maybe_current_level(), torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(), torch._ops._len_torch_dispatch_stack_pre_dispatch(),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(),
        torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Functionalize),
        torch.fx.traceback.has_preserved_node_meta(), torch._guards.TracingContext.try_get(),
    )  # fmt: skip


def in_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v)
    return out.float()


def out_of_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return attend(q, k, v)


def with_cond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, lambda x: x * 2, lambda x: x * 3, (attend(q, k, v),))


def with_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(attend, q, k, v, use_reentrant=False)


def under_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(attend)(q, k, v)


def under_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda x: attend(x, k, v).sum())(q)


def output_is_a_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k.mul_(2)
    return attend(q, k, v), k.transpose(1, 2)


def writes_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k.mul_(2)
    return attend(q, k, v)


def same_storage() -> tuple[Tensor, ...]:
    q, kv = heads(2)
    return q, kv[:, :, :3], kv[:, :, 2:]


REFUSED: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]], str]] = {
    "autocast inside": (in_autocast, heads, "contains an autocast region; convert the model: model.to(torch.bfloat16)"),
    "autocast off inside": (
        out_of_autocast, heads, "contains an autocast region; convert the model: model.to(torch.bfloat16)"
    ),
    "cond": (with_cond, heads, "contains the higher-order op cond"),
    "vmap": (under_vmap, heads, "contains code under torch.vmap or another functorch transform"),
    "grad": (under_grad, heads, "contains code under torch.vmap or another functorch transform"),
    "a view of a written input": (output_is_a_view, heads, "is a view of an input that the graph writes"),
    "written input overlaps": (writes_k, same_storage, "shares storage with another input"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_that_are_left_alone(name: str) -> None:
    function, inputs, sentence = REFUSED[name]
    before = state_of_torch()
    with pytest.raises(NotNormalizable) as error:
        normal_forms(function, *inputs())
    assert sentence in str(error.value)
    assert state_of_torch() == before
    # And through the backend: said in the report, and as in eager.
    torch._dynamo.reset()
    theirs, ours = inputs(), inputs()
    expected = function(*theirs)
    with sm12x_compile.collect() as report:
        found = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(*ours)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)
    assert any(w.startswith("a graph was left as it is: ") and sentence in w for w in report.warnings), report.warnings
    assert not report.sites
    assert state_of_torch() == before


def test_the_overlapping_input_and_the_output_are_named() -> None:
    with pytest.raises(NotNormalizable, match=r"^mutated input l_k_ shares storage with another input$"):
        normal_forms(writes_k, *same_storage())
    torch._dynamo.reset()
    with pytest.raises(NotNormalizable, match=r"^output transpose is a view of an input that the graph writes$"):
        normal_forms(output_is_a_view, *heads())


def counts(count: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As a static cache counts: moved to where it is already, and written there."""
    count = count.to(q.device)
    count.add_(q.shape[2])
    return attend(q, k, v), count


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_written_input_that_is_returned_stays_the_callers_own(codegen: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(counts, backend=sm12x_compile.sm12x, options={"codegen": codegen}, fullgraph=True)
    count, tensors = torch.zeros((), dtype=torch.int64), heads()
    with sm12x_compile.collect() as report:
        for step in (1, 2):
            out, returned = compiled(count, *tensors)
            assert returned.data_ptr() == count.data_ptr() and count.item() == step * tensors[0].shape[2]
            torch.testing.assert_close(out, attend(*tensors))
    assert report.count("attention") == 1 and not report.warnings


def test_overlapping_inputs_only_read_are_fine() -> None:
    q, k, v = same_storage()
    assert not calls(normal_form(attend, q, k, v), aten.copy_.default)


def test_checkpoint_is_left_alone() -> None:
    with torch.enable_grad(), pytest.raises(
        NotNormalizable, match=r"^contains the higher-order op tag_activation_checkpoint$"
    ):
        normal_forms(with_checkpoint, *(x.requires_grad_() for x in heads()))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ambient_autocast_is_left_alone(device: str) -> None:
    before = state_of_torch()
    with _autocast_flag(device), pytest.raises(
        NotNormalizable, match=r"^autocast is on; convert the model instead: model\.to\(torch\.bfloat16\)$"
    ):
        normal_forms(attend, *heads())
    assert state_of_torch() == before


class _autocast_flag:
    """What `torch.autocast` sets; that one switches itself off for "cuda" where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device, True)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.device, False)


def test_reading_values_is_left_alone() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        return x * n.item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True), pytest.raises(
        NotNormalizable, match=r"^reads a tensor's value \(item\(\)\)$"
    ):
        normal_forms(function, torch.ones(3), torch.tensor(2.0))


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)


def test_graphs_of_other_makes() -> None:
    """What Dynamo does not give today, but a caller of `normalize` may."""
    gm = traced(lambda x: x + 1, torch.ones(2))
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_method("tolist", (gm.graph.find_nodes(op="placeholder")[0],))
    with pytest.raises(NotNormalizable, match=r"^reads a tensor's value \(tolist\(\)\)$"):
        normalize(gm)

    with pytest.raises(NotNormalizable, match=r"^the graph has no fake tensors to trace with$"):
        normalize(symbolic_trace(lambda x: x + 1))

    def inside(x: Tensor) -> Tensor:
        with pytest.raises(NotNormalizable, match=r"^the graph is traced inside a functorch transform$"):
            normalize(plain)
        return x

    plain = traced(lambda x: x + 1, torch.ones(2))
    torch.vmap(inside)(torch.ones(2))
    assert len(calls(normalize(plain))) == 1


def test_unusual_tensors_are_left_alone() -> None:
    with pytest.raises(NotNormalizable, match=r"^input l_x_ is a tensor subclass$"):
        normal_forms(lambda x: x + 1, TwoTensor(torch.ones(2), torch.ones(2)))
    gm = traced(lambda x: x * 2.0, torch.eye(3))
    (placeholder,) = gm.graph.find_nodes(op="placeholder")
    placeholder.meta["val"] = placeholder.meta["val"].fake_mode.from_tensor(torch.eye(3).to_sparse())
    with pytest.raises(NotNormalizable, match=r"^an input is a sparse or otherwise non-strided tensor$"):
        normalize(gm)


@pytest.mark.parametrize("where", ["at once", "in the middle"])
def test_a_failure_while_tracing_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise ZeroDivisionError("injected")

    def function(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        return attend(q, k, v)[..., i] if where == "in the middle" else q[i] + 1

    monkeypatch.setattr(scalar_index, "getitem", failing)
    before = state_of_torch()
    with sm12x_compile.collect() as report:
        step = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True)
        torch.testing.assert_close(step(*heads(), torch.tensor(1)), function(*heads(), torch.tensor(1)))
    assert len(report.warnings) == 1 and "ZeroDivisionError: injected" in report.warnings[0]
    assert state_of_torch() == before
    monkeypatch.undo()
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        torch.compile(attend, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(*heads())
    assert report.count("attention") == 1
