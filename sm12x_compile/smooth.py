"""Operators through which an experiment can see: what is smooth in its operands, and a bench to run code on.

*Hypothesise and certify*: code is run on random inputs beside the reference of a semantic op. Two smooth functions
that agree on a few random draws in fp64 agree everywhere, up to a chance of zero; a clamp or a comparison could hide
where no draw reaches. So operators on the data must be of this vocabulary; what is computed from sizes alone
(masks, identity matrices, positions) may be anything that is not random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Layout: every element of the result is an element of an operand, or a constant.
LAYOUT = words(
    "view _unsafe_view reshape _reshape_alias transpose permute t unsqueeze squeeze expand expand_as slice select "
    "narrow split split_with_sizes unbind chunk cat stack clone contiguous alias detach _to_copy to copy copy_ "
    "lift_fresh_copy lift_fresh pad constant_pad_nd select_scatter slice_scatter index_select repeat "
    "repeat_interleave flatten unflatten movedim swapaxes mT mH numpy_T T tile fill fill_ zero_ masked_fill "
    "masked_fill_ tril triu diagonal flip roll index index_put index_put_ index_copy empty_like new_empty "
    "zeros_like ones_like new_zeros new_ones full_like new_full view_as type_as _conj positive unsafe_split "
    "unsafe_chunk view_copy tril_ triu_ sym_size getitem squeeze_ unsqueeze_ hstack vstack concat concatenate moveaxis "
    "_linalg_check_errors"
)
ARITHMETIC = words(
    "add add_ sub sub_ rsub mul mul_ div div_ neg exp exp_ exp2 rsqrt sqrt reciprocal square pow sum mean cumsum "
    "cumsum_ mm bmm matmul einsum dot mv baddbmm addmm addcmul addcmul_ linalg_solve_triangular triangular_solve "
    "inverse linalg_inv linalg_inv_ex linalg_solve linalg_solve_ex _linalg_solve_ex linear outer inner linalg_vecdot "
    "expm1 sigmoid tensordot multiply subtract divide true_divide negative"
)
SMOOTH = LAYOUT | ARITHMETIC


class NotSmooth(Exception):
    """The code does something that an experiment cannot see through; the message says what."""


class _Bench(TorchDispatchMode):
    """Runs tensor code while it watches what is done to the data."""

    def __init__(self, data: Sequence[Tensor]) -> None:
        super().__init__()
        self.kept: list[Tensor] = list(data)  # or their storages would be used again
        self.storages = {_storage(t) for t in data}
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        if torch.Tag.nondeterministic_seeded in func.tags or not func._schema.name.startswith(("aten::", "prim::")):
            raise NotSmooth(f"it calls {func._schema.name}")
        of_data = any(_storage(t) in self.storages for t in given)
        if of_data and name not in SMOOTH:
            raise NotSmooth(f"{name} of the data")
        self.seen.add(name)
        result = func(*args, **kwargs)
        if of_data:
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            self.kept += made
            self.storages |= {_storage(t) for t in made}
        return result


_WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
_CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class _Widened(TorchFunctionMode):
    """Every cast to a narrower floating dtype goes to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _CASTS.get(func, func)
        args, kwargs = pytree.tree_map_only(torch.dtype, lambda d: _WIDER.get(d, d), (args, kwargs or {}))
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def bench(data: Sequence[Tensor], *, widen: bool) -> Iterator[set[str]]:
    """Run tensor code on a bench, away from the modes of whoever is tracing.

    Args:
        data: the tensors that count as data.
        widen: whether code that computes in fp32 computes in fp64 instead.

    Yields:
        The names of the operators that ran.

    Raises:
        NotSmooth: from inside, where the code does to the data what is not of the vocabulary.
    """
    watch = _Bench(data)
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if widen else torch.float32)
        try:
            if widen:
                with watch, _Widened():
                    yield watch.seen
            else:
                with watch:
                    yield watch.seen
        finally:
            torch.set_default_dtype(default)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two results agree to within `tolerance` of the largest expected value."""
    if found.shape != expected.shape or not found.is_floating_point():
        return False
    found, expected = found.double(), expected.double()
    largest = max(float(expected.abs().max()), 1e-30) if expected.numel() else 1.0
    return bool(((found - expected).abs() <= tolerance * largest).all())
