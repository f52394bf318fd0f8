"""One way to define a semantic op: schema from the signature, a fake, and an eager reference.

A semantic op says *what* is computed; `lowering/` decides which kernel computes it. Its reference is the CPU
path and the oracle of every test, so it is written to be read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

NAMESPACE = "sm12x"


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes through device memory and floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class SemanticOp:
    """A semantic op of the contract.

    Attributes:
        name: family name; the op is ``sm12x::<name>``.
        reference: eager implementation in plain PyTorch.
        fake: shape function with the reference's signature.
        cost: the least bytes and FLOPs of a call, from the bound arguments (sizes already hinted to ints).
        mutates: names of the arguments that the op writes.
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[[dict[str, Any]], Cost] | None
    mutates: tuple[str, ...]

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.sm12x, self.name).default

    @property
    def schema(self) -> str:
        """The op's schema without its name."""
        text = str(self.overload._schema)
        return text[text.index("(") :]

    def bind(self, node: Node) -> dict[str, Any]:
        """The arguments of a call of this op, by name, defaults filled in."""
        bound = self.signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


OPS: dict[str, SemanticOp] = {}


def semantic_op(
    *,
    fake: Callable[..., Any],
    cost: Callable[[dict[str, Any]], Cost] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], SemanticOp]:
    """Register the decorated eager reference as ``sm12x::<function name>``."""

    def register(reference: Callable[..., Any]) -> SemanticOp:
        name = reference.__name__
        define_custom_op(f"{NAMESPACE}::{name}", reference, fake, tuple(mutates))
        op = SemanticOp(name, reference, fake, cost, tuple(mutates))
        OPS[name] = op
        return op

    return register


def define_custom_op(
    qualname: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
    schema: str | None = None,
) -> torch._ops.OpOverload:
    """An opaque custom op with the implementation for every device, and its fake.

    Opaque on purpose: `triton_op` needs a driver in Inductor, and a backend must be testable on a CPU.
    `custom_op` refuses keyword-only tensors, so the optional arguments are positional in the schema; callers
    give them by name, and new ones go to the end.
    """
    custom = torch.library.custom_op(qualname, implementation, mutates_args=tuple(mutates), schema=schema)
    custom.register_fake(fake)
    namespace, name = qualname.split("::")
    return getattr(getattr(torch.ops, namespace), name).default
