"""Writes the call of ``sm12x::moe`` for a block of experts that was read."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Datum, Element, Expr, Index, Number, Size, Var
from sm12x_compile.index_algebra.expr import argument
from sm12x_compile.index_algebra.index import mul
from sm12x_compile.match import CannotArrange, GraphView, Refusal, refine

from .choice import Choice, are_in_range
from .dispatch import CAPACITY
from .expert_weights import Joined, Weights, is_transposed, join_gate_and_up, lay_out
from .experts import Block, Expert
from .packed_experts import packed_experts
from .routed import FLOATS, Guard, Reader, Unreadable

aten = torch.ops.aten


class Emitter:
    """Lays the operands out as views of the user's tensors, and calls the op."""

    def __init__(self, graph: GraphView, block: Block, weights: Weights, choices: tuple[Choice, ...]) -> None:
        self.graph, self.block, self.weights, self.choices = graph, block, weights, choices
        self.expert: Expert = block.experts[0]
        self.reader: Reader = block.reader

    def emit(self, tags: dict[str, Any]) -> tuple[Node, Node]:
        """The call, and its result laid out as the node that it replaces; fills in the tags as they are known.

        Raises:
            CannotArrange: no view expresses an operand.
            Unreadable: the operands do not fit the op; the refusal says why.
        """
        w, act = self.weights, self.expert.activation
        joined = join_gate_and_up(w)
        tags |= self._tags(joined)
        self._check_guards()
        x = self._input()
        ids = self._joined([self._ids(c) for c in self.choices])
        scale = self._joined([self._weights(c, x) for c in self.choices])
        transposed = is_transposed(w.gate, w.inner, w.width) and is_transposed(w.w2, self.block.feature, w.inner)
        columns = (w.width, self.block.feature, w.inner)
        dims = [(joined.rows, columns[0]), (columns[1], columns[2]), (w.inner, columns[0])]
        optional: dict[str, Any] = {
            "w13_bias": lay_out(self.graph, joined.gate_bias, w.expert, (joined.rows,)),
            "w2_bias": lay_out(self.graph, w.w2_bias, w.expert, (self.block.feature,)),
            "w3_bias": lay_out(self.graph, joined.up_bias, w.expert, (w.inner,)),
        }
        if packed := packed_experts(self.block.node, w, joined, dims, tags):
            w13: Node | None
            w2: Node | None
            w13, w2, more = packed.lay_out(self.graph, w.expert, optional)
            optional |= more
            transposed = False
        else:
            dims = [d[::-1] for d in dims] if transposed else dims
            matrices = zip((joined.gate, w.w2, joined.up), dims, strict=True)
            w13, w2, w3 = (lay_out(self.graph, m, w.expert, d) for m, d in matrices)
            optional["w3"] = w3
            if not {m.meta["val"].dtype for m in (w13, w2, w3) if m is not None} <= FLOATS:
                why = "the experts' weights are no plain floating-point numbers"
                raise Unreadable(Refusal(why, self.block.node, tags))
        extra = {name: value for name, value in optional.items() if value is not None}
        extra |= {"layout": "ekn"} if transposed else {}
        extra |= {"interleaved": True} if joined.interleaved else {}
        extra |= {"activation": act.name, "gated": act.up is not None}
        extra |= {"alpha": act.alpha} if act.name == "swiglu_oai" else {}
        extra |= {"limit": act.limit} if act.limit is not None else {}
        extra |= {"weight_on": "input"} if self.expert.weight_on == "input" else {}
        extra |= {"stacked": True} if w.stacked and packed is None else {}
        wanted, given = self.block.node.meta["val"].dtype, x.meta["val"].dtype
        if wanted == torch.float64 != given:
            raise Unreadable(Refusal("the result is fp64 though the input is not", self.block.node, tags))
        extra |= {"out_dtype": wanted} if wanted != given else {}
        call = self.graph.call(torch.ops.sm12x.moe.default, x, ids, scale, w13, w2, **extra)
        return call, self._restored(call)

    def _tags(self, joined: Joined) -> dict[str, Any]:
        w, act = self.weights, self.expert.activation
        tags: dict[str, Any] = {"experts": w.expert.extent, "top_k": self._top_k(), "activation": act.name}
        tags["form"] = self._form()
        tags["layout"] = "ekn" if is_transposed(w.w2, self.block.feature, w.inner) else "enk"
        if act.up is None:
            tags["gated"] = False
        elif joined.up is not None:
            tags["gate_and_up"] = "apart"
        elif joined.interleaved:
            tags["gate_and_up"] = "interleaved"
        if w.w2_bias is not None or w.gate_bias is not None:
            tags["bias"] = True
        if act.limit is not None:
            tags["limit"] = act.limit
        if act.name == "swiglu_oai":
            tags["alpha"] = act.alpha
        if self.expert.weight_on == "input":
            tags["weight_on"] = "input"
        if w.stacked:
            tags["stacked"] = True
        return tags

    def _form(self) -> str:
        slot = self.block.experts[0].slot
        if self.reader.grouped:
            return "grouped"
        if slot is None or slot.is_const:
            return "loop"
        return "gathered" if slot.has_datum() else "dense"

    def _top_k(self) -> Size:
        total: Size = 0
        for choice in self.choices:
            product: Size = 1
            for v in choice.vars:
                product = mul(product, v.extent)
            total = total + product
        return total

    # ------------------------------------------------------------ operands

    def _input(self) -> Node:
        """``[T, D]``, as the user casts it."""
        node = self._uncast_input()
        for dtype in self.expert.casts:
            node = self.graph.call(aten._to_copy.default, node, dtype=dtype)
        return node

    def _uncast_input(self) -> Node:
        allowed = {*self.block.tokens, self.weights.width}
        element = self.expert.x
        if element.vars() - allowed:
            raise Unreadable(Refusal(f"the experts' input is not one row for each token: {CAPACITY}", element.node))
        if any(ix.has_datum() for ix in element.index):
            raise Unreadable(Refusal("the experts' input is not one row for each token", element.node))
        if element.node.meta["val"].dtype not in FLOATS:
            raise Unreadable(Refusal("the experts' input is no plain floating-point tensor", element.node))
        assert self.expert.given is not None
        for seen in self.reader.trail(self.expert.given):
            if seen.vars() <= allowed and not any(ix.has_datum() for ix in seen.index):
                try:
                    return self._placed(seen, [self.block.tokens, (self.weights.width,)])
                except CannotArrange:
                    continue
        return self._placed(element, [self.block.tokens, (self.weights.width,)])

    def _placed(self, element: Element, groups: list[tuple[Var, ...]]) -> Node:
        """`arrange`, for tensors that hold their tokens in more dimensions than the result, too."""
        split = refine([element])
        parts = [tuple(p for v in group for p in (split[v].terms if v in split else (v,))) for group in groups]
        return self.graph.arrange(element.subs(split), parts)  # type: ignore[arg-type]

    def _ids(self, choice: Choice) -> Node:
        """``[T, K]`` integers; places counted from the end become what they mean."""
        ((atom, _),) = choice.ids.terms.items()
        assert isinstance(atom, Datum)
        ids = self._placed(self._looked_up(atom.element), [self.block.tokens, choice.vars])
        if choice.ids.const != 0:
            ids = self.graph.call(aten.add.Tensor, ids, self.graph.size(choice.ids.const))
        slot = self.block.experts[0].slot
        wraps = slot is not None and slot.has_datum() and not self.reader.grouped
        if wraps and not are_in_range(choice, self.weights.expert.extent) and not _is_nonnegative(choice):
            if self.reader.guards:
                raise Unreadable(Refusal("ids may be negative, which indexes from the end", atom.element.node))
            experts = self.graph.size(self.weights.expert.extent)
            wrapped = self.graph.call(aten.add.Tensor, ids, experts)
            ids = self.graph.call(aten.where.self, self.graph.call(aten.lt.Scalar, ids, 0), wrapped, ids)
        return ids

    def _looked_up(self, element: Element) -> Element:
        """Ids that stand in a table's row for each token (experts chosen by a hash of the token), as one tensor."""
        places = [k for k, ix in enumerate(element.index) if ix.has_datum()]
        if len(places) != 1 or len(element.index[places[0]].terms) != 1 or element.index[places[0]].const != 0:
            return element
        ((atom, c),) = element.index[places[0]].terms.items()
        if not isinstance(atom, Datum) or c != 1 or atom.element.vars() - {*self.block.tokens}:
            return element
        rows = self.graph.call(aten.reshape.default, self._placed(atom.element, [self.block.tokens, ()]), [-1])
        table = self.graph.call(aten.index.Tensor, element.node, [*[None] * places[0], rows])
        row: Index = Index()
        for v in self.block.tokens:
            row = row * v.extent + Index.of(v)
        return Element(table, (*element.index[: places[0]], row, *element.index[places[0] + 1 :]))

    def _weights(self, choice: Choice, x: Node) -> Node:
        """``[T, K]`` routing weights: the product of all factors."""
        dtype = x.meta["val"].dtype
        values = [self._value(factor, choice) for factor in choice.factors]
        nodes = [v for v in values if isinstance(v, Node)]
        if not nodes:
            shape = [self._extent(self.block.tokens), self._extent(choice.vars)]
            nodes = [self.graph.call(aten.ones.default, shape, dtype=dtype, device=x.meta["val"].device)]
        found = nodes[0]
        for value in (*nodes[1:], *(v for v in values if not isinstance(v, Node))):
            found = self.graph.call(aten.mul.Tensor, found, value)
        if found.meta["val"].dtype not in FLOATS:
            found = self.graph.call(aten._to_copy.default, found, dtype=dtype)
        return found

    def _extent(self, variables: tuple[Var, ...]) -> int | Node:
        total: Size = 1
        for v in variables:
            total = mul(total, v.extent)
        return self.graph.size(total)

    def _value(self, expr: Expr, choice: Choice) -> Node | float:
        """A factor as a node ``[T, K]``, or a number."""
        if isinstance(expr, Number):
            return expr.value
        if isinstance(expr, Element):
            allowed = {*self.block.tokens, *choice.vars}
            for seen in self.reader.trail(expr):
                if seen.vars() <= allowed and not any(ix.has_datum() for ix in seen.index):
                    try:
                        return self._placed(seen, [self.block.tokens, choice.vars])
                    except CannotArrange:
                        continue
            picked = self._picked(expr, choice)
            if picked is not None:
                return picked
            made = self.reader.meaning(expr)
        else:
            made = expr
        if isinstance(made, Number):
            return made.value
        if isinstance(made, Apply) and made.op == "cast":
            inner = self._value(made.args[0], choice)
            cast = isinstance(inner, Node)
            return self.graph.call(aten._to_copy.default, inner, dtype=made.detail) if cast else inner
        if isinstance(made, Apply) and made.op == "mul":
            a, b = (self._value(x, choice) for x in made.args)
            if not isinstance(a, Node):
                a, b = b, a
            return self.graph.call(aten.mul.Tensor, a, b) if isinstance(a, Node) else a * b  # type: ignore[operator]
        if isinstance(made, Apply) and made.op == "div":
            a, b = (self._value(x, choice) for x in made.args)
            if isinstance(a, Node) or isinstance(b, Node):
                a = a if isinstance(a, Node) else self.graph.call(aten.full_like.default, b, a)
                return self.graph.call(aten.div.Tensor, a, b)
            return a / b
        if isinstance(made, Apply) and made.op in ("sigmoid", "softmax") and isinstance(expr, Apply):
            scores = self._value(made.args[0], choice)
            if made.op == "sigmoid":
                return self.graph.call(aten.sigmoid.default, scores)
            if len(choice.vars) == 1:  # no choice of another sum beside it
                return self.graph.call(aten.softmax.int, scores, 1)
        if isinstance(made, Apply) and made.op == "not":
            return self.graph.call(aten.logical_not.default, self._value(made.args[0], choice))
        node = expr.node if isinstance(expr, (Element, Apply)) else self.block.node
        raise Unreadable(Refusal("a routing weight is not one number for each token and choice", node))

    def _picked(self, expr: Element, choice: Choice) -> Node | None:
        """``weights[t, ids[t, j]]``"""
        element = self.reader.resolve(expr)
        places = [k for k, ix in enumerate(element.index) if ix == choice.ids]
        if len(places) != 1:
            return None
        every = Var("e", _dim(element.node, places[0]))
        index = tuple(Index.of(every) if k == places[0] else ix for k, ix in enumerate(element.index))
        whole = Element(element.node, index)
        if whole.vars() - {*self.block.tokens, every} or any(ix.has_datum() for ix in index):
            return None
        table = self._placed(whole, [self.block.tokens, (every,)])
        ids = self._ids(choice)
        if not are_in_range(choice, every.extent):
            return None  # out of range there is nothing to gather
        if ids.meta["val"].dtype != torch.int64:
            ids = self.graph.call(aten._to_copy.default, ids, dtype=torch.int64)
        return self.graph.call(aten.gather.default, table, 1, ids)

    def _joined(self, parts: list[Node]) -> Node:
        return parts[0] if len(parts) == 1 else self.graph.call(aten.cat.default, parts, 1)

    def _restored(self, call: Node) -> Node:
        value = self.block.node.meta["val"]
        if value.dim() == 2:
            return call
        shape = [self.graph.size(_dim(self.block.node, k)) for k in range(value.dim())]
        return self.graph.call(aten.view.default, call, shape)

    # ------------------------------------------------------------ rows outside of the experts

    def _check_guards(self) -> None:
        """Rows that the user zeroes must be those that contribute nothing anyway."""
        slots = {e.slot for e in self.block.experts}
        experts = self.weights.expert.extent
        for guard in self.reader.guards:
            if guard.index not in slots or not _is_outside(guard, experts):
                reason = "some rows are zeroed by a comparison that is not whether an expert exists"
                raise Unreadable(Refusal(reason, guard.node))
        for node in self.reader.clamped:
            low, high = argument(node, 1, "min"), argument(node, 2, "max")
            if node.target is aten.clamp_max.default:
                low, high = None, argument(node, 1, "max")
            fits = isinstance(experts, int) and (low is None or low <= 0) and (high is None or high >= experts - 1)
            if not fits:
                raise Unreadable(Refusal("the biases are chosen by clamped ids that miss some experts", node))


def _is_outside(guard: Guard, experts: Size) -> bool:
    if guard.op in ("lt", "le"):
        return guard.bound <= (0 if guard.op == "lt" else -1)
    if not isinstance(experts, int):
        return False
    return guard.bound >= (experts if guard.op == "ge" else experts - 1)


def _is_nonnegative(choice: Choice) -> bool:
    """Whether ids cannot be negative by the op that made them."""
    ((atom, _),) = choice.ids.terms.items()
    if not isinstance(atom, Datum) or choice.ids.const != 0:
        return False
    ids = atom.element.node
    if ids.target in (aten.clamp.default, aten.clamp_min.default):
        low = argument(ids, 1, "min")
        return isinstance(low, int) and low >= 0
    return False


def _dim(node: Node, k: int) -> Size:
    from sm12x_compile.index_algebra.expr import shape_of

    return shape_of(node)[k]


