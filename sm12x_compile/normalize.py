"""Dynamo's graph → normal form: functional, pre-dispatch ATen.

Dynamo's own graph has in-place writes with *no edge* from a cache update to the attention that reads the cache;
post-AOT ATen has lost `scaled_dot_product_attention`, `linear` and `matmul`. Between them lies this form: one
op vocabulary, every write a value, symbolic sizes intact. Mutated inputs become `copy_` nodes at the end.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from . import scalar_index
from .vocabulary import unify

aten = torch.ops.aten


class NotNormalizable(Exception):
    """The graph must stay as Dynamo gave it; the message says why, for the report."""


# Mode switches that Dynamo leaves in a graph. Under inference they change nothing that we keep.
_GRAD_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
}


def example_value(node: Node) -> Any:
    """The fake value that Dynamo or make_fx left on a node."""
    return node.meta.get("val", node.meta.get("example_value"))


def normalize(gm: GraphModule) -> GraphModule:
    """Retrace `gm` into the normal form.

    Returns:
        A graph module with the same placeholders, whose nodes are functional ATen calls with ``meta["val"]``,
        ``nn_module_stack`` and ``stack_trace``, followed by one ``aten.copy_`` a mutated input.

    Raises:
        NotNormalizable: higher-order ops, vmap, autocast, aliased mutations, subclasses, or no fake inputs.
    """
    _refuse_unsupported(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [example_value(n) for n in placeholders]
    mode = _fake_mode(fakes)
    tensors = [f for f in fakes if isinstance(f, torch.Tensor)]
    if any(t.layout != torch.strided for t in tensors):
        raise NotNormalizable("an input is a sparse or otherwise non-strided tensor")
    mutated: list[int] = []
    whole = _returned_inputs(gm, placeholders)

    def functional(*args: Any) -> Any:
        # Pre-dispatch tracing functionalises in Python; the C++ key must not do it a second time.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(keys), FunctionalTensorMode(pre_dispatch=True, export=True):
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            reader = _Reader(gm)
            out = reader.run(*wrapped)
            reader.finish(wrapped, out)
            result = pytree.tree_map_only(FunctionalTensor, _unwrap, out)
            written = [
                (i, _unwrap(a))
                for i, a in enumerate(wrapped)
                if isinstance(a, FunctionalTensor) and _is_written(a)
            ]
        for i, value in written:
            args[i].copy_(value)
        mutated.extend(i for i, _ in written)
        leaves, spec = pytree.tree_flatten(result)
        for position, i in whole.items():
            if i in mutated:
                leaves[position] = args[i]
        return pytree.tree_unflatten(leaves, spec)

    with mode, torch.no_grad(), fx_traceback.preserve_node_meta():
        normal = make_fx(
            functional, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
        )(*fakes)  # fmt: skip
    _refuse_aliased_mutations(gm, placeholders, mutated)
    for node in list(normal.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            normal.graph.erase_node(node)
        elif node.target in (aten.item.default, aten._local_scalar_dense.default):
            # Tracing has put the value of *these* inputs into the graph.
            raise NotNormalizable("reads a tensor's value (item())")
    unify(normal)
    _carry_over(gm, normal)
    normal.recompile()
    return normal


class _Reader(torch.fx.Interpreter):
    """Runs Dynamo's graph with what the normal form has no place for taken out.

    Grad-mode switches do nothing, because the backend only gets here when nothing needs gradients; an index that
    is a 0-d tensor stays a tensor.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.picks: list[_Pick] = []
        self.refusal: str | None = None  # raised at the end: an exception from inside would be decorated

    def run_node(self, n: Node) -> Any:
        given = [self.env[x] for x in n.all_input_nodes if isinstance(self.env[x], FunctionalTensor)]
        stored = [pick for pick in self.picks if pick.is_stored_by(n, self.env)]
        for pick in self.picks:
            self.refusal = self.refusal or pick.refusal(given, stored=pick in stored)
        # `float` adds the guard that holds this number.
        result = float(n.meta["example_value"]) if _is_python_float(n) else super().run_node(n)
        for pick in stored:
            pick.keep()
        if n.target is operator.getitem and isinstance(result, FunctionalTensor):
            base, index = self.fetch_args_kwargs_from_env(n)[0]
            if scalar_index.is_scalar_index(index) and isinstance(base, FunctionalTensor):
                self.picks.append(_Pick(n, base, result))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _GRAD_SWITCHES:
            return None
        if target is operator.getitem and isinstance(args[0], torch.Tensor) and scalar_index.is_scalar_index(args[1]):
            return scalar_index.getitem(*args)
        if target is operator.setitem and scalar_index.is_scalar_index(args[1]):
            return scalar_index.setitem(*args)
        return super().call_function(target, args, kwargs)

    def finish(self, inputs: list[Any], outputs: Any) -> None:
        refusals = (self.refusal, *(pick.refusal_outside(inputs, outputs) for pick in self.picks))
        if any(refusals):
            raise NotNormalizable(next(filter(None, refusals)))


class _Pick:
    """``value = base[index]`` by a 0-d tensor: a view in eager, a copy here, as long as nobody can tell."""

    def __init__(self, node: Node, base: FunctionalTensor, value: FunctionalTensor) -> None:
        self.node, self.base, self.value = node, base, value
        self.keep()

    def keep(self) -> None:
        """Remember what base and value hold, now that they agree."""
        self.base_then, self.value_then = _unwrap(self.base), _unwrap(self.value)

    def is_stored_by(self, node: Node, env: dict[Node, Any]) -> bool:
        """``x[i] += y`` reads, adds in place and stores at the same place: then the copy is x's own again."""
        if node.target is not operator.setitem or node.args[:2] != self.node.args:
            return False
        return env.get(node.args[2]) is self.value  # type: ignore[arg-type]

    def refusal(self, given: list[FunctionalTensor], *, stored: bool) -> str | None:
        """Why a node that runs on `given` can tell the copy from a view."""
        base_written = _unwrap(self.base) is not self.base_then
        value_written = _unwrap(self.value) is not self.value_then
        if base_written and any(_shares(t, self.value) for t in given):
            return "a view taken at the index of a 0-d tensor is used after its base was written"
        if value_written and not stored and any(_shares(t, self.base) for t in given):
            return "a view taken at the index of a 0-d tensor is written"
        return None

    def refusal_outside(self, inputs: list[Any], outputs: Any) -> str | None:
        """Why the caller of the graph can tell the copy from a view."""
        returned = [t for t in pytree.tree_leaves(outputs) if isinstance(t, FunctionalTensor)]
        seen = [t for t in (*inputs, *returned) if isinstance(t, FunctionalTensor) and _shares(t, self.base)]
        if seen and _unwrap(self.value) is not self.value_then:
            return "a view taken at the index of a 0-d tensor is written"
        if seen and any(_shares(t, self.value) for t in returned):
            return "an output is a view taken at the index of a 0-d tensor"
        return None


def _is_python_float(node: Node) -> bool:
    """Whether a node is a float of Python's (``self.scaling``), which ``dynamic=True`` hands over as a tensor."""
    value = node.meta.get("example_value")
    return (
        node.op == "call_method" and node.target == "item"
        and isinstance(value, torch.SymFloat) and value.node.hint is not None
    )  # fmt: skip


def _shares(a: FunctionalTensor, b: FunctionalTensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _unwrap(tensor: FunctionalTensor) -> torch.Tensor:
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _is_written(tensor: FunctionalTensor) -> bool:
    return torch._functionalize_has_data_mutation(tensor.elem)  # type: ignore[attr-defined]  # not in torch's stubs


def written_arguments(node: Node) -> list[Node]:
    """The arguments that a call writes: a mutated input at the end of the graph, a state pool of an op's."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    written = [(k, a.name) for k, a in enumerate(target._schema.arguments) if a.alias_info and a.alias_info.is_write]
    given = [node.args[k] if k < len(node.args) else node.kwargs.get(name) for k, name in written]
    return [x for x in given if isinstance(x, Node)]


def _fake_mode(fakes: list[Any]) -> Any:
    for fake in fakes:
        if isinstance(fake, torch._subclasses.FakeTensor):
            return fake.fake_mode
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    raise NotNormalizable("the graph has no fake tensors to trace with")


def _refuse_unsupported(gm: GraphModule) -> None:
    """Look for what fails in normalising *before* trying: an exception inside vmap leaves a functorch level behind."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise NotNormalizable("autocast is on; convert the model instead: model.to(torch.bfloat16)")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotNormalizable("the graph is traced inside a functorch transform")
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target in ("item", "tolist") and not _is_python_float(node):
            raise NotNormalizable(f"reads a tensor's value ({node.target}())")
        if node.op in ("call_function", "get_attr"):
            target = node.target
            if isinstance(target, HigherOrderOperator):
                raise NotNormalizable(f"contains the higher-order op {target.name()}")
            name = getattr(target, "__qualname__", None) or getattr(target, "__name__", "") or ""
            module = getattr(target, "__module__", "") or ""
            if "autocast" in name:
                raise NotNormalizable("contains an autocast region; convert the model: model.to(torch.bfloat16)")
            if "vmap" in name or "_functorch" in module:
                raise NotNormalizable("contains code under torch.vmap or another functorch transform")
    for node in gm.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if isinstance(value, torch.Tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):
            raise NotNormalizable(f"input {node.name} is a tensor subclass")


def _refuse_aliased_mutations(gm: GraphModule, placeholders: list[Node], mutated: list[int]) -> None:
    """A mutated input that shares storage with another input, or with an output, came out wrong."""
    if not mutated:
        return
    storages = [_storage(example_value(n)) for n in placeholders]
    written = {storages[i] for i in mutated} - {None}
    for i, storage in enumerate(storages):
        if storage in written and storages.count(storage) > 1:
            raise NotNormalizable(f"mutated input {placeholders[i].name} shares storage with another input")
    outputs = pytree.tree_leaves(gm.graph.output_node().args[0])
    whole = _returned_inputs(gm, placeholders)
    for position, out in enumerate(outputs):
        if isinstance(out, Node) and position not in whole and _storage(example_value(out)) in written:
            raise NotNormalizable(f"output {out.name} is a view of an input that the graph writes")


def _returned_inputs(gm: GraphModule, placeholders: list[Node]) -> dict[int, int]:
    """Outputs that are an input as it is, as ``x.to(device)`` of what is there: which output is which input."""
    values = [example_value(n) for n in placeholders]
    found: dict[int, int] = {}
    for position, out in enumerate(pytree.tree_leaves(gm.graph.output_node().args[0])):
        value = example_value(out) if isinstance(out, Node) else None
        if not isinstance(value, torch.Tensor) or _storage(value) is None:
            continue
        for i, given in enumerate(values):
            if _storage(given) == _storage(value) and _is_laid_out_as(value, given):
                found[position] = i
                break
    return found


def _is_laid_out_as(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.dim() != b.dim() or a.is_conj() != b.is_conj() or a.is_neg() != b.is_neg():
        return False
    # Exactly the same expressions: no guard may follow from the question.
    pairs = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=True)
    return all(_same_number(x, y) for x, y in pairs)


def _same_number(x: Any, y: Any) -> bool:
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    return isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt) and x.node.expr == y.node.expr


def _storage(value: Any) -> int | None:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return value.untyped_storage()._cdata
    return None


def _carry_over(gm: GraphModule, normal: GraphModule) -> None:
    """Keep Dynamo's knowledge of the inputs: without it CUDA graphs copy every weight at each step."""
    if "dynamo_compile_id" in gm.meta:
        normal.meta["dynamo_compile_id"] = gm.meta["dynamo_compile_id"]
    for attribute in ("_param_name_to_source", "_dynamo_output_graph"):
        if hasattr(gm, attribute):
            setattr(normal, attribute, getattr(gm, attribute))
    pairs = zip(gm.graph.find_nodes(op="placeholder"), normal.graph.find_nodes(op="placeholder"), strict=True)
    for old, new in pairs:
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
        for key in ("tensor_dict", "steal_arg", "grapharg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]


def declare_constants(normal: GraphModule) -> None:
    """Tell AOTAutograd where tensor constants of the graph come from, as Dynamo would."""
    sources = dict(getattr(normal, "_param_name_to_source", None) or {})
    for name, _ in (*normal.named_parameters(remove_duplicate=False), *normal.named_buffers(remove_duplicate=False)):
        sources.setdefault(name, ConstantSource(source_name=f"sm12x_{name}"))
    normal._param_name_to_source = sources  # type: ignore[assignment]
