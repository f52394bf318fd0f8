"""Random operands for a call: the sizes, strides and dtypes of a `Spec`, with values that the op may meet.

What is an index stays in range, what is a logarithm of a decay is negative, experts of a token differ. Anything else
is normal noise, scaled so that results are about one. Drawn from a generator of its own: the user's stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import CannotRace, Spec, TensorSpec, sizes

_NARROW = 1  # bytes: floating dtypes that cannot be drawn directly


@dataclass
class _Draw:
    """One drawing. `fill`: which part of a cache holds keys."""

    spec: Spec
    device: torch.device
    generator: torch.Generator
    fill: float

    def __post_init__(self) -> None:
        self.sizes = sizes(self.spec)

    def noise(self, shape: tuple[int, ...], dtype: torch.dtype, std: float = 1.0) -> Tensor:
        wide = torch.float32 if dtype.itemsize == _NARROW else dtype
        return torch.randn(shape, dtype=wide, device=self.device, generator=self.generator).mul_(std).to(dtype)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator) * (high - low) + low

    def bytes(self, shape: tuple[int, ...], low: int = 0, high: int = 256) -> Tensor:
        drawn = torch.randint(low, high, shape, device=self.device, generator=self.generator)
        return drawn.to(torch.uint8)

    def order(self, shape: tuple[int, ...]) -> Tensor:
        """Random orders of the last dimension's numbers."""
        return self.uniform(shape).argsort(-1)


def draw(spec: Spec, device: torch.device, generator: torch.Generator, fill: float = 1.0) -> dict[str, Any]:
    """All arguments of a call, by name.

    Args:
        spec: the call.
        device: where the tensors live.
        generator: of that device.
        fill: where lengths are tensors, which part of the slots is in use.

    Raises:
        CannotRace: the op is not one of ours, or an operand's memory overlaps in a way that cannot be written.
    """
    if spec.op not in _RULES:
        raise CannotRace(f"there is no rule how to draw operands of {spec.op!r}")
    drawing = _Draw(spec, device, generator, fill)
    rules = _RULES[spec.op]
    arguments: dict[str, Any] = dict(spec.values)
    for name, tensor in spec.tensors.items():
        # What is broadcast is drawn once.
        pairs = zip(tensor.shape, tensor.stride, strict=True)
        shape = tuple(1 if step == 0 and size > 1 else size for size, step in pairs)
        rule = rules.get(name, _NOISE)
        arguments[name] = _placed(rule(drawing, tensor, shape), tensor, shape)
    return arguments


def _placed(value: Tensor, tensor: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    reach = 0  # of the dimensions with smaller strides
    for step, size in sorted((s, n) for s, n in zip(tensor.stride, shape, strict=True) if n > 1):
        if step <= reach:
            raise CannotRace("an operand's elements overlap in memory")
        reach += step * (size - 1)
    buffer = torch.zeros(tensor.extent, dtype=tensor.dtype, device=value.device)
    buffer.as_strided(shape, tensor.stride).copy_(value)
    return buffer.as_strided(tensor.shape, tensor.stride)


# ---------------------------------------------------------------- rules: (drawing, spec, shape to draw) → values

Shape = tuple[int, ...]
Rule = Callable[[_Draw, TensorSpec, Shape], Tensor]


def _plain(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    if t.dtype.is_floating_point:
        return d.noise(shape, t.dtype)
    if t.dtype == torch.bool:
        return d.uniform(shape) > 0.1
    raise CannotRace(f"an operand of {d.spec.op} is {t.dtype}, and nothing says which values it may have")


def _weight(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """A matrix (or a batch of them) whose products with noise are about one; packed ones are any bytes."""
    if t.dtype.is_floating_point and t.dtype.itemsize > _NARROW:
        return d.noise(shape, t.dtype, max(shape[-2:]) ** -0.5)
    if t.dtype in (torch.uint8, getattr(torch, "float4_e2m1fn_x2", None)):
        return d.bytes(shape).view(t.dtype)
    return d.noise(shape, t.dtype)


def _weight_scale(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Small positive factors; as bytes they are E8M0 exponents."""
    if t.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return d.bytes(shape, 119, 124).view(t.dtype)
    return d.uniform(shape, 0.01, 0.1).to(t.dtype)


def _small(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return d.noise(shape, t.dtype, 0.1)


def _offset(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """The queries stand behind the keys in use."""
    room = d.sizes["T"] - d.sizes["S"] - int(d.spec.values.get("q_shift") or 0)
    return torch.full(shape, max(0, int(room * d.fill)), dtype=t.dtype, device=d.device)


def _length(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return torch.full(shape, max(1, int(d.sizes["T"] * d.fill)), dtype=t.dtype, device=d.device)


def _padding(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """The first keys of a row are missing, as with prompts padded on the left."""
    first = d.uniform(shape[:1], 0, 0.25 * shape[1]).long()
    return torch.arange(shape[1], device=d.device) >= first[:, None]


def _segments(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Three documents of equal length."""
    return (torch.arange(shape[-1], device=d.device) * 3 // max(1, shape[-1])).expand(shape).to(t.dtype)


def _bias(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return _plain(d, t, shape)


def _experts(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Different experts for each token's choices."""
    experts = d.spec.tensors["w2"].shape[0]
    return d.order((shape[0], max(experts, shape[1])))[:, : shape[1]].to(t.dtype)


def _shares(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return d.uniform(shape).add_(0.1).softmax(-1).to(t.dtype)


def _logits(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """No two experts of a token are equal, in bf16 either: which one is chosen would be anyone's guess."""
    rank = d.order(shape).to(torch.float32)
    step = 6.0 / max(1, shape[-1])
    return ((rank + d.uniform(shape, -0.2, 0.2)) * step - 3.0).to(t.dtype)


def _unit(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Rows of length one: where the op does not normalise, keys that are longer make the memory grow."""
    x = d.noise(shape, torch.float32)
    return (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)).to(t.dtype)


def _log_decay(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return d.uniform(shape, -0.5, -0.001).to(t.dtype)


def _share(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return d.uniform(shape, 0.05, 0.95).to(t.dtype)


def _bounds(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Packed sequences of about equal length."""
    return torch.linspace(0, d.sizes["T"], shape[0], device=d.device).long().to(t.dtype)


def _slots(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Slots in any order, none twice; rows without one are skipped."""
    pool = d.spec.tensors["state_pool"].shape[0]
    found = torch.full(shape, -1, dtype=t.dtype, device=d.device)
    used = min(pool, shape[0])
    found[:used] = d.order((pool,))[:used].to(t.dtype)
    return found


def _journal(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    """Drafts that could have been written: k of length one, small u, g at most 0."""
    keys, values = d.spec.tensors["k"].shape[3], d.spec.tensors["v"].shape[3]
    entries = d.noise(shape, torch.float32, 0.1)
    entries[..., :keys] = torch.nn.functional.normalize(entries[..., :keys], dim=-1)
    entries[..., keys + values :] = -entries[..., keys + values :].abs()
    return entries.to(t.dtype)


def _accepted(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return d.uniform(shape, 0, d.spec.tensors["journal"].shape[2] + 0.99).to(t.dtype)


def _turn(d: _Draw, t: TensorSpec, shape: Shape) -> Tensor:
    return (d.uniform(shape) > 0.5).to(t.dtype)


_NOISE: Rule = _plain
_MASKS: dict[str, Rule] = {
    "q_offset": _offset, "kv_len": _length, "key_padding": _padding, "q_segments": _segments,
    "k_segments": _segments, "bias": _bias,
}  # fmt: skip
_DELTA: dict[str, Rule] = {"q": _unit, "k": _unit, "g": _log_decay, "beta": _share}
_STEP: dict[str, Rule] = {
    **_DELTA, "state_pool": _small, "slots": _slots, "journal": _journal, "accepted": _accepted, "turn": _turn,
}  # fmt: skip
_QUANTISED: dict[str, Rule] = {
    "w13_scale": _weight_scale, "w2_scale": _weight_scale, "w13_global_scale": _weight_scale,
    "w2_global_scale": _weight_scale,
}  # fmt: skip
_RULES: dict[str, dict[str, Rule]] = {
    "attention": _MASKS,
    "mla": {**_MASKS, "w_uk": _weight, "w_uv": _weight},
    "moe": {
        "topk_ids": _experts, "topk_weights": _shares, "w13": _weight, "w2": _weight, "w3": _weight,
        "w13_bias": _small, "w2_bias": _small, "w3_bias": _small, **_QUANTISED,
    },
    "moe_route": {"logits": _logits, "correction_bias": _small},
    "mxfp4_linear": {"weight": _weight, "scales": _weight_scale, "global_scale": _weight_scale},
    "gated_delta_rule": {**_DELTA, "initial_state": _small, "cu_seqlens": _bounds},
    "gated_delta_rule_update": _STEP,
    "gated_delta_rule_verify": _STEP,
    "causal_conv1d": {"w": _weight},
    "causal_conv1d_update": {"w": _weight, "slots": _slots},
}  # fmt: skip
