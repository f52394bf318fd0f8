"""A Python number whose value only the device knows: what `.item()` gives in rewritten code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sm12x_compile.smooth import words

from .predicates import Predicate, of_tensor
from .refusal import refuse

_SIZE = "a number read from a tensor is used as a size, an index or a bound, which a fixed-shape graph can't have"


class Number:
    """A 0-d tensor with the arithmetic of Python's int or float: int64 or float64.

    Meeting a tensor it takes part in type promotion as a Python number does, so a dtype never widens.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def tensor(self) -> Tensor:
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _WITH_TENSORS or kwargs:
            refuse(f"torch.{func.__name__} of a number read from a tensor")
        others = [a for a in args if isinstance(a, Tensor)]
        if len(others) != 1 or len(args) != 2:
            refuse(f"torch.{func.__name__} of a number read from a tensor")
        like = others[0]
        return func(*[a.meeting(like) if isinstance(a, Number) else a for a in args])

    def meeting(self, other: Tensor) -> Tensor:
        """The value in the dtype in which a Python number would enter an operation with `other`."""
        value = self.tensor()
        kind = other.dtype
        if value.dtype == torch.float64 and not kind.is_floating_point and not kind.is_complex:
            kind = torch.get_default_dtype()
        elif kind == torch.bool:
            kind = torch.int64
        if kind in (torch.float16, torch.bfloat16):
            kind = torch.float32  # kernels keep the scalar operand of a half tensor in fp32
            if other.ndim == 0:
                refuse("a number read from a tensor meets a 0-d tensor in half precision")
        return value.to(kind)

    def _as_condition(self) -> Any:
        return of_tensor(self.tensor())

    def item(self) -> Number:
        return self

    def __add__(self, o: Any) -> Any:
        return _binary(torch.add, self, o)

    def __radd__(self, o: Any) -> Any:
        return _binary(torch.add, o, self)

    def __sub__(self, o: Any) -> Any:
        return _binary(torch.sub, self, o)

    def __rsub__(self, o: Any) -> Any:
        return _binary(torch.sub, o, self)

    def __mul__(self, o: Any) -> Any:
        return _binary(torch.mul, self, o)

    def __rmul__(self, o: Any) -> Any:
        return _binary(torch.mul, o, self)

    def __neg__(self) -> Number:
        return Number(-self.tensor())

    def __abs__(self) -> Number:
        return Number(self.tensor().abs())

    def __truediv__(self, o: Any) -> Any:
        return _divide(torch.true_divide, self, o)

    def __rtruediv__(self, o: Any) -> Any:
        return _divide(torch.true_divide, o, self)

    def __floordiv__(self, o: Any) -> Any:
        return _divide(torch.floor_divide, self, o)

    def __mod__(self, o: Any) -> Any:
        return _divide(torch.remainder, self, o)

    def __eq__(self, o: Any) -> Any:
        return _compare(torch.eq, self, o)

    def __ne__(self, o: Any) -> Any:
        return _compare(torch.ne, self, o)

    def __lt__(self, o: Any) -> Any:
        return _compare(torch.lt, self, o)

    def __le__(self, o: Any) -> Any:
        return _compare(torch.le, self, o)

    def __gt__(self, o: Any) -> Any:
        return _compare(torch.gt, self, o)

    def __ge__(self, o: Any) -> Any:
        return _compare(torch.ge, self, o)

    __hash__ = None  # type: ignore[assignment]

    # Dynamo of torch 2.11 does not fall back to them by itself.
    __iadd__, __isub__, __imul__, __itruediv__ = __add__, __sub__, __mul__, __truediv__
    __ifloordiv__, __imod__ = __floordiv__, __mod__

    def __bool__(self) -> bool:
        refuse("a number read from a tensor decides what Python does here")

    def __index__(self) -> int:
        refuse(_SIZE)

    def __int__(self) -> int:
        refuse(_SIZE)

    def __float__(self) -> float:
        refuse("a number read from a tensor is handed to Python's float arithmetic")


_WITH_TENSORS = words(
    "add sub mul div true_divide floor_divide remainder eq ne lt le gt ge rsub __add__ __radd__ __sub__ "
    "__rsub__ __mul__ __rmul__ __div__ __rdiv__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ "
    "__rmod__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__"
)


def _operand(x: Any) -> Tensor | None:
    if isinstance(x, Number):
        return x.tensor()
    if isinstance(x, bool):
        return None
    if isinstance(x, int):
        return torch.tensor(x, dtype=torch.int64)
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float64)
    return None


def _binary(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        like = a if isinstance(a, Tensor) else b
        return func(*[x.meeting(like) if isinstance(x, Number) else x for x in (a, b)])
    for x in (a, b):
        if not isinstance(x, (Number, int, float)):
            return NotImplemented
    # A Python float makes an integer a float; 0-d tensors of one category each promote in the same way.
    left = a.tensor() if isinstance(a, Number) else a
    right = b.tensor() if isinstance(b, Number) else b
    floats = any(isinstance(x, float) or (isinstance(x, Tensor) and x.dtype == torch.float64) for x in (left, right))
    if floats:
        left, right = (x.to(torch.float64) if isinstance(x, Tensor) else x for x in (left, right))
    return Number(func(left, right))


def _divide(func: Any, a: Any, b: Any) -> Any:
    """Division; by zero Python raises an error and a graph can't, so the divisor must be known not to be zero."""
    if isinstance(b, Number):
        refuse("division by a number read from a tensor: Python raises an error if it is zero")
    if isinstance(b, (int, float)) and b == 0:
        refuse("division by zero")
    if isinstance(a, Number) and isinstance(b, int) and func is torch.true_divide:
        return Number(a.tensor().to(torch.float64) / b)
    return _binary(func, a, b)


def _compare(func: Any, a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):
        return func(a.meeting(b), b)
    if not isinstance(b, (Number, int, float)):
        return NotImplemented
    return Predicate(of_tensor(func(a.tensor(), b.tensor() if isinstance(b, Number) else b)).conditions)


def number_of(t: Tensor) -> Number:
    """What ``t.item()`` is, whatever is written to `t` afterwards.

    Refuses tensors that need gradients: `item` cuts them off.
    """
    if t.numel() != 1:
        refuse("item() of a tensor of several elements")
    if t.dtype.is_complex:
        refuse("item() of a complex tensor")
    t = t.detach().reshape(())
    return Number(t.to(torch.float64 if t.dtype.is_floating_point else torch.int64, copy=True))


def item(x: Any) -> Any:
    """``x.item()``."""
    if isinstance(x, Tensor):
        return number_of(x)
    if isinstance(x, int):
        return x  # the item of a loop over hits, a 0-d tensor in the author's code
    return x.item()


def to_int(x: Any, *rest: Any) -> Any:
    """``int(x)``."""
    if isinstance(x, Tensor):
        x = number_of(x)
    if isinstance(x, Number):
        value = x.tensor()
        return x if value.dtype == torch.int64 else Number(value.trunc().to(torch.int64))
    if hasattr(x, "_as_int"):
        return x._as_int()
    return int(x, *rest)


def to_float(x: Any) -> Any:
    """``float(x)``."""
    if isinstance(x, Tensor):
        x = number_of(x)
    if isinstance(x, Number):
        return Number(x.tensor().to(torch.float64))
    return float(x)


def to_bool(x: Any) -> Any:
    """``bool(x)``: True, False or a `Predicate`."""
    if isinstance(x, Tensor):
        return of_tensor(x)
    if hasattr(x, "_as_condition"):
        return x._as_condition()
    return bool(x)
