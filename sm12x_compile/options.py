"""The options of `torch.compile(model, backend="sm12x", options={...})`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import arch as arch_records


class OptionError(ValueError):
    """An option is unknown, malformed or not available yet; the message says what to write instead."""


@dataclass(frozen=True)
class Options:
    """How to compile. Every field may be given through ``options={...}``; the default stands first.

    Attributes:
        arch: ``auto``, a card (``rtx5090``, ``rtxpro6000``, ``gb10``, ``h200``, ``h100``, ``b200``, ``a100``,
            ``l40s``, ``cpu``) or a family (``sm120``, ``sm121``, ...). Anything but the device at hand only *plans*:
            the report names the kernels that the card would get, and the graph runs what suits this one.
        codegen: ``inductor``, or ``eager`` (interpreted: quick to compile, easy to debug).
        cuda_graphs: ``auto`` records graphs whose sizes do not change from call to call (a decode step over a static
            cache) and says in the report why it does not record another; True records prompts and growing caches as
            well, up to eight sizes each, and warns where nothing can be recorded; False records nothing.
        capture: whether known reference functions become one node while tracing.
        select: ``static``: the first kernel in order of merit that accepts. ``race``: those that accept run on
            random operands of the call's sizes; of those that agree with the reference the fastest wins, and the
            verdict is kept on disk. ``auto``: ``race`` on a CUDA device, else ``static``.
        race_seconds: how long one race may take; what has no turn by then is raced by the next process.
        verify: whether the first call of each graph runs the user's own code beside every rewritten site, on the
            real inputs, and falls back to it where they disagree. ``auto``: on an SM12x card.
        patterns: names of patterns to use, or to leave out when they begin with ``-``; None means all.
        kernels: names of kernels to use, or to leave out when they begin with ``-``; None means all.
        moe_weights: ``keep``; ``mxfp4``: experts' weights are quantised once, at their first call, which loses accuracy
            (the report says how much); ``mxfp4_only``: and the originals are given up. Each becomes a NaN, expanded
            to its shape: whoever else reads them gets NaN, saving the model saves NaN, and nothing brings them back
            but loading the model again. The first call after that compiles once more.
    """

    arch: str = "auto"
    codegen: str = "inductor"
    cuda_graphs: bool | str = "auto"
    capture: bool = True
    select: str = "auto"
    race_seconds: float = 3.0
    verify: bool | str = "auto"
    patterns: tuple[str, ...] | None = None
    kernels: tuple[str, ...] | None = None
    moe_weights: str = "keep"

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from a user's mapping.

        Raises:
            OptionError: an unknown key or a value outside the table above.
        """
        given = dict(given or {})
        known = {f.name for f in fields(cls)}
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise OptionError(f"unknown option {key!r}{hint}; known options: {', '.join(sorted(known))}")
        for key in ("patterns", "kernels"):
            if key in given:
                given[key] = _names(key, given[key])
        options = cls(**given)
        options._validate()
        return options

    def _validate(self) -> None:
        _one_of("codegen", self.codegen, ("inductor", "eager"))
        _one_of("cuda_graphs", self.cuda_graphs, ("auto", True, False))
        _one_of("capture", self.capture, (True, False))
        _one_of("select", self.select, ("auto", "race", "static"))
        _one_of("verify", self.verify, ("auto", True, False))
        seconds = self.race_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise OptionError(f"option 'race_seconds' takes a positive number of seconds, got {seconds!r}")
        _one_of("moe_weights", self.moe_weights, ("keep", "mxfp4", "mxfp4_only"))
        if not isinstance(self.arch, str):
            raise OptionError(f"option 'arch' takes a name, got {self.arch!r}")
        if self.arch != "auto":
            try:
                arch_records.by_name(self.arch)
            except ValueError as error:
                raise OptionError(f"option 'arch': {error}") from None
        if self.codegen == "eager" and self.cuda_graphs is True:
            raise OptionError("cuda_graphs=True needs codegen='inductor'; with 'eager' leave it 'auto'")

    def wants_pattern(self, name: str) -> bool:
        return _selected(name, self.patterns)

    def wants_kernel(self, name: str) -> bool:
        return _selected(name, self.kernels)


def _one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    # `is` for booleans: 1 == True, and an option given as 1 is a mistake worth naming.
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise OptionError(f"option {key}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def _names(key: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Iterable):
        names = tuple(value)
        if all(isinstance(n, str) and n.lstrip("-") for n in names):
            allow = [n for n in names if not n.startswith("-")]
            if allow and len(allow) != len(names):
                raise OptionError(f"option {key!r}: either allow ({allow[0]!r}) or deny ('-name'), not both")
            return names
    raise OptionError(f"option {key!r} takes names such as ['attention'] or ['-attention'], got {value!r}")


def _selected(name: str, names: tuple[str, ...] | None) -> bool:
    if names is None:
        return True
    if "-" + name in names:
        return False
    return name in names or (bool(names) and all(n.startswith("-") for n in names))
