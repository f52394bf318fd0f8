"""Prepared weights: what a kernel wants instead of the user's tensors (packed, swizzled, quantised), computed once.

They belong to the *run*, not to the compile: one compiled graph serves many layers, and `load_state_dict`, a merged
LoRA, ``p.data = ...`` or a new Parameter cause no recompile. So they are looked up with the tensors that a call is
given, and hold as long as these: by weak reference to the tensor, and by its storage, address, layout, version
counter and a sample of its content.

    packed, scales = STORE.get(Recipe("mxfp4", quantise), (weight,))

A change is prepared again *into the same tensors*, so that a captured CUDA graph, which holds addresses, sees it.

What is noticed: another tensor or storage; any write that PyTorch counts (`copy_`, `load_state_dict`, optimisers).
Writes through ``p.data`` or ``.detach().numpy()`` are not counted. Against these a sample of `SAMPLE` elements is
compared: at each call on a CPU; on a GPU one weight a call in turn, without waiting for the answer, so that such a
write takes effect some calls late, with a warning. A write that no sampled element sees needs `STORE.forget`.
Tensors made under `torch.inference_mode` have no version counter: they are prepared anew at each call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

logger = logging.getLogger("sm12x_compile")
SAMPLE = 64
_UNCOUNTED = (
    "sm12x: a weight was created under torch.inference_mode, so its changes cannot be noticed, and it is prepared "
    "anew at each call. Create or load the model outside of inference_mode."
)
_LATE = (
    "sm12x: a weight was changed through .data or a detached view, which PyTorch does not count; calls since then "
    "used its old value. Write to the parameter itself under torch.no_grad(), or call "
    "sm12x_compile.prepared.STORE.forget(parameter)."
)


@dataclass(frozen=True)
class Recipe:
    """How to prepare.

    Attributes:
        key: says what is computed; equal keys must compute the same, in whatever graph.
        run: from the sources to the prepared tensors; these must share no memory with the sources.
        drops: whether the sources' memory is given up afterwards. They become one NaN, expanded to their shape: who
            reads them later gets NaN, who writes them in place an error. Floating point only.
    """

    key: str
    run: Callable[..., tuple[Tensor, ...]]
    drops: bool = False


@dataclass
class Event:
    """One preparation, for the report."""

    recipe: Recipe
    sources: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    again: bool


Watcher = Callable[[Event], None]


@dataclass
class _Entry:
    state: tuple[Any, ...]
    storages: tuple[StorageWeakRef, ...]  # while these live, no other storage can take the same address
    others: tuple[TensorWeakRef, ...]  # sources but the first, which is the key
    results: tuple[Tensor, ...]
    samples: tuple[Tensor | None, ...]
    pending: tuple[Tensor, Any] | None = None  # a comparison on the GPU, and the event that says it is done
    stale: bool = False
    gone: bool = False  # the sources' memory was given up


@dataclass
class Store:
    """Prepared tensors by their sources. Thread-safe; an entry goes when its first source does."""

    entries: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    lock: threading.RLock = field(default_factory=threading.RLock)
    turn: int = 0

    def get(self, recipe: Recipe, sources: Sequence[Tensor], watch: Watcher | None = None) -> tuple[Tensor, ...]:
        """The prepared tensors for these sources, computed if they are new or were changed.

        Args:
            recipe: how; its key and the sources are what results are found by.
            sources: the user's tensors, the very objects, not views of them.
            watch: is told of each preparation.

        Raises:
            RuntimeError: a source's memory was given up, and what was prepared from it was forgotten.
        """
        sources = tuple(sources)
        if any(s.is_inference() for s in sources):
            warn_once(_UNCOUNTED)
            return _run(recipe, sources)
        with self.lock:
            of_first = self.entries.setdefault(sources[0], {})
            entry: _Entry | None = of_first.get(recipe.key)
            state = _state(sources)
            current = entry is not None and entry.state == state and _same(entry, sources) and not entry.stale
            if entry is not None and current and (sources[0].is_cuda or not _sample_differs(entry, sources)):
                return _given_up(entry, recipe, sources)
            fresh = _run(recipe, sources)
            results = _into(None if entry is None else entry.results, fresh)
            event = Event(recipe, sources, results, again=entry is not None)
            if entry is not None:
                logger.info("a weight was changed: %s again", recipe.key.splitlines()[0])
            if watch is not None:
                watch(event)
            of_first[recipe.key] = entry = _Entry(
                state, tuple(StorageWeakRef(s.untyped_storage()) for s in sources),
                tuple(TensorWeakRef(s) for s in sources[1:]), results, tuple(map(_sample, sources)),
            )  # fmt: skip
            return _given_up(entry, recipe, sources)

    def has(self, recipe: Recipe, source: Tensor) -> bool:
        """Whether something was prepared by this recipe from this first source, changed since or not."""
        return recipe.key in self.entries.get(source, {})

    def watch_turn(self, sources: Sequence[tuple[Recipe, tuple[Tensor, ...]]]) -> None:
        """On a GPU: compare the sample of one of these entries, and look at the answers of earlier calls."""
        if not sources or not sources[0][1][0].is_cuda or torch.cuda.is_current_stream_capturing():
            return
        with self.lock:
            self.turn += 1
            asked = self.turn % len(sources)
            for k, (recipe, tensors) in enumerate(sources):
                entry: _Entry | None = self.entries.get(tensors[0], {}).get(recipe.key)
                if entry is None:
                    continue
                if entry.pending is not None and entry.pending[1].query():
                    if bool(entry.pending[0].item()):
                        entry.stale = True
                        warn_once(_LATE)
                    entry.pending = None
                if k == asked and entry.pending is None:
                    flags = [f for f in map(_differs, entry.samples, tensors) if f is not None]
                    if flags:
                        done = torch.cuda.Event()
                        entry.pending = (torch.stack(flags).any(), done)
                        done.record()

    def forget(self, source: Tensor | None = None) -> None:
        """Drop what was prepared from `source` (or everything); the next call prepares again."""
        with self.lock:
            if source is None:
                self.entries.clear()
            else:
                self.entries.pop(source, None)

    def bytes(self) -> int:
        """Memory that prepared tensors hold."""
        entries: Iterable[_Entry] = (e for found in self.entries.values() for e in found.values())
        return sum(t.untyped_storage().nbytes() for e in entries for t in e.results)


STORE = Store()


def _given_up(entry: _Entry, recipe: Recipe, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results, once the sources' memory is given up if the recipe says so."""
    if recipe.drops and not entry.gone:
        with torch.inference_mode(False), torch.no_grad():
            for source in sources:
                one = torch.full((), torch.nan, dtype=source.dtype, device=source.device)
                source.data = one.expand(source.shape)
        entry.gone, entry.samples, entry.state = True, tuple(None for _ in sources), _state(sources)
        entry.storages = tuple(StorageWeakRef(s.untyped_storage()) for s in sources)
    return entry.results


def _is_gone(source: Tensor) -> bool:
    """Whether this is the NaN that was left of a weight."""
    alone = source.untyped_storage().nbytes() == source.element_size() and source.numel() > 1
    return alone and source.is_floating_point() and bool(source.detach()[(0,) * source.dim()].isnan())


def _run(recipe: Recipe, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if any(map(_is_gone, sources)):
        raise RuntimeError(
            "sm12x: the memory of a weight was given up when it was prepared (moe_weights='mxfp4_only'), and what was "
            "prepared is gone too: load the model again"
        )
    # Not under the caller's inference mode: its tensors could not be written again later.
    with torch.inference_mode(False), torch.no_grad():
        return recipe.run(*sources)


def _state(sources: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What changes when a tensor is another one, or is written to."""
    return tuple(
        (
            s.untyped_storage()._cdata, s.untyped_storage().data_ptr(), s._version, s.storage_offset(),
            tuple(s.shape), s.stride(), s.dtype,
        )
        for s in sources
    )  # fmt: skip


def _same(entry: _Entry, sources: tuple[Tensor, ...]) -> bool:
    return all(ref() is s for ref, s in zip(entry.others, sources[1:], strict=True))


def _sample(source: Tensor) -> Tensor | None:
    return None if (view := _sampled(source)) is None else view.clone()


def _sampled(source: Tensor) -> Tensor | None:
    """Elements all over a tensor, as integers: NaN equals itself then."""
    if source.numel() == 0:
        return None
    detached = source.detach()
    last = sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True))
    # An odd step, so that not all of the elements stand in one column of a matrix whose width is a power of two.
    step = max(1, last // SAMPLE) | 1
    count = min(SAMPLE, last // step) + 1
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    return detached.as_strided((count,), (step,), detached.storage_offset()).view(integer)


def _differs(kept: Tensor | None, source: Tensor) -> Tensor | None:
    if kept is None or (now := _sampled(source)) is None:
        return None
    return (kept != now).any()


def _sample_differs(entry: _Entry, sources: tuple[Tensor, ...]) -> bool:
    pairs = ((k, _sampled(s)) for k, s in zip(entry.samples, sources, strict=True))
    return any(k is not None and now is not None and not torch.equal(k, now) for k, now in pairs)


def _into(old: tuple[Tensor, ...] | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The new values in the old tensors, where they fit."""
    if old is None or any(
        a.shape != b.shape or a.dtype != b.dtype or a.device != b.device for a, b in zip(old, new, strict=True)
    ):
        return new
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
    return old


_said: set[str] = set()


def warn_once(message: str) -> None:
    import warnings

    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
