"""How the arguments and results of a function that computes the gated delta rule bind to the op's.

Nothing here knows a function by its name: `experiment.py` tries the bindings that its signature allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEATURE = "gated_delta_rule"
ROLES = ("q", "k", "v", "g", "beta", "initial_state")


@dataclass(frozen=True)
class Scale:
    """``factor * K ** power``: what q is multiplied with."""

    factor: float
    power: float

    def of(self, head_dim: int) -> float:
        return float(self.factor * head_dim**self.power)


@dataclass(frozen=True)
class Binding:
    """One way to read a call of a captured function as a call of the op.

    Attributes:
        roles: the op's argument that each tensor of the call is, in the order of the function's parameters.
        heads_first: tensors are ``[B, H, T, ...]``, not ``[B, T, H, ...]``; the result as well.
        scale, qk_l2norm, eps: as the op takes them.
        grouped: whether q and k may have fewer heads than v.
        multiple: lengths must be a multiple of this.
        result: ``both`` (o, final state), ``o, None`` or ``o``.
    """

    roles: tuple[str, ...]
    heads_first: bool
    scale: Scale
    qk_l2norm: str
    eps: float
    grouped: bool
    multiple: int
    result: str
    out_dtype: torch.dtype

    def operands(self, tensors: tuple[Any, ...]) -> dict[str, Any]:
        """The tensors of a call by role, in the op's layout."""
        given = dict(zip(self.roles, tensors, strict=True))
        if self.heads_first:
            given = {r: x if r == "initial_state" else x.transpose(1, 2) for r, x in given.items()}
        return given

    def call(self, op: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """The op on the tensors of a call; o comes back in the layout of the function's."""
        given = self.operands(tensors)
        extra: dict[str, Any] = {}
        if self.qk_l2norm != "none":
            extra |= {"qk_l2norm": self.qk_l2norm, "eps": self.eps}
        if self.out_dtype != given["v"].dtype:
            extra["out_dtype"] = self.out_dtype
        q, k, v, g, beta = (given[r] for r in ROLES[:5])
        o, state = op(q, k, v, g, beta, self.scale.of(int(q.shape[-1])), given.get("initial_state"), **extra)
        return (o.transpose(1, 2) if self.heads_first else o), state


@dataclass(frozen=True)
class Kind:
    """What is known of one argument while tracing: a tensor's rank and dtype, or the value itself."""

    rank: int | None
    dtype: torch.dtype | None
    value: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.rank is not None


def kinds_of(described: Mapping[str, Any]) -> dict[str, Kind]:
    """From ``(rank, dtype)`` of tensors and plain values, as the trace hands them over."""
    return {
        name: Kind(x[1], x[2]) if isinstance(x, tuple) and x[:1] == ("tensor",) else Kind(None, None, x)
        for name, x in described.items()
    }
