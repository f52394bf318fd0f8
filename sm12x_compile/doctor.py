"""The doctor: what this machine has, what is missing and how to install it, and what each op would use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import arch as arch_records
from .arch import Arch
from .capture import install, wrap
from .lowering.select import REFERENCE, choose
from .options import Options
from .race import racing
from .race.verdicts import folder
from .race.verify import verifies
from .samples import samples
from .toolchain import (
    Check,
    Level,
    check_assembler,
    check_cuda_build,
    check_flashinfer,
    check_lowering,
    check_memory,
)


@dataclass(frozen=True)
class Requirement:
    """A package and the versions that this release is tested with: ``low <= version < high``."""

    package: str
    low: tuple[int, ...]
    high: tuple[int, ...] | None
    needed: bool
    install: str

    @property
    def span(self) -> str:
        low = ".".join(map(str, self.low))
        return f">={low}" + (f",<{'.'.join(map(str, self.high))}" if self.high else "")


# The same ranges as in pyproject.toml; a test holds them together.
REQUIREMENTS = (
    Requirement("torch", (2, 11), (2, 14), True, 'pip install "torch>=2.11,<2.14"'),
    Requirement("triton", (3, 6), None, platform.system() == "Linux", 'pip install "triton>=3.6"'),
    Requirement("transformers", (5, 17), (5, 24), False, 'pip install "transformers>=5.17,<5.24"'),
    Requirement("flashinfer-python", (0, 6, 18), None, False, 'pip install "flashinfer-python>=0.6.18"'),
)


def check_package(requirement: Requirement) -> Check:
    """Whether a package is installed in a supported version."""
    r = requirement
    try:
        version = importlib.metadata.version(r.package)
    except importlib.metadata.PackageNotFoundError:
        return Check(r.package, "broken" if r.needed else "note", "not installed", r.install)
    parts = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if parts < r.low or (r.high is not None and parts >= r.high):
        return Check(r.package, "broken" if r.needed else "note", f"{version}, supported {r.span}", r.install)
    return Check(r.package, "ok", f"{version} (supported {r.span})")


def check_device() -> Check:
    """The CUDA device, if any, and whether this package is made for it."""
    if not torch.cuda.is_available():
        build = "a CPU build of torch" if torch.version.cuda is None else "torch finds no CUDA device"
        advice = "a CPU runs every model, for trying out and for tests; speed needs an NVIDIA GPU"
        return Check("device", "note", f"CPU ({build})", advice)
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    found = f"{name}, compute capability {capability[0]}.{capability[1]}"
    arch = arch_records.of_device()
    if arch.family != "sm12x":
        return Check("device", "note", found, "not an SM12x card: everything runs, the tuning is for SM12x")
    return Check("device", "ok", found)


def check_compiler() -> Check:
    """Inductor compiles C++ for the CPU."""
    for name in ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path:
            return Check("C++ compiler", "ok", path)
    level: Level = "note" if torch.cuda.is_available() else "broken"
    advice = "apt-get install g++   (without one, a CPU needs options={'codegen': 'eager'})"
    return Check("C++ compiler", level, "none found", advice)


def check_backend() -> Check:
    """Whether ``torch.compile(..., backend="sm12x")`` finds us by name."""
    if "sm12x" in torch.compiler.list_backends():
        return Check("backend", "ok", 'listed: torch.compile(model, backend="sm12x")')
    return Check("backend", "broken", "not listed by torch.compiler.list_backends()",
                 "pip install -e .   (or pass backend=sm12x_compile.sm12x)")  # fmt: skip


def check_arch(name: str) -> Check:
    """Which record of facts the lowering plans with."""
    arch, planned = _arch(name)
    facts = ""
    if arch.is_cuda:
        facts = f" ({arch.target}): {arch.sm_count} SMs, {arch.smem_per_block:,} B of shared memory a block"
    return Check("arch", "ok", arch.name + facts, "planned: not the device at hand" if planned else "")


def _arch(name: str) -> tuple[Arch, bool]:
    return arch_records.resolve(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def checks(arch: str = "auto") -> list[Check]:
    """Everything the doctor looks at, in the order it prints.

    Raises:
        ValueError: `arch` is not a known name.
    """
    record, _ = _arch(arch)
    found = [check_device(), check_arch(arch), Check("python", "ok", platform.python_version())]
    found += [check_package(requirement) for requirement in REQUIREMENTS]
    tools = [check_cuda_build(), check_memory(record), check_flashinfer(record)]
    if record.is_cuda:
        tools += [check_assembler(record), check_lowering(record)]
    found += [check for check in tools if check is not None]
    return [*found, check_compiler(), check_backend(), check_capture(), check_race(record)]


def check_capture() -> Check:
    """What is in force while our backend compiles: functions that become one node, Python that is rewritten."""
    functions = [function.__qualname__ for function in install.installed()]
    rewriting = "rewritten while tracing" if wrap.is_installed() else "left as it is with this torch"
    found = f"data-dependent Python is {rewriting}; functions taken as one node: {', '.join(functions) or 'none yet'}"
    return Check("capture", "ok" if wrap.is_installed() else "note", found, "options={'capture': False} turns it off")


def check_race(arch: Arch) -> Check:
    """How kernels are chosen by default, and where verdicts are kept."""
    options = Options()
    choice = "by a race at first use" if racing(options, arch) else "in order of merit"
    verified = "; the first call is held against your own code" if verifies(options, arch) else ""
    where = folder()
    kept = len([p for p in where.glob("*.json") if not p.name.endswith(".strikes.json")])
    found = f"kernels are chosen {choice}{verified}; {kept} verdict(s) in {where}"
    parent = next(p for p in (where, *where.parents) if p.exists())
    if racing(options, arch) and not os.access(parent, os.W_OK):
        return Check("race", "note", found, f"{parent} cannot be written to, so each process races: set XDG_CACHE_HOME")
    return Check("race", "ok", found)


@dataclass(frozen=True)
class Choice:
    """What one op would use for a sample call: the first kernel that accepts, and who declined before it."""

    op: str
    sample: str
    kernel: str
    refused: list[tuple[str, str]]


def choices(arch: str = "auto") -> list[Choice]:
    """Which kernel would run a few sample calls of the ops that have kernels, and why others declined.

    Raises:
        ValueError: `arch` is not a known name.
    """
    record, _ = _arch(arch)
    found = []
    for sample in samples("cpu", large=True):
        kernel, refused = choose(sample.call, record, Options())
        found.append(Choice(sample.call.op, sample.title, kernel.name if kernel else REFERENCE, refused))
    return found


def render(found: list[Check], ops: list[Choice]) -> Group:
    """Both lists as rich tables."""
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]BROKEN[/]"}
    machine = Table(title="this machine", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        machine.add_column(column, overflow="fold")
    for check in found:
        # As Text: a console must not take "[cuda]" for markup.
        machine.add_row(marks[check.level], *map(Text, (check.name, check.found, check.advice)))
    kernel_table = Table(title="what each op would use here", title_justify="left")
    for column in ("op", "call", "kernel", "asked before it, and why not"):
        kernel_table.add_column(column, overflow="fold")
    for choice in ops:
        why = "\n".join(f"{name}: {reason}" for name, reason in choice.refused)
        kernel_table.add_row(*map(Text, (choice.op, choice.sample, choice.kernel, why)))
    return Group(machine, kernel_table)


def to_dict(found: list[Check], ops: list[Choice]) -> dict[str, Any]:
    return {"checks": [asdict(c) for c in found], "ops": [asdict(o) for o in ops]}


def healthy(found: list[Check]) -> bool:
    return not any(check.level == "broken" for check in found)
