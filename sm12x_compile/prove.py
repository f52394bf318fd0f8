"""Offline proof: every kernel of ours, in every configuration that a card would get, compiled without that card.

For each launch of `lowering/triton/launches.py` the compiler's own account is read back: registers, spills, shared
memory, matrix instructions. A violation is a block that does not fit, an instruction that the card lacks, local memory
in the hot loop, or a matrix product that missed the tensor cores. What was proved is kept on disk, by the kernel's
source, its arguments and the versions of the tools.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .arch import Arch, by_name
from .lowering.triton import delta_launches, expert_launches, launches  # noqa: F401 (the first two register)
from .offline import Compiled, compile_kernel, identity


class ProofError(RuntimeError):
    """A proof that cannot be begun; the message says what to do."""


@dataclass(frozen=True)
class Proof:
    """One configuration on one card, and what is wrong with it (nothing, if it holds).

    `cases`: how many launches of the shape space compile to it; `case` is the first. `blocks`: blocks that a
    multiprocessor has room for. `spills`: local-memory instructions in the hot loop.
    """

    kernel: str
    arch: str
    case: str
    cases: int
    target: str
    triton: str
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    spills: int
    spill_bytes: int
    blocks: int
    matrix: tuple[str, ...]
    violations: tuple[str, ...]


Progress = Callable[[int, int, Proof], None]


def prove(
    archs: Sequence[str] = ("sm120", "sm121"),
    kernels: Sequence[str] = (),
    sample: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> list[Proof]:
    """Compile every configuration and judge it.

    Args:
        archs: cards or families.
        kernels: names of spaces; all, if none is given.
        sample: prove this many configurations, chosen at random but the same each time.
        jobs: processes; as many as there are cores, if not given.
        progress: called after each with how many are done, how many there are, and the proof.
        cache: folder of earlier proofs; `cache_folder` if not given.

    Raises:
        ProofError: Triton is missing, or a kernel or card is unknown.
    """
    todo = _choose([w for name in archs for w in _work(name, kernels)], sample)
    folder = cache or cache_folder()
    done: list[Proof] = []

    def report(proof: Proof) -> None:
        done.append(proof)
        if progress:
            progress(len(done), len(todo), proof)

    missing = []
    for work in todo:
        found = _load(folder, work.key)
        if found is None:
            missing.append(work)
        else:
            report(_judge(work, found))
    workers = min(jobs or os.cpu_count() or 1, len(missing))
    if workers <= 1:
        for work in missing:
            report(_prove_one(work, folder))
    else:
        # Fresh processes: Triton's compiler and a forked torch do not go together.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(_in_worker, w.arch, tuple(kernels), w.key, str(folder)) for w in missing}
            for future in as_completed(waiting):
                report(future.result())
    return sorted(done, key=lambda p: (p.arch, p.kernel, p.case))


def cache_folder() -> Path:
    """Where proofs are kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sm12x-compile" / "proofs"


# ---------------------------------------------------------------- what there is to prove


@dataclass(frozen=True)
class _Work:
    arch: str
    space: str
    key: str
    cases: int
    launch: Any


def _work(arch_name: str, kernels: Sequence[str]) -> Iterator[_Work]:
    """The configurations of one card: launches that compile to the same thing are one."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        raise ProofError("Triton is not installed: pip install triton") from None
    spaces = launches.SPACES
    unknown = sorted(set(kernels) - set(spaces))
    if unknown:
        raise ProofError(f"unknown kernel {unknown[0]!r}; known: {', '.join(spaces)}")
    try:
        arch = by_name(arch_name)
    except ValueError as error:
        raise ProofError(str(error)) from None
    if not arch.is_cuda:
        raise ProofError(f"{arch_name} is no GPU; name a card such as rtx5090, or a family such as sm120")
    for name in kernels or spaces:
        found: dict[str, list[Any]] = {}
        for launch in spaces[name](arch):
            key = identity(
                launch.kernel, launch.arguments, arch, num_warps=launch.num_warps, num_stages=launch.num_stages,
                maxnreg=launch.max_registers,
            )  # fmt: skip
            found.setdefault(hashlib.sha256(key.encode()).hexdigest()[:32], []).append(launch)
        for key, equal in found.items():
            # The strictest of the launches that share it decides.
            strictest = min(equal, key=lambda launch: launch.spills)
            yield _Work(arch.name, name, key, len(equal), strictest)


def _choose(work: list[_Work], sample: int | None) -> list[_Work]:
    if sample is None or sample >= len(work):
        return work
    return random.Random(0).sample(work, sample)


@cache
def _by_key(arch: str, kernels: tuple[str, ...]) -> dict[str, _Work]:
    """In the order of the process that asks: a kernel's hash by Triton depends on which others were hashed before."""
    return {work.key: work for work in _work(arch, kernels)}


def _in_worker(arch: str, kernels: tuple[str, ...], key: str, folder: str) -> Proof:
    return _prove_one(_by_key(arch, kernels)[key], Path(folder))


# ---------------------------------------------------------------- one configuration


def _prove_one(work: _Work, folder: Path) -> Proof:
    launch = work.launch
    made = compile_kernel(
        launch.kernel, launch.arguments, by_name(work.arch), num_warps=launch.num_warps,
        num_stages=launch.num_stages, maxnreg=launch.max_registers,
    )  # fmt: skip
    _store(folder, work.key, made)
    return _judge(work, made)


def _judge(work: _Work, made: Compiled) -> Proof:
    arch, launch = by_name(work.arch), work.launch
    violations = []
    if not made.fits(arch):
        violations.append(f"needs {made.shared_bytes} B of shared memory, a block gets {arch.smem_per_block} B")
    if made.forbidden:
        violations.append(f"holds instructions that {arch.family} lacks: {', '.join(made.forbidden)}")
    if made.loop_spills > launch.spills:
        violations.append(f"{made.loop_spills} local-memory instructions in its hot loop")
    if launch.matrix and not made.matrix:
        violations.append("no matrix instruction: the products miss the tensor cores")
    return Proof(
        kernel=f"{work.space}: {made.kernel}", arch=arch.name, case=launch.case, cases=work.cases, target=made.target,
        triton=made.triton, num_warps=launch.num_warps, num_stages=launch.num_stages, registers=made.registers,
        shared_bytes=made.shared_bytes, spills=made.loop_spills, spill_bytes=made.spill_bytes,
        blocks=blocks_per_sm(made, arch), matrix=tuple(sorted(made.matrix)), violations=tuple(violations),
    )  # fmt: skip


def blocks_per_sm(made: Compiled, arch: Arch) -> int:
    """Blocks that one multiprocessor holds at a time, by registers, shared memory and warps.

    Registers are handed out in units of 256 a warp, shared memory with 1 KiB a block for the driver (CUDA C++
    Programming Guide, section on multiprocessor level).
    """
    per_warp = -(-made.registers * 32 // 256) * 256
    by_registers = arch.registers_per_sm // (per_warp * made.num_warps)
    by_memory = arch.smem_per_sm // (made.shared_bytes + 1024)
    return min(by_registers, by_memory, arch.warps_per_sm // made.num_warps)


# ---------------------------------------------------------------- what was proved before


def _load(folder: Path, key: str) -> Compiled | None:
    try:
        fields = json.loads((folder / f"{key}.json").read_text())
        return Compiled(**{**fields, "forbidden": tuple(fields["forbidden"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not there, or not readable: it is proved again


def _store(folder: Path, key: str, made: Compiled) -> None:
    """Whole or not at all; a folder that cannot be written to costs time only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(asdict(made), file)
        os.replace(file.name, folder / f"{key}.json")
    except OSError:
        pass
