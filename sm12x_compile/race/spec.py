"""The call of a semantic op as plain facts: operands are drawn from it, verdicts are kept under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops import OPS
from ..registry import Call

_MASKS = {
    "q_offset": "B", "kv_len": "B", "key_padding": "BT", "q_segments": "BS", "k_segments": "BT", "bias": "BHST",
    "sinks": "H",
}  # fmt: skip
_STEP = {
    "q": "BSHK", "k": "BSHK", "v": "BSHV", "g": "BSHK", "beta": "BSH", "state_pool": "PHKV", "slots": "B",
    "journal": "P2DHW", "accepted": "B", "turn": "B",
}  # fmt: skip
# The dimensions of each op's tensors, one letter each.
DIMS: dict[str, dict[str, str]] = {
    "attention": {"q": "BHSD", "k": "BGTD", "v": "BGTV", **_MASKS},
    "mla": {"q_nope": "BHSN", "q_rope": "BHSR", "latent": "BTL", "k_rope": "BTR", **_MASKS},
    "moe": {"x": "TD", "topk_ids": "TK", "topk_weights": "TK"},
    "moe_route": {"logits": "TE"},
    "mxfp4_linear": {"x": "TK"},
    "gated_delta_rule": {
        "q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTHK", "beta": "BTH", "initial_state": "BHKV",
    },
    "gated_delta_rule_update": _STEP,
    "gated_delta_rule_verify": _STEP,
    "causal_conv1d": {"x": "BCT", "initial_state": "BCL"},
    "causal_conv1d_update": {"x": "BCS", "state_pool": "PCL", "slots": "B"},
}  # fmt: skip
RUNNING = "BSTP"  # batch, tokens, keys, slots: what differs between calls of one model
EXACT_UP_TO = 16


class CannotRace(RuntimeError):
    """No race can be held for this call; the message says why."""


@dataclass(frozen=True)
class TensorSpec:
    """Sizes, strides (in elements) and dtype of one operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def extent(self) -> int:
        """Elements of memory from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        return self.extent * self.dtype.itemsize


@dataclass(frozen=True)
class Spec:
    """One call: its tensors and its plain values, by argument name."""

    op: str
    tensors: dict[str, TensorSpec]
    values: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def flops(self) -> float:
        """The op's own cost of this call."""
        cost = OPS[self.op].cost
        if cost is None:
            return float(sum(t.extent for t in self.tensors.values()))
        like = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in self.tensors.items()}
        return cost({**self.values, **like}).flops


def describe(call: Call) -> Spec:
    """The facts of a call; symbolic sizes by their hints.

    Raises:
        CannotRace: an argument is neither a strided tensor nor a plain value.
    """
    tensors: dict[str, TensorSpec] = {}
    values: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                raise CannotRace(f"{name} is {value.layout}")
            sizes = (tuple(map(Call.hint, value.shape)), tuple(map(Call.hint, value.stride())))
            tensors[name] = TensorSpec(*sizes, value.dtype)
        elif isinstance(value, torch.SymInt):
            values[name] = Call.hint(value)
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            values[name] = value
        else:
            raise CannotRace(f"{name} is a {type(value).__name__}")
    return Spec(call.op, tensors, values)


def _letters(op: str, name: str, rank: int) -> str:
    letters = DIMS.get(op, {}).get(name, "")
    if op == "mxfp4_linear" and name == "x":
        return "T" * (rank - 1) + "K"
    return letters if len(letters) >= rank else ""


def sizes(spec: Spec) -> dict[str, int]:
    """The size behind every letter; a dimension of size 1 is broadcast where another operand has more."""
    found: dict[str, int] = {}
    for name, tensor in spec.tensors.items():
        for letter, size in zip(_letters(spec.op, name, len(tensor.shape)), tensor.shape, strict=False):
            found[letter] = max(size, found.get(letter, 0))
    return found


def shrunk(spec: Spec, flops: float) -> Spec:
    """The same call, with fewer tokens, keys or rows until it takes at most so many FLOPs; strides are kept."""
    while spec.flops > flops:
        found = {letter: size for letter, size in sizes(spec).items() if letter in RUNNING and size > 1}
        if not found:
            return spec
        largest = max(found, key=lambda letter: found[letter])
        spec = _resized(spec, largest, found[largest], -(-found[largest] // 2))
    return spec


def _resized(spec: Spec, letter: str, old: int, new: int) -> Spec:
    tensors = {}
    for name, tensor in spec.tensors.items():
        letters = _letters(spec.op, name, len(tensor.shape)).ljust(len(tensor.shape), "?")
        pairs = zip(letters, tensor.shape, strict=False)
        tensors[name] = replace(tensor, shape=tuple(new if (x, s) == (letter, old) else s for x, s in pairs))
    return replace(spec, tensors=tensors)


def bucket(spec: Spec) -> dict[str, Any]:
    """What the verdict of a race is kept under: a JSON object that equal enough calls share.

    Batch, tokens, keys and slots beyond 16 are rounded up to a power of two; everything else stays as it is. Of the
    strides only their order counts, which are zero, and whether rows are aligned to 16 bytes.
    """
    return {
        "op": spec.op,
        "tensors": {name: _layout(spec.op, name, tensor) for name, tensor in sorted(spec.tensors.items())},
        "values": {name: _rounded_value(name, value) for name, value in sorted(spec.values.items())},
    }


def _layout(op: str, name: str, tensor: TensorSpec) -> str:
    rank = len(tensor.shape)
    letters = _letters(op, name, rank).ljust(rank, "?")
    rounded = [_rounded(s) if x in RUNNING else s for x, s in zip(letters, tensor.shape, strict=False)]
    order = sorted(range(rank), key=lambda d: (-tensor.stride[d], d))
    broadcast = [d for d in range(rank) if tensor.stride[d] == 0 and tensor.shape[d] > 1]
    steps = [s for s, n in zip(tensor.stride, tensor.shape, strict=True) if n > 1 and s != 1]
    aligned = all(s * tensor.dtype.itemsize % 16 == 0 for s in steps)
    text = f"{_name(tensor.dtype)}[{','.join(map(str, rounded))}] order {','.join(map(str, order))}"
    return text + (f" broadcast {broadcast}" if broadcast else "") + ("" if aligned else " unaligned")


def _rounded_value(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _name(value)
    return _rounded(value) if name == "q_shift" else value


def _rounded(size: int) -> int:
    return size if size <= EXACT_UP_TO else 1 << (size - 1).bit_length()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(spec: Spec) -> str:
    """One line for people: the op, its first operands' sizes, the dtype."""
    shown = [f"{n} {'x'.join(map(str, t.shape))}" for n, t in spec.tensors.items() if t.dtype.is_floating_point][:3]
    dtype = next((_name(t.dtype) for t in spec.tensors.values() if t.dtype.is_floating_point), "")
    return f"{spec.op}: {', '.join(shown)}, {dtype}"


def with_defaults(op: str, given: Mapping[str, Any]) -> Call:
    """A call of an op from the arguments that matter."""
    bound = OPS[op].signature.bind(**given)
    bound.apply_defaults()
    return Call(op, dict(bound.arguments))
