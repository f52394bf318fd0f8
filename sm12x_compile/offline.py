"""Compile a Triton kernel for an `Arch` with neither a GPU nor a driver, and read back what the compiler made.

Registers and spills come from the assembler's report, shared memory from the kernel's metadata, instructions from
the disassembly. Nothing here runs the kernel: "compiled for sm_120a" is all that it can say.
Works with Triton 3.6 to 3.9; all of them bundle the assembler and the disassembler.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .arch import Arch

# Matrix instructions by the hardware that has them; anything outside a family's list is forbidden to it.
_MATRIX = re.compile(r"^(HMMA|QMMA|OMMA|IMMA|DMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)$")
_FORBIDDEN = {
    "sm12x": re.compile(r"^(HGMMA|QGMMA|IGMMA|UTC\w*|LDTM|STTM|UTMACMDFLUSHTM)$"),
    "sm10x": re.compile(r"^(HGMMA|QGMMA|IGMMA)$"),
    "sm9x": re.compile(r"^(UTC\w*|LDTM|STTM)$"),
    "sm8x": re.compile(r"^(HGMMA|QGMMA|IGMMA|UTC\w*|LDTM|STTM|UTMA\w*)$"),
}
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;]*);", re.M
)
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)")

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    Attributes:
        kernel: name of the Triton function.
        target: e.g. ``sm_120a``.
        triton: version of Triton.
        registers: per thread.
        spill_bytes: bytes per thread that the assembler stores to and loads from local memory, together.
        loop_spills: local-memory instructions inside the loops that hold matrix instructions; inside any loop
            of a kernel that has none.
        shared_bytes: dynamic shared memory of a block.
        num_warps: warps of a block, as compiled.
        matrix: matrix instructions in the SASS, e.g. ``{"HMMA.16816.F32.BF16": 64}``.
        forbidden: instructions in the SASS that the target's family doesn't have.
    """

    kernel: str
    target: str
    triton: str
    registers: int
    spill_bytes: int
    loop_spills: int
    shared_bytes: int
    num_warps: int
    matrix: dict[str, int]
    forbidden: tuple[str, ...]

    def fits(self, arch: Arch) -> bool:
        """Whether a block gets the shared memory that it asks for; the driver checks it only at load."""
        return self.shared_bytes <= arch.smem_per_block

_SM_BYTE = 49  # of the ELF header's flags, in a cubin of CUDA 12.8 and later: the architecture's number


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    arch: Arch,
    *,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile `kernel` as a launch with these arguments on `arch` would.

    Args:
        kernel: a ``@triton.jit`` function, or one wrapped by autotune or heuristics.
        arguments: every parameter by name: tensors (``meta`` ones will do; base addresses count as aligned to
            16 bytes, as the caching allocator's are), ints, floats, None, and the values of the constexprs.
        arch: the card to compile for.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: `arch` is no CUDA card, or an argument is missing.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not arch.is_cuda:
        raise ValueError(f"{arch.name} is no CUDA card")
    while not isinstance(kernel, triton.runtime.jit.JITFunction):
        kernel = kernel.fn
    signature, constants, attributes = _specialise(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    major, minor = arch.capability
    # Fusing a * b + c is what launches do today; Triton 3.9 warns that its default will change.
    options: dict[str, Any] = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    log = io.StringIO()
    # A cache hit would skip the assembler, and with it the report of registers and spills.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    registers, stores, loads = _resources(log.getvalue())
    code = _disassemble(binary.asm["cubin"])
    forbidden = _FORBIDDEN.get(arch.family)
    target = re.search(r"\.target\s+(\w+)", binary.asm["ptx"])
    return Compiled(
        kernel=kernel.__name__,
        target=target.group(1) if target else "",
        triton=triton.__version__,
        registers=registers,
        spill_bytes=stores + loads,
        loop_spills=_loop_spills(code),
        shared_bytes=binary.metadata.shared,
        num_warps=binary.metadata.num_warps,
        matrix=dict(Counter(i.opcode + i.suffix for i in code if _MATRIX.match(i.opcode))),
        forbidden=tuple(sorted({i.opcode for i in code if forbidden and forbidden.match(i.opcode)})),
    )


def identity(
    kernel: Any,
    arguments: Mapping[str, Any],
    arch: Arch,
    *,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> str:
    """A text that is the same for two launches exactly if they compile to the same thing with the tools at hand."""
    import triton

    while not isinstance(kernel, triton.runtime.jit.JITFunction):
        kernel = kernel.fn
    signature, constants, attributes = _specialise(kernel, arguments)
    parts = (kernel.cache_key, sorted(signature.items()), sorted(constants.items()), sorted(attributes))
    return repr((triton.__version__, arch.target, parts, num_warps, num_stages, maxnreg))


def _specialise(
    kernel: Any, arguments: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and alignment hints, by the rules that Triton's launcher applies to real arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name not in arguments:
            raise ValueError(f"{kernel.__name__}: no value for {name}")
        value = arguments[name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise ValueError(f"{kernel.__name__}: cannot pass {type(value).__name__} as {name}")
    return signature, constants, attributes


def _resources(log: str) -> tuple[int, int, int]:
    """Registers, spill stores and spill loads out of the text of ``ptxas -v``."""
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spilled is None:
        raise RuntimeError(f"the assembler reported no resources: {log[-500:]!r}")
    return int(used.group(1)), int(spilled.group(1)), int(spilled.group(2))


@dataclass(frozen=True)
class _Instruction:
    address: int
    opcode: str
    suffix: str
    operands: str


def _disassemble(cubin: bytes) -> list[_Instruction]:
    text = _sass(cubin)
    if "Cannot decode architecture 'SM121" in text:
        # Triton 3.6 brings a disassembler that does not know sm_121, whose instructions are those of sm_120.
        text = _sass(cubin[:_SM_BYTE] + bytes([120]) + cubin[_SM_BYTE + 1 :])
    code = [_Instruction(int(a, 16), op, suffix, rest) for a, op, suffix, rest in _LINE.findall(text)]
    if not code:
        raise RuntimeError(f"cuobjdump could not read the code: {text.strip()[:300]}")
    return code


def _sass(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.path.dirname(knobs.nvidia.nvdisasm.path) + os.pathsep + os.environ.get("PATH", "")
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name],
            capture_output=True, text=True, env={**os.environ, "PATH": path},
        )  # fmt: skip
    return done.stdout + done.stderr


def _loop_spills(code: list[_Instruction]) -> int:
    """Local-memory instructions in the loops that matter; a loop is what a backward branch spans."""
    loops = []
    for i in code:
        target = _ADDRESS.search(i.operands) if i.opcode == "BRA" else None
        if target and int(target.group(1), 16) < i.address:
            loops.append((int(target.group(1), 16), i.address))
    matrix = [i.address for i in code if _MATRIX.match(i.opcode)]
    hot = [(a, b) for a, b in loops if any(a <= m <= b for m in matrix)] if matrix else loops
    return sum(i.opcode in ("LDL", "STL") and any(a <= i.address <= b for a, b in hot) for i in code)
