"""One launch of a kernel's shape space, compiled and judged as `prove` does."""

from __future__ import annotations

import pytest

from sm12x_compile.arch import by_name
from sm12x_compile.lowering.triton import delta_launches, expert_launches  # noqa: F401 (they register their spaces)
from sm12x_compile.lowering.triton.launches import SPACES


def check_launches(card: str, kernel: str, case: str) -> None:
    """Compile every launch of the case; on SM12x nothing may be wrong with it."""
    pytest.importorskip("triton")
    from sm12x_compile.offline import compile_kernel

    arch = by_name(card)
    found = [launch for launch in SPACES[kernel](arch) if launch.case == case]
    assert found, f"{kernel} has no case {case!r}"
    for launch in found:
        made = compile_kernel(
            launch.kernel, launch.arguments, arch, num_warps=launch.num_warps, num_stages=launch.num_stages,
            maxnreg=launch.max_registers,
        )  # fmt: skip
        assert made.fits(arch) and made.forbidden == (), made
        assert bool(made.matrix) == launch.matrix, made
        if arch.family == "sm12x":
            assert all(name.startswith("HMMA.16") for name in made.matrix), made
            assert made.loop_spills <= launch.spills, made
