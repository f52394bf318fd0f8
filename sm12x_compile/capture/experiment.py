"""Is this function the gated delta rule? Run it beside the op's reference and see.

The function is pure tensor code (`fingerprint.py`) and smooth in its data (`smooth.py`); it runs in fp64 on small
random inputs of several sizes: fewer tokens than a chunk and more than two, equal and unequal heads. What it may tell
apart is watched: a question about sizes that no run answered differently leaves the function alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from sm12x_compile.ops import gated_delta_rule
from sm12x_compile.smooth import NotSmooth, bench, close

from .fingerprint import Meaning
from .library import ROLES, Binding, Kind, Scale
from .pure_code import LARGEST_NUMBER, Opaque
from .watcher import Watcher

TOLERANCE = 1e-7
# The dtypes the op understands. In fp64 the references compute in fp32, the op does not.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_EPS = (1e-6, 1e-5, 1e-12)


class Refused(Exception):
    """The function is not, or not surely, what the op computes; the message says why."""


@dataclass(frozen=True)
class _Sizes:
    B: int
    T: int
    Hk: int
    Hv: int
    K: int
    V: int


def find_binding(meaning: Meaning, kinds: Mapping[str, Kind]) -> Binding:
    """How a function computes the op when it is called with such arguments.

    Args:
        meaning: the function.
        kinds: its parameters in order, with what the call gives them.

    Raises:
        Refused: it is something else, or a run leaves a doubt.
    """
    dtypes = {k.dtype for k in kinds.values() if k.is_tensor}
    if not dtypes <= set(DTYPES):
        raise Refused(f"dtype {next(iter(dtypes - set(DTYPES)))} is not understood")
    trial = _Trial(meaning, kinds)
    reason = "its arguments cannot be those of a gated delta rule"
    for roles, heads_first in _readings(kinds):
        try:
            binding = trial.first_look(roles, heads_first)
        except (Refused, Opaque, NotSmooth) as refusal:
            reason = str(refusal)
            continue
        except Exception:  # whatever a function raises on arguments of the wrong shape
            continue
        return trial.certify(binding)
    raise Refused(reason)


def _readings(kinds: Mapping[str, Kind]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The roles that tensors of these ranks can have, the usual order first."""
    ranks = [k.rank for k in kinds.values() if k.is_tensor]
    wide, narrow = ranks.count(4), ranks.count(3)
    if wide + narrow != len(ranks) or narrow not in (1, 2):
        return
    of_four = [*ROLES[:3], *(["g"] if narrow == 1 else [])]
    if wide not in (len(of_four), len(of_four) + 1):
        return
    of_four += ["initial_state"] if wide > len(of_four) else []
    of_three = ["beta"] if narrow == 1 else ["g", "beta"]
    for heads_first in (False, True):
        for first in permutations(of_four):
            for second in permutations(of_three):
                fours, threes = iter(first), iter(second)
                yield tuple(next(fours) if rank == 4 else next(threes) for rank in ranks), heads_first


class _Trial:
    """The runs of one function under one kind of call."""

    def __init__(self, meaning: Meaning, kinds: Mapping[str, Kind]) -> None:
        self.meaning = meaning
        self.kinds = kinds
        self.seed = 0
        plain = [k.value for k in kinds.values() if not k.is_tensor]
        numbers = {*meaning.numbers, *(x for x in plain if isinstance(x, (int, float)) and not isinstance(x, bool))}
        # The longest stretch that the code could treat as one: a chunk.
        self.chunk = int(max([8, *(n for n in numbers if isinstance(n, int))]))
        if self.chunk > LARGEST_NUMBER:
            raise Refused(f"{self.chunk} in it is larger than any experiment")
        self.eps = tuple(dict.fromkeys([*sorted(n for n in numbers if 0 < n < 1e-2), *_EPS]))

    # ------------------------------------------------------------ one run

    def _sizes(self, T: int, *, Hk: int = 2, Hv: int = 2, B: int = 3, K: int = 4, V: int = 5) -> _Sizes:
        return _Sizes(B, T, Hk, Hv, K, V)

    def _draw(self, roles: tuple[str, ...], heads_first: bool, s: _Sizes, length: float) -> list[Tensor]:
        """Random operands in fp64 in the function's order; q and k have entries of about `length`."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        per_channel = [k.rank for k in self.kinds.values() if k.is_tensor][roles.index("g")] == 4
        made = {
            "q": length * normal(s.B, s.T, s.Hk, s.K),
            "k": length * normal(s.B, s.T, s.Hk, s.K),
            "v": normal(s.B, s.T, s.Hv, s.V),
            "g": -torch.rand((s.B, s.T, s.Hv, *((s.K,) if per_channel else ())), generator=generator,
                             dtype=torch.float64) * 0.2,
            "beta": torch.rand((s.B, s.T, s.Hv), generator=generator, dtype=torch.float64) * 1.8,
            "initial_state": normal(s.B, s.Hv, s.K, s.V),
        }  # fmt: skip
        if heads_first:
            made = {r: x if r == "initial_state" else x.transpose(1, 2).contiguous() for r, x in made.items()}
        return [made[r] for r in roles]

    def run(
        self, tensors: list[Tensor], watcher: Watcher | None = None, *, widen: bool = True
    ) -> tuple[Any, Any, str, set[str]]:
        """The function's o and state, the form of its result, and the operators that ran."""
        queue = iter(tensors)
        arguments = {n: next(queue) if k.is_tensor else k.value for n, k in self.kinds.items()}
        before = [t.clone() for t in tensors]
        function = self.meaning.watched(watcher or Watcher())
        with bench(tensors, widen=widen) as seen:
            result = function(**arguments)
        if any(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)):
            raise Refused("it writes its arguments")
        if isinstance(result, Tensor):
            return result, None, "o", seen
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            raise Refused("its result is not an output with a state")
        o, state = result
        if not isinstance(state, (Tensor, type(None))):
            raise Refused("its result is not an output with a state")
        stores = {t.untyped_storage()._cdata for t in tensors}
        if any(isinstance(t, Tensor) and t.untyped_storage()._cdata in stores for t in (o, state)):
            raise Refused("its result may share memory with an argument")
        return o, state, "o, None" if state is None else "both", seen

    @staticmethod
    def reference(binding: Binding, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return binding.call(gated_delta_rule.reference, tuple(tensors))

    # ------------------------------------------------------------ hypotheses

    def first_look(self, roles: tuple[str, ...], heads_first: bool) -> Binding:
        """Guess the tags from a few runs; raises whatever speaks against it."""
        multiple, T = 1, 3
        # Entries small enough for an eps under a square root to show.
        length = max(self.eps) ** 0.5
        tensors = self._draw(roles, heads_first, self._sizes(T), length)
        try:
            o, state, form, seen = self.run(tensors)
        except AssertionError:  # some ask for whole chunks
            multiple = T = self.chunk
            tensors = self._draw(roles, heads_first, self._sizes(T), length)
            o, state, form, seen = self.run(tensors)
        for norm, eps in [("none", 0.0), *(("sqrt", e) for e in self.eps)]:
            guess = Binding(roles, heads_first, Scale(1.0, 0.0), norm, eps, False, multiple, form, torch.float64)
            expected, final = self.reference(guess, tensors)
            factor = _factor(o, expected)
            if factor is None or (state is not None and not close(state, final, TOLERANCE)):
                continue
            guess = replace(guess, qk_l2norm="rsqrt" if norm == "sqrt" and "rsqrt" in seen else norm)
            return replace(guess, scale=self._scale(guess, factor, T))
        raise Refused("it computes something else than the gated delta rule")

    def _scale(self, guess: Binding, factor: float, T: int) -> Scale:
        tensors = self._draw(guess.roles, guess.heads_first, self._sizes(T, K=9), 1.0)
        o, *_ = self.run(tensors)
        other = _factor(o, self.reference(guess, tensors)[0])
        if other is None:
            raise Refused("its scale is not a number")
        for power in (-0.5, 0.0, -1.0):
            if abs(factor / 4**power - other / 9**power) < 1e-6 * abs(other / 9**power):
                return Scale(_round(other / 9**power), power)
        raise Refused("its scale depends on the head dimension in an unknown way")

    # ------------------------------------------------------------ the certificate

    def certify(self, binding: Binding) -> Binding:
        """Run all sizes; the binding with what is left to know."""
        watcher = Watcher()
        C, m = self.chunk, binding.multiple
        lengths = [C, 2 * C, 3 * C] if m > 1 else [1, 2, 4, 5, C - 1, C, C + 1, 2 * C + 3]
        sizes = [self._sizes(T, Hk=h, Hv=h, B=b, K=k, V=v) for T in lengths for b, h, k, v in [(3, 2, 4, 5)]]
        short = lengths[0] if m > 1 else 4
        # Sizes that coincide, each in turn.
        sizes += [self._sizes(short, Hk=h, Hv=h, B=b, K=k, V=v)
                  for b, h, k, v in [(1, 4, 5, 4), (4, 3, 3, 3), (5, 5, 4, 6), (2, 1, 6, 1), (1, 1, 1, 2)]]  # fmt: skip
        for s in sizes:
            self._agree(binding, s, watcher)
        if binding.qk_l2norm != "none":  # where the eps is as large as what it is added to
            self._agree(binding, sizes[-1], watcher, binding.eps**0.5)
        grouped = True
        try:
            for s in (self._sizes(short, Hk=2, Hv=4), self._sizes(short, Hk=1, Hv=3), self._sizes(short, Hk=3, Hv=6)):
                self._agree(binding, s, watcher)
        except (Opaque, NotSmooth):
            raise
        except Exception:  # the caller repeats the heads, or the grouping is another
            grouped = False
        doubt = watcher.reason or watcher.unsettled()
        if doubt:
            raise Refused(doubt)
        return replace(binding, grouped=grouped, out_dtype=self._out_dtype(binding, short))

    def _agree(self, binding: Binding, s: _Sizes, watcher: Watcher, length: float = 0.7) -> None:
        tensors = self._draw(binding.roles, binding.heads_first, s, length)
        o, state, form, _ = self.run(tensors, watcher)
        expected, final = self.reference(binding, tensors)
        if form != binding.result or not close(o, expected, TOLERANCE):
            raise Refused(f"it is not the gated delta rule for {s.T} tokens")
        if state is not None and not close(state, final, TOLERANCE):
            raise Refused(f"its final state is not that of the gated delta rule for {s.T} tokens")

    def _out_dtype(self, binding: Binding, T: int) -> torch.dtype:
        """What comes out in the dtypes of the call, which must be near what the op gives."""
        dtypes = [k.dtype for k in self.kinds.values() if k.dtype is not None]
        wide = self._draw(binding.roles, binding.heads_first, self._sizes(T), 0.7)
        tensors = [x.to(d) for x, d in zip(wide, dtypes, strict=True)]
        o, state, *_ = self.run(tensors, widen=False)
        if o.dtype not in DTYPES or (state is not None and state.dtype != torch.float32):
            raise Refused("the dtypes of its results are not the op's")
        expected, final = self.reference(binding, [x.double() for x in tensors])
        rough = max(_ROUNDING[d] for d in (*dtypes, o.dtype))
        if not close(o, expected, rough) or (state is not None and not close(state, final, rough)):
            raise Refused("in these dtypes it computes something else")
        return o.dtype


def _factor(found: Tensor, expected: Tensor) -> float | None:
    """The number c with ``found == c * expected``, if there is one."""
    if found.shape != expected.shape or not found.is_floating_point():
        return None
    norm = float((expected * expected).sum())
    c = float((found.double() * expected).sum()) / norm if norm else 0.0
    return c if c and close(found, c * expected, TOLERANCE) else None


def _round(x: float) -> float:
    """A number that was measured to ten digits, as its author wrote it."""
    return float(f"{x:.9g}")
