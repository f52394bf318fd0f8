"""Fixtures for the semantic ops: the custom op against its own schema and fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sm12x_compile.ops import SemanticOp


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _dense(x: Tensor) -> bool:
    """Contiguous, or with dimensions 1 and 2 in the other order (heads, positions; channels, positions)."""
    return x.is_contiguous() or (x.dim() >= 3 and x.transpose(1, 2).is_contiguous())


def _check(op: SemanticOp, *args: Any, **kwargs: Any) -> None:
    """`torch.library.opcheck`, then the fake against the real result with every size a symbol."""
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in (*args, *kwargs.values())):
        utilities.remove("test_schema")  # compares the arguments by allclose, which fp8 does not have
    torch.library.opcheck(op.overload, args, kwargs, test_utils=utilities)

    copy = [a.clone() if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
    real = _tensors(op.overload(*copy[: len(args)], **dict(zip(kwargs, copy[len(args) :], strict=True))))

    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:

        def symbolic(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * a.ndim)
            return mode.from_tensor(a, symbolic_context=context)

        fake = _tensors(op.overload(*map(symbolic, args), **{n: symbolic(a) for n, a in kwargs.items()}))
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        assert f.dtype == r.dtype
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in f.shape]
        assert sizes == list(r.shape)
        assert _dense(f) and _dense(r)
        if max(r.shape) > 1:
            assert any(isinstance(s, torch.SymInt) for s in f.shape), "the fake made every size static"


@pytest.fixture
def check_op() -> Callable[..., None]:
    return _check
