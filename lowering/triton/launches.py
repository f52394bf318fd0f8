"""Every launch of our Triton kernels that the tile functions can ask for: what `prove` compiles and the tests sample.

A space is a function that goes through the documented shapes of one kernel on one card. Tensors are on `meta`: a launch
is compiled, never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
LATENT_HEADS = (1, 16, 32, 128)


@dataclass(frozen=True)
class Launch:
    """One launch, by the kernel's arguments.

    `case` says which shape, dtype and masks asked for it. `spills` is how many local-memory instructions its hot loop
    may hold: none, but for the rarest combinations of masks.
    """

    case: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    spills: int = 0
    matrix: bool = True


Space = Callable[[Arch], Iterator[Launch]]
SPACES: dict[str, Space] = {}


def space(name: str) -> Callable[[Space], Space]:
    """Register the launches of one kernel under its name."""

    def register(function: Space) -> Space:
        SPACES[name] = function
        return function

    return register


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without contents."""
    return torch.empty(shape, dtype=dtype, device="meta")


def masks(S: int, T: int, dtype: torch.dtype = BF16, heads: int = 32) -> dict[str, dict[str, Any]]:
    """The usual masks by name, for S queries and T keys, and all that can stand together."""
    length, flags, ids = meta(1, dtype=torch.int64), torch.bool, torch.int64
    padding = dict(key_padding=meta(1, T, dtype=flags), kv_len=length, q_offset=length)
    packed = dict(q_segments=meta(1, S, dtype=ids), k_segments=meta(1, T, dtype=ids))
    sinks = meta(heads, dtype=dtype)
    return {
        "none": {},
        "causal": dict(causal=True),
        "window, sinks": dict(causal=True, window_left=1023, sinks=sinks),
        "window, softcap": dict(causal=True, window_left=1023, softcap=50.0),
        "bias": dict(bias=meta(1, 1, S, T, dtype=dtype)),
        "keep mask": dict(bias=meta(1, 1, S, T, dtype=flags), empty_rows="mean"),
        "padding, length": dict(causal=True, **padding),
        "packed": dict(causal=True, **packed),
        "everything": dict(
            causal=True, window_left=1023, chunk=2048, softcap=50.0, bias=meta(1, 1, S, T, dtype=dtype), sinks=sinks,
            empty_rows="mean", **padding, **packed,
        ),
    }  # fmt: skip


def _states(S: int, T: int, D: int, DV: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return meta(1, 32, S, D, dtype=dtype), meta(1, 8, T, D, dtype=dtype), meta(1, 8, T, DV, dtype=dtype)


def _case(D: int, DV: int, dtype: torch.dtype, mask: str, *more: str) -> str:
    return ", ".join((f"{D}x{DV}", str(dtype).removeprefix("torch."), *more, f"mask: {mask}"))


@space("attention_prefill")
def attention_prefill(arch: Arch) -> Iterator[Launch]:
    """Head dims, dtypes and masks of `sm12x::attention` with many queries."""
    from .attention_prefill import prefill_launch
    from .prefill_kernel import prefill_kernel
    from .tiles import prefill_tiles

    for (D, DV), dtype in product(HEAD_DIMS, DTYPES):
        for name, given in masks(4096, 4096, dtype).items():
            tiles = prefill_tiles(arch, D, DV, dtype, "bias" in given)
            arguments = prefill_launch(*_states(4096, 4096, D, DV, dtype), 0.1, **given, tiles=tiles)[1]
            rare = name in ("packed", "everything") or (name == "bias" and dtype == FP32)
            yield Launch(
                _case(D, DV, dtype, name), prefill_kernel, arguments, tiles.num_warps, tiles.num_stages,
                tiles.max_registers, 4 if rare else 0, dtype != FP32,
            )  # fmt: skip


def _combine(case: str, combine: dict[str, Any] | None, tiles: Any) -> Launch:
    from .attention_decode import combine_warps
    from .decode_kernel import combine_kernel

    assert combine is not None
    return Launch(case, combine_kernel, combine, combine_warps(combine, tiles), 2, matrix=False)


@space("attention_decode")
def attention_decode(arch: Arch) -> Iterator[Launch]:
    """The same with 1, 6 or 16 queries, and the kernel that combines the splits."""
    from .attention_decode import decode_launch
    from .decode_kernel import decode_kernel
    from .tiles import decode_tiles

    for (D, DV), dtype, S in product(HEAD_DIMS, DTYPES, (1, 6, 16)):
        for name, given in masks(S, 8192, dtype).items():
            tiles = decode_tiles(arch, D, DV, dtype, 4 * S, "bias" in given)
            operands = _states(S, 8192, D, DV, dtype)
            launched = decode_launch(*operands, 0.1, **given, tiles=tiles, splits=8, pdl=arch.pdl)
            case = _case(D, DV, dtype, name, f"{S} queries")
            yield Launch(
                case, decode_kernel, launched[1], tiles.num_warps, tiles.num_stages,
                spills=4 if name in ("packed", "everything") else 0, matrix=dtype != FP32,
            )  # fmt: skip
            yield _combine(case, launched[3], tiles)


@space("mla_decode")
def mla_decode(arch: Arch) -> Iterator[Launch]:
    """Latents of 512 with 64 rotary columns, DeepSeek's, and smaller ones."""
    from .attention_decode import decode_launch
    from .decode_kernel import decode_kernel
    from .mla_decode import mla_tiles

    for L, H, T, dtype in product((128, 256, 512), LATENT_HEADS, (1024, 65536), (BF16, FP16)):
        latent = meta(1, 1, T, L, dtype=dtype)
        rope: dict[str, Any] = dict(q_rope=meta(1, H, 1, 64, dtype=dtype), k_rope=meta(1, T, 64, dtype=dtype))
        for name, given in masks(1, T, dtype, H).items():
            tiles = mla_tiles(arch, L, H, T, "bias" in given)
            q = meta(1, H, 1, L, dtype=dtype)
            launched = decode_launch(
                q, latent, latent, 0.1, **given, tiles=tiles, splits=8, pdl=arch.pdl, **rope
            )
            case = _case(L, 64, dtype, name, f"{H} heads", f"{T} keys")
            yield Launch(
                case, decode_kernel, launched[1], tiles.num_warps, tiles.num_stages,
                spills=4 if name in ("packed", "everything") else 0,
            )  # fmt: skip
            yield _combine(case, launched[3], tiles)


@space("mla_prefill")
def mla_prefill(arch: Arch) -> Iterator[Launch]:
    """Heads of 128 and 64 with 64 and 32 rotary columns."""
    from .attention_prefill import prefill_launch
    from .prefill_kernel import prefill_kernel
    from .tiles import prefill_tiles

    for (N, R, V), dtype in product(((128, 64, 128), (64, 32, 64)), (BF16, FP16)):
        for name, given in masks(2048, 2048, dtype).items():
            tiles = prefill_tiles(arch, N + R, V, dtype, "bias" in given)
            q, keys = meta(1, 32, 2048, N, dtype=dtype), meta(1, 32, 2048, N + V, dtype=dtype)
            rope: dict[str, Any] = dict(q_rope=meta(1, 32, 2048, R, dtype=dtype), k_rope=meta(1, 2048, R, dtype=dtype))
            arguments = prefill_launch(q, keys[..., :N], keys[..., N:], 0.1, **given, tiles=tiles, **rope)[1]
            yield Launch(
                _case(N + R, V, dtype, name), prefill_kernel, arguments, tiles.num_warps, tiles.num_stages,
                tiles.max_registers, 4 if name in ("packed", "everything") else 0,
            )  # fmt: skip


@space("mla_project")
def mla_project(arch: Arch) -> Iterator[Launch]:
    """Into latent space and out of it, with halves of one parameter."""
    from .mla_absorbed import project_launch
    from .project_kernel import project_kernel

    for H, (N, V), L, dtype in product((16, 128), ((128, 128), (192, 256)), (256, 512), (BF16, FP16)):
        weight = meta(H, N + V, L, dtype=dtype)
        for x, w in ((meta(1, H, 1, N, dtype=dtype), weight[:, :N]), (meta(1, H, 1, L, dtype=dtype), weight[:, N:].mT)):
            arguments, _, tiles = project_launch(x, w, meta(1, H, 1, w.shape[2], dtype=dtype), arch.pdl)
            case = f"{H} heads, {w.shape[1]} to {w.shape[2]}, {str(dtype).removeprefix('torch.')}"
            yield Launch(case, project_kernel, arguments, tiles.num_warps, 2, matrix=False)


@space("row_linear")
def row_linear(arch: Arch) -> Iterator[Launch]:
    """One to four layers on a row, with and without biases; sizes that fill the blocks and that do not."""
    from .row_linear import row_linear_launch, row_tiles
    from .row_linear_kernel import row_linear_kernel

    qkv, many = ((4096, (4096, 1024, 1024)), (2880, (4096, 512, 512))), (2048, (512,) * 4)
    sizes = (*qkv, (14336, (4096,)), (7168, (128256,)), many)
    for (inner, outputs), dtype, biased in product(sizes, DTYPES, (True, False)):
        tiles = row_tiles(arch, sum(outputs), inner, dtype.itemsize)
        weights = [meta(n, inner, dtype=dtype) for n in outputs]
        rows = [meta(1, n, dtype=dtype) for n in outputs]
        biases = [meta(n, dtype=dtype) for n in outputs] if biased else []
        arguments = row_linear_launch(meta(1, inner, dtype=dtype), weights, biases, rows, tiles, arch.pdl)[0]
        case = f"{inner} to {outputs}, {str(dtype).removeprefix('torch.')}{', biased' if biased else ''}"
        yield Launch(case, row_linear_kernel, arguments, tiles.num_warps, 2, matrix=False)
