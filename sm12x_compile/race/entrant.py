"""A kernel in a race: run on drawn operands, held against the op's reference, timed on operands that rotate."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..arch import Arch
from ..lowering.select import choose
from ..ops import OPS
from ..options import Options
from ..registry import Call, Kernel
from .contest import Wrong
from .judge import allowed_error, disagreement, routed
from .operands import draw
from .spec import CannotRace, Spec, shrunk
from .timing import Timer

SETS = 4  # of operands, so that one call does not find its own in the L2 cache
MEMORY = 0.4  # of what is free: all that a race's operands may take
FILLS = (1.0, 0.4)  # parts of a cache that hold keys: full, and partly
REFERENCE_FLOPS = {"cuda": 2e10, "cpu": 5e8}  # that the reference is given; a larger call is checked in part


class Lowered(TorchDispatchMode):
    """Semantic ops inside a kernel run as the kernel that would be chosen for them."""

    def __init__(self, arch: Arch, options: Options, known: list[Kernel | None]) -> None:
        super().__init__()
        self.arch, self.options = arch, options
        self.known, self.met = known, 0  # the choices of the first run serve the others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = next((o for o in OPS.values() if o.overload is func), None)
        if op is None:
            return func(*args, **(kwargs or {}))
        bound = op.signature.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if self.met == len(self.known):
            self.known.append(choose(Call(op.name, arguments), self.arch, self.options)[0])
        kernel = self.known[self.met]
        self.met += 1
        if kernel is None:
            return op.reference(**arguments)
        with self:
            return (kernel.overload or kernel.run)(**arguments)


@dataclass
class Field:
    """What all entrants of one race share: the device, the operands, the reference's results.

    Operands are drawn when they are first asked for, in the thread of the first entrant: there no mode of the
    compiler's is active, and the tensors are real.
    """

    spec: Spec
    device: torch.device
    arch: Arch
    options: Options
    timer: Timer
    seed: int = 0
    free_bytes: Callable[[], int] | None = None
    sets: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.small = compared(self.spec, self.device)
        self.mutates = OPS[self.spec.op].mutates
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        if self.free_bytes is not None:
            free = int(self.free_bytes() * MEMORY)
            if self.spec.nbytes > free:
                raise CannotRace(f"its operands take {self.spec.nbytes >> 20} MiB, and {free >> 20} MiB may be used")
            self.copies = max(1, min(SETS, free // max(1, self.spec.nbytes)))
        else:
            self.copies = SETS

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work on a stream that nobody else waits for: a kernel that hangs must not hold up the model."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):  # a new thread begins on device 0
            yield

    def release(self) -> None:
        """Give the operands' memory back."""
        self.sets.clear()
        self.__dict__.pop("examples", None)

    def works(self) -> bool:
        """Whether the device still computes; an illegal memory access ends that for the whole process."""
        sums: list[int] = []

        def compute() -> None:
            with contextlib.suppress(RuntimeError):
                sums.append(int(torch.ones(2, device=self.device).sum()))

        thread = threading.Thread(target=compute, daemon=True)  # without the compiler's modes, as entrants run
        thread.start()
        thread.join(10.0)
        return sums == [2]

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    @cached_property
    def examples(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Arguments of the size that the reference can take, and its results with what it wrote."""
        found = []
        for fill in FILLS if self._has_lengths else FILLS[:1]:
            arguments = draw(self.small, self.device, self.generator, fill)
            found.append((arguments, self.results(OPS[self.spec.op].reference, arguments)))
        return found

    @property
    def _has_lengths(self) -> bool:
        return bool({"q_offset", "kv_len"} & set(self.spec.tensors))

    def allowed(self, arguments: dict[str, Any], truth: list[Tensor]) -> float:
        """The error that rounding explains: a choice of experts is computed in fp32 whatever the logits are."""
        operands = () if self.spec.op == "moe_route" else arguments.values()
        return allowed_error([*(a for a in operands if isinstance(a, Tensor)), *truth])

    def full(self, number: int) -> dict[str, Any]:
        """One of the sets of arguments that are timed."""
        while len(self.sets) <= number:
            self.sets.append(draw(self.spec, self.device, self.generator, FILLS[0]))
        return self.sets[number]

    def results(self, run: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
        """What a call returns, and what it wrote into copies of the arguments that it may write."""
        arguments = {n: _copy(a) if n in self.mutates else a for n, a in arguments.items()}
        returned = run(**arguments)
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        if self.spec.op == "moe_route":
            ids, weights = results
            results = [routed(ids, weights, self.spec.tensors["logits"].shape[1])]
        return [*results, *(arguments[n] for n in self.mutates)]


def compared(spec: Spec, device: torch.device) -> Spec:
    """The call, or a smaller one, on which kernels are held against the reference."""
    return shrunk(spec, REFERENCE_FLOPS.get(device.type, 5e8))


def _copy(value: Any) -> Any:
    """A tensor with the same strides in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


@dataclass
class Entrant:
    """One kernel in one race."""

    kernel: Kernel
    field: Field
    abandoned: bool = False

    def __post_init__(self) -> None:
        self.name = self.kernel.name
        self._inner: list[Kernel | None] | None = None  # kernels of the semantic ops inside, once it has run

    def check(self) -> float:
        """Against the reference where that can be had, at full size for NaN and infinities."""
        with self.field.apart(), torch.no_grad():
            worst = 0.0
            regular = True
            for arguments, truth in self.field.examples:
                found = self.field.results(self._run, arguments)
                error, wrong = disagreement(found, truth, self.field.allowed(arguments, truth))
                worst = max(worst, error)
                if wrong:
                    raise Wrong(wrong)
                regular &= all(bool(t.isfinite().all()) for t in truth if t.is_floating_point())
            if self.field.small != self.field.spec and regular:
                found = self.field.results(self._run, self.field.full(0))
                if not all(bool(t.isfinite().all()) for t in found if t.is_floating_point()):
                    raise Wrong("gives NaN or infinities at full size")
            return worst

    def seconds(self) -> float:
        with self.field.apart(), torch.no_grad():
            sets = [self.field.full(n) for n in range(self.field.copies)]
            return self.field.timer.seconds([partial(self._run, **arguments) for arguments in sets])

    def _run(self, **arguments: Any) -> Any:
        if self.abandoned:
            raise RuntimeError("nobody waits for this kernel any more")
        if self.kernel.overload is not None:
            return self.kernel.overload(**arguments)
        if self._inner == []:
            return self.kernel.run(**arguments)  # without the mode, which costs time on the host
        inner = self._inner or []
        with Lowered(self.field.arch, self.field.options, inner):
            result = self.kernel.run(**arguments)
        self._inner = inner
        return result
