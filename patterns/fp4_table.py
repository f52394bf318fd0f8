"""What a byte and a scale become: the user's decoding, run on every byte and every scale there is.

Decoding four-bit weights is pointwise in two bytes: the packed one and its scale. So it needs no list of spellings
(tables, `ldexp`, `exp2`, shifts into the exponent, arithmetic on bits): one element is followed back through the index
algebra, and every op on the way is run on all 256 x 256 combinations. What comes out is compared with the definition,
bit for bit: OCP Microscaling Formats v1.0 (2023), sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from sm12x_compile.index_algebra import Cases, Element, FloorDiv, Index, Mod, Number, Position, Var, step
from sm12x_compile.index_algebra.expr import args_of, broadcast, operand
from sm12x_compile.index_algebra.layout import layout_step, look
from sm12x_compile.ops.mxfp4 import dequantize_fp4

aten = torch.ops.aten

# Element by element like those that carry PyTorch's tag.
_POINTWISE = {
    aten._to_copy.default, aten.__and__.Scalar, aten.__and__.Tensor, aten.__or__.Scalar, aten.__or__.Tensor,
    aten.__xor__.Scalar, aten.__xor__.Tensor, aten.floor_divide.default, aten.floor_divide.Scalar, aten.view.dtype,
    aten.fill.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.square.default,
    aten.float_power.Scalar, aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor, aten.positive.default,
    aten.special_exp2.default, aten.type_as.default, aten.logical_and.default, aten.logical_or.default,
}  # fmt: skip
_LARGEST_CONSTANT = 1 << 16


Ranges = tuple[tuple[int, int], ...]


class Undecodable(Exception):
    """An element is not made of bytes alone, or an op is not understood.

    With `positional`, its value depends on where it stands: perhaps the columns are another dimension.
    """

    def __init__(self, reason: str, node: Node, *, positional: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.node, self.positional = reason, node, positional


def is_bytes(node: Node) -> bool:
    """Whether a tensor may hold packed codes or scales."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.element_size() == 1 and value.dtype != torch.bool


@dataclass
class Decoding:
    """Evaluates elements for all bytes (dim 0) and all scales (dim 1) at once.

    Attributes:
        packed, scales: the tensors whose elements are the two bytes.
        reads: which element of them was read.
    """

    packed: Node
    scales: Node
    reads: dict[Node, Element] = field(default_factory=dict)
    _known: dict[Any, Tensor] = field(default_factory=dict)
    _constants: dict[Node, Any] = field(default_factory=dict)
    _where: dict[Index, Ranges] = field(default_factory=dict)  # what is known of indices in the piece looked at

    def value(self, element: Element) -> Tensor:
        """``[256, 256]`` or broadcastable; 0-d where the element is that of a 0-d tensor.

        Raises:
            Undecodable: the element depends on something else, or on where it stands.
        """
        key = (element, frozenset(self._where.items()))
        if key not in self._known:
            found = self._value(element)
            if (found.dim() == 0) != (element.node.meta["val"].dim() == 0):
                # Type promotion tells 0-d tensors from others.
                found = found.reshape(()) if found.numel() == 1 and found.dim() else found.reshape(1, 1)
            self._known[key] = found
        return self._known[key]

    def _value(self, element: Element) -> Tensor:
        node = element.node
        if node in (self.packed, self.scales):
            return self._byte(element)
        constant = self._constant(node)
        if isinstance(constant, Tensor) and (found := _uniform(constant, element.index)) is not None:
            return found
        looked_up = self._lookup(element)
        if looked_up is not None:
            return looked_up
        moved = layout_step(element)
        if isinstance(moved, Element):
            return self.value(moved)
        if isinstance(moved, Cases):
            return self._agreed(moved, node)
        if isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in node.target.tags or node.target in _POINTWISE
        ):
            return self._applied(element)
        made = step(element)
        if isinstance(made, (Position, Number)):
            number = _const(made.index, node) if isinstance(made, Position) else made.value
            return torch.tensor(number, dtype=node.meta["val"].dtype)
        raise Undecodable(_what(node), node, positional=isinstance(constant, Tensor))

    def _byte(self, element: Element) -> Tensor:
        node = element.node
        if self.reads.setdefault(node, element) != element:
            what = "the two codes of a byte are" if node is self.packed else "elements that share a scale are"
            raise Undecodable(f"{what} not neighbours along one dimension", node)
        column = torch.arange(256, dtype=torch.uint8).view(node.meta["val"].dtype)
        return column[:, None] if node is self.packed else column[None, :]

    def _agreed(self, cases: Cases, node: Node) -> Tensor:
        """The value of all pieces that there are, if they agree: rows that are decoded in several chunks."""
        span = cases.index.bounds()
        if span is None or not all(isinstance(n, int) for n in (*span, *(n for p in cases.pieces for n in p[:2]))):
            raise Undecodable("elements are decoded in pieces whose sizes the run decides", node)
        before = self._where
        left = before.get(cases.index, ((span[0], span[1] + 1),))  # type: ignore[operator]
        values = []
        for low, high, piece in cases.pieces:
            taken = _clipped(left, low, high)  # type: ignore[arg-type]
            left = (*_clipped(left, span[0], low), *_clipped(left, high, span[1] + 1))  # type: ignore[arg-type, operator]
            if not taken:
                continue
            if not isinstance(piece, Element):
                raise Undecodable("some elements are constants", node)
            if piece.node.target in _UNWRITTEN:
                raise Undecodable("not all elements are written", node)
            self._where = {**before, cases.index: taken}
            try:
                values.append(self.value(piece))
            finally:
                self._where = before
        if any(v.shape != values[0].shape or not same_bits(v, values[0]) for v in values[1:]):
            raise Undecodable("elements are decoded differently by where they stand", node, positional=True)
        return values[0]

    def _applied(self, element: Element) -> Tensor:
        """A pointwise op on the values of its operands."""
        node = element.node

        def value(x: Any) -> Any:
            if not isinstance(x, Node):
                return x
            if not isinstance(x.meta["val"], Tensor):
                raise Undecodable(_what(node), node)
            made = broadcast(x, element.index)
            assert isinstance(made, Element)
            return self.value(made)

        if node.target is aten.view.dtype and _itemsize(operand(node)) != _itemsize(node):
            raise Undecodable("bytes are joined to wider words", node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        kwargs = {k: v for k, v in kwargs.items() if k in _MEANINGFUL or isinstance(v, Tensor)}
        if node.target is aten.fill.Scalar:
            return torch.tensor(args[1], dtype=node.meta["val"].dtype)
        with _disable_current_modes(), torch.no_grad():
            args = _broadcast(args)
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        if result.dtype != node.meta["val"].dtype:
            raise Undecodable(f"{node.target} gives {result.dtype} here, {node.meta['val'].dtype} there", node)
        return result

    # ------------------------------------------------------------ tables

    def _constant(self, node: Node) -> Any:
        """The value of a small tensor (or several) that is computed from constants alone."""
        if node not in self._constants:
            self._constants[node] = None
            self._constants[node] = self._computed(node)
        return self._constants[node]

    def _computed(self, node: Node) -> Any:
        if node.target is operator.getitem:
            whole = self._constant(operand(node))
            return None if whole is None else whole[args_of(node)[1]]
        fake: Any = node.meta.get("val")
        if node.op == "get_attr":
            assert node.graph.owning_module is not None
            value: Any = getattr(node.graph.owning_module, str(node.target), None)
            real = isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
            with _disable_current_modes():
                return value.detach().cpu() if real and value.numel() <= _LARGEST_CONSTANT else None
        fakes = fake if isinstance(fake, (tuple, list)) else [fake]
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        tags = node.target.tags
        if torch.Tag.nondeterministic_seeded in tags or node.target._schema.is_mutable or node.target in _UNWRITTEN:
            return None
        if not all(isinstance(f, Tensor) and all(isinstance(s, int) for s in f.shape) for f in fakes):
            return None
        if sum(f.numel() for f in fakes) > _LARGEST_CONSTANT:
            return None
        inputs = {n: self._constant(n) for n in node.all_input_nodes}
        if any(v is None for v in inputs.values()):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: inputs[n])
        kwargs = {k: (torch.device("cpu") if k == "device" else v) for k, v in kwargs.items()}
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        with _disable_current_modes(), torch.no_grad():
            return node.target(*args, **kwargs)

    def _lookup(self, element: Element) -> Tensor | None:
        """An element of a constant table at a place that the bytes decide."""
        node, index = element.node, element.index
        picks: dict[int, Element]
        rest: list[Index]
        if node.target is aten.index.Tensor:
            source, given = args_of(node)[:2]
            ranks = {p.meta["val"].dim() for p in given if p is not None}
            if len(ranks) != 1 or given[0] is None or any(p is None for p in given):
                return None
            (rank,) = ranks
            elements = [broadcast(p, index[:rank]) for p in given]
            picks = {k: e for k, e in enumerate(elements) if isinstance(e, Element)}
            rest = list(index[rank:])
        elif node.target is aten.embedding.default:
            source, place = args_of(node)[:2]
            picks, rest = {0: Element(place, index[:-1])}, [index[-1]]
        elif node.target is aten.take.default:
            source, place = args_of(node)[:2]
            table = self._constant(source)
            return None if table is None else table.flatten()[self._places(Element(place, index))]
        elif node.target is aten.index_select.default:
            source, dim, place = args_of(node)[:3]
            dim %= len(index)
            picks, rest = {dim: Element(place, (index[dim],))}, [ix for k, ix in enumerate(index) if k != dim]
        elif node.target is aten.gather.default:
            return self._gathered(element)
        else:
            return None
        table = self._constant(source)
        if table is None:
            return None
        left = iter(rest)
        where = [self._places(picks[k]) if k in picks else _const(next(left), node) for k in range(table.dim())]
        return table[tuple(where)]

    def _gathered(self, element: Element) -> Tensor | None:
        """``table.expand(..., 16).gather(-1, codes)``"""
        source, dim, place = args_of(element.node)[:3]
        dim %= len(element.index)
        slot = Var("code", source.meta["val"].shape[dim])
        index = (*element.index[:dim], Index.of(slot), *element.index[dim + 1 :])
        at = look(Element(source, index))
        table = self._constant(at.node)
        if table is None:
            return None
        where = self._places(Element(place, element.index))
        return table[tuple(where if ix.var is slot else _const(ix, element.node) for ix in at.index)]

    def _places(self, element: Element) -> Tensor:
        places = self.value(element)
        if places.dtype not in (torch.int32, torch.int64):
            raise Undecodable("a table is indexed by something but integers", element.node)
        return places.long()


def _broadcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tables of one shape: `ldexp` would resize its result, with a warning."""
    tables = [a for a in args if isinstance(a, Tensor) and a.dim()]
    shape = torch.broadcast_shapes(*(t.shape for t in tables)) if tables else ()
    return tuple(a.expand(shape) if isinstance(a, Tensor) and a.dim() else a for a in args)


def _clipped(ranges: Ranges, low: int, high: int) -> Ranges:
    """The parts of ranges that lie within ``low <= i < high``."""
    return tuple((max(a, low), min(b, high)) for a, b in ranges if max(a, low) < min(b, high))


_MEANINGFUL = {"dtype", "alpha", "rounding_mode", "nan", "posinf", "neginf", "min", "max"}
_UNWRITTEN = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


def _uniform(constant: Tensor, index: tuple[Index, ...]) -> Tensor | None:
    """An element of a constant, if it is the same for all values of the variables: even columns, say."""
    variables = sorted(set().union(*(ix.vars() for ix in index)), key=lambda v: v.serial)
    if math.prod(v.extent for v in variables if isinstance(v.extent, int)) > _LARGEST_CONSTANT:
        return None
    if any(ix.has_datum() for ix in index) or not all(isinstance(v.extent, int) for v in variables):
        return None
    axes = torch.meshgrid(*(torch.arange(v.extent) for v in variables), indexing="ij") if variables else ()
    at = dict(zip(variables, axes, strict=True))
    found = constant[tuple(_evaluated(ix, at) for ix in index)]
    first = found.flatten()[0] if found.numel() else None
    return first if first is not None and same_bits(found, first.expand_as(found)) else None


def _evaluated(ix: Index, at: dict[Var, Tensor]) -> Tensor:
    total = torch.tensor(ix.const)
    for atom, c in ix.terms.items():
        if isinstance(atom, Var):
            value = at[atom]
        elif isinstance(atom, FloorDiv):
            value = _evaluated(atom.x, at) // atom.k
        else:
            assert isinstance(atom, Mod)
            value = _evaluated(atom.x, at) % atom.k
        total = total + value * c
    return total


def _itemsize(node: Node) -> int:
    return int(node.meta["val"].element_size())


def _const(ix: Index, node: Node) -> int:
    if not ix.is_const or not isinstance(ix.const, int):
        raise Undecodable("an element's value depends on where it stands", node, positional=True)
    return ix.const


def _what(node: Node) -> str:
    if node.op == "placeholder":
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        return f"a weight is made of packed codes and of {dtype} numbers, not of E8M0 scales alone"
    return f"{node.target} is not understood as a part of decoding"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN equal to NaN, minus zero equal to zero."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


# ---------------------------------------------------------------- the definition

NVFP4 = "its scales are E4M3 numbers: NVFP4, which has other kernels than MXFP4"


@lru_cache(maxsize=8)
def defined(dtype: torch.dtype) -> Tensor:
    """``[2, 256, 256]``: what a packed byte (dim 1) and a scale (dim 2) give for the low and the high nibble."""
    packed = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 256, 16)
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(256, 256, 1)
    both = dequantize_fp4("mxfp4_weight", packed, scales, "mxfp4", dtype=torch.float64)[..., :2]
    return both.permute(2, 0, 1).to(dtype)


def compare(low: Tensor, high: Tensor) -> tuple[str | None, dict[str, Any]]:
    """Why a decoding of even and odd elements is not MXFP4's, or None; and tags for the two scales at the ends.

    Scale 255 is NaN by definition and stands in no valid weight; code that computes ``2 ** 128`` gives infinity. Scale
    0 is 2^-127, which code that shifts the scale into the exponent's bits takes for zero. These are told, not refused.
    """
    found = torch.stack([low.expand(256, 256), high.expand(256, 256)])
    wanted = defined(found.dtype)
    # An op that decodes exactly keeps what fp16 cannot hold, and eager makes infinite or zero.
    kept: dict[str, Any] = {"beyond_fp16": "kept here"} if found.dtype == torch.float16 else {}
    if _equal(found, wanted):
        return None, kept
    if _equal(found[:, :, 1:255], wanted[:, :, 1:255]):
        tags = kept
        if not _equal(found[:, :, 0], wanted[:, :, 0]):
            if found[:, :, 0].abs().max() > wanted[:, :, 0].abs().max():
                return "scale byte 0 stands for 2^-127 in MXFP4", {}
            tags["scale_0"] = "zero in eager, 2^-127 here"
        if not _equal(found[:, :, 255], wanted[:, :, 255]):
            if found[:, 1:8, 255].isfinite().all():
                return "scale byte 255 stands for NaN in MXFP4, here for a number", {}
            tags["scale_255"] = "infinite in eager, NaN here"
        return None, tags
    return _difference(found, wanted), {}


def _difference(found: Tensor, wanted: Tensor) -> str:
    if _equal(found.flip(0)[:, :, 1:255], wanted[:, :, 1:255]):
        return (
            "the first of two neighbours is in the high nibble; MXFP4 has it in the low one: "
            "swap them once with (b >> 4) | (b << 4)"
        )
    bytes_ = torch.arange(256, dtype=torch.uint8)
    e4m3 = wanted[:, :, 127:128].double() * bytes_.view(torch.float8_e4m3fn).double()
    if _equal(found, e4m3.to(found.dtype)):
        return NVFP4
    differs = ~((found == wanted) | (found.isnan() & wanted.isnan()))
    differs[:, :, (0, 255)] = False
    # At a scale of one the codes show; then the scales.
    at = differs[:, :, 127].nonzero()
    if len(at):
        nibble, byte = at[0].tolist()
        code = (byte >> 4) if nibble else byte & 15
        value, right = (t[nibble, byte, 127].item() for t in (found, wanted))
        return f"code {code} at scale byte 127 stands for {value:g}, in MXFP4 for {right:g}"
    nibble, byte, scale = differs.nonzero()[0].tolist()
    value, right = (t[nibble, byte, scale].item() for t in (found, wanted))
    return f"scale byte {scale} makes {value:g} of byte {byte}, in MXFP4 {right:g}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return same_bits(a, b)
