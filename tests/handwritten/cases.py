"""How a hand-written attention is described, and how two runs of it are compared.

A case is a function that returns ``(module or function, inputs)``, where ``inputs(draw)`` gives the arguments
of one call (a tuple) or of several calls in a row (a list of tuples: prefill, then decode steps).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Arguments = tuple[Any, ...]
Inputs = Callable[["Draw"], "Arguments | list[Arguments]"]
Builder = Callable[[], tuple[Callable[..., Any], Inputs]]


@dataclass
class Draw:
    """Random inputs of one dtype; sizes are odd on purpose.

    Attributes:
        B, S, T: batch, query length, and a second length for cross attention.
    """

    dtype: torch.dtype
    seed: int
    B: int = 2
    S: int = 7
    T: int = 11
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def qkv(
        self, H: int, D: int, *, Hkv: int | None = None, Dv: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, H, S, D]``, k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``."""
        G = Hkv or H
        return (
            self.randn(self.B, H, self.S, D),
            self.randn(self.B, G, self.S, D),
            self.randn(self.B, G, self.S, Dv or D),
        )

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def bools(self, *shape: int, keep: float = 0.7) -> Tensor:
        return torch.rand(shape, generator=self.generator) < keep

    def padding(self, B: int, T: int, *, left: bool = False) -> Tensor:
        """Bool ``[B, T]``, True where a token is; every row has at least one."""
        length = self.ints(1, T + 1, B)
        position = torch.arange(T).expand(B, T)
        return position >= (T - length)[:, None] if left else position < length[:, None]


@dataclass(frozen=True)
class Case:
    """One hand-written attention and what the backend must say of it.

    Attributes:
        sites: sites rewritten in every graph; None where both answers are right.
        tags: expected tags of every rewritten site; a tuple lists alternatives of equal meaning.
        refused: the report must hold a near-miss, with a sentence.
        pattern: the family that the sites belong to.
    """

    name: str
    build: Builder
    sites: int | None
    tags: dict[str, Any]
    refused: bool
    pattern: str


class Registry(list[Case]):
    """Collects cases of one family: ``@registry.case(sites=1, mask="causal")``."""

    def __init__(self, pattern: str = "attention") -> None:
        super().__init__()
        self.pattern = pattern

    def case(
        self, *, sites: int | None = 1, refused: bool = False, **tags: Any
    ) -> Callable[[Builder], Builder]:
        def register(build: Builder) -> Builder:
            self.append(Case(build.__name__, build, 0 if refused else sites, tags, refused, self.pattern))
            return build

        return register


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Callable[..., Any], Inputs]:
    """The callable of a case with weights of `dtype`, in eval mode."""
    torch.manual_seed(seed)
    function, inputs = case.build()
    if isinstance(function, nn.Module):
        function = convert(function, dtype).eval()
    return function, inputs


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A deep copy with floating tensors (parameters and buffers of modules, too) in `dtype`."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)

    def widen(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(dtype, copy=True) if floating else copy.deepcopy(x)

    return tree_map(widen, value)


def calls(inputs: Inputs, draw: Draw) -> list[Arguments]:
    made = inputs(draw)
    return made if isinstance(made, list) else [made]


def run(function: Callable[..., Any], state: Any, arguments: list[Arguments]) -> list[Tensor]:
    """All that the calls compute: their outputs, the arguments after them, and the module's buffers."""
    with torch.no_grad():
        results: list[Any] = [copy.deepcopy(function(*a)) for a in arguments]
    buffers = list(state.buffers()) if isinstance(state, nn.Module) else []
    return [x for x in tree_leaves([results, arguments, buffers]) if isinstance(x, Tensor)]


def assert_as_good_as_eager(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Our error against fp64 is at most twice that of eager, and 4 ulp of the largest value more.

    `eager` ran in the dtype under test, `exact` is the same code with weights and inputs in fp64. Ours
    and eager's NaN must be the same, and so must integers and bools.
    """
    assert len(ours) == len(eager) == len(exact)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs)
            continue
        nans = theirs.isnan()
        assert torch.equal(mine.isnan(), nans), (
            f"NaN at {int(mine.isnan().sum())}, eager at {int(nans.sum())}"
        )
        wide, reference, truth = (x.double().masked_fill(nans, 0.0) for x in (mine, theirs, truth))
        infinite = reference.isinf()
        assert torch.equal(wide[infinite], reference[infinite])
        wide, reference, truth = (x.masked_fill(infinite, 0.0) for x in (wide, reference, truth))
        # Some cases compute in fp32 inside, also when all else is fp64.
        ulp = 4 * max(torch.finfo(mine.dtype).eps, torch.finfo(torch.float32).eps) * _largest(truth)
        bound = 2 * _largest(reference - truth) + ulp
        error = _largest(wide - truth)
        assert error <= bound, f"error {error:.3g} against fp64, eager's allows {bound:.3g}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def tag_faults(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the tags of a site, in words."""
    for key, want in expected.items():
        allowed = want if isinstance(want, tuple) else (want,)
        if found.get(key) not in allowed:
            yield f"{key} is {found.get(key)!r}, expected {' or '.join(map(repr, allowed))}"
