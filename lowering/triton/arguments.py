"""The operands of `sm12x::attention` as arguments of the Triton kernels, and the calls that they cannot take."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch, by_name, of_device
from ...registry import Call

FAR = 1 << 29  # keys; the kernels hold positions in int32
LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EMPTY_CODES = {"zero": 0, "nan": 1, "mean": 2}
_FAMILIES = ("sm8x", "sm9x", "sm10x", "sm12x")


def triton_missing() -> str | None:
    """Why Triton kernels cannot be used in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def gpu_refusal(arch: Arch) -> str | None:
    """Why our Triton kernels cannot run here, or None."""
    if arch.family not in _FAMILIES:
        return triton_missing() or f"needs a CUDA GPU of compute capability 8.0 or later, not {arch.name}"
    return triton_missing()


def refusal(call: Call, arch: Arch) -> str | None:
    """Why our Triton attention kernels cannot take a call of `sm12x::attention`, in one sentence, or None."""
    missing = gpu_refusal(arch)
    if missing:
        return missing
    q, k, v = call.q, call.k, call.v
    if q.dtype not in DTYPES:
        return f"computes in fp16, bf16 or fp32, not {dtype_name(q.dtype)}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        names = [dtype_name(t.dtype) for t in (q, k, v)]
        return f"needs q, k and v of one dtype, got {names[0]}, {names[1]} and {names[2]}"
    if call.out_dtype is not None and call.out_dtype not in DTYPES:
        return f"writes fp16, bf16 or fp32, not {dtype_name(call.out_dtype)}"
    for what, tensor in (("head dim", q), ("value head dim", v)):
        size = tensor.shape[3]
        if not isinstance(size, int):
            return f"the {what} must be known while compiling"
        if size > MAX_HEAD_DIM:
            return f"{what} {size} is over {MAX_HEAD_DIM}"
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return "the numbers of heads must be known while compiling"
    if call.hint(k.shape[2]) >= FAR:
        return f"more than {FAR} keys"
    if call.bias is not None and call.bias.dtype not in (*DTYPES, torch.bool):
        return f"a bias must be bool, fp16, bf16 or fp32, not {dtype_name(call.bias.dtype)}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, as a refusal says it."""
    return str(dtype).removeprefix("torch.")


def card_of(q: Tensor) -> Arch:
    """The card that the tensor lives on; Triton's interpreter works on CPU tensors with the tiles of SM12x."""
    return of_device(q.device.index) if q.is_cuda else by_name("rtx5090")


def launches_early(q: Tensor) -> bool:
    """Whether kernels that follow each other overlap (programmatic dependent launch, from SM90 on).

    The next kernel starts while the last one ends, and waits (`gdc_wait`) before it touches what others write. The
    first kernel of a chain is launched as usual: what came before it is then complete for the whole chain.
    """
    return q.is_cuda and card_of(q).pdl


def device_guard(q: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        return torch.cuda.device(q.device)
    return nullcontext()


@cache
def split_head_dim(size: int, aligned: bool = True) -> tuple[int, int]:
    """Widths (powers of two, the second may be 0) of the tiles that hold a head of this size: 80 is 64 + 16.

    Tensor cores need at least 16 columns. Two tiles that add up to a power of two are better as one. So are those
    whose rows are not aligned: Triton 3.6 does not pipeline such loads, and then computes two products with tiles in
    registers and shared memory wrongly on Hopper (seen with 40 = 32 + 16 and 72 = 64 + 16).
    """
    padded = max(16, 1 << (size - 1).bit_length())
    main = padded if padded == size else padded // 2
    rest = 0 if padded == size else max(16, 1 << (size - main - 1).bit_length())
    return (main, rest) if aligned and rest < main else (padded, 0)


def row_tiles(t: Tensor) -> tuple[int, int]:
    """`split_head_dim` of the rows of k or v; they are aligned where Triton can know it."""
    size = t.shape[3]
    if not split_head_dim(size)[1]:
        return split_head_dim(size)
    b, h, row, col = t.stride()
    return split_head_dim(size, col == 1 and not (b % 16 or h % 16 or row % 16 or t.data_ptr() % 16))


def check(q: Tensor, k: Tensor, v: Tensor, empty_rows: str) -> None:
    """The reference's own checks; raises its ValueErrors."""
    if q.shape[1] % k.shape[1] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"sm12x::attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if empty_rows not in EMPTY_CODES:
        raise ValueError(f"sm12x::attention: empty_rows={empty_rows!r}, not one of {tuple(EMPTY_CODES)}")


def _is_wide(a: dict[str, Any]) -> bool:
    """Whether offsets inside a tile (at most 256 rows and columns) may overflow int32."""
    rows = max(abs(a["stride_qs"]), abs(a["stride_kt"]), abs(a["stride_vt"]))
    cols = max(abs(a["stride_qd"]), abs(a["stride_kd"]), abs(a["stride_vd"]))
    return rows + cols >= 1 << 23


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: int | None,
    q_offset: Tensor | None,
    q_shift: int,
    kv_len: Tensor | None,
    key_padding: Tensor | None,
    q_segments: Tensor | None,
    k_segments: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    empty_rows: str,
) -> dict[str, Any]:
    """The arguments that both kernels take, by parameter name; absent operands are None and cost nothing."""
    B, Hq, S, D = q.shape
    T, DV = k.shape[2], v.shape[3]
    a: dict[str, Any] = {"q": q, "k": k, "v": v}
    a["stride_qb"], a["stride_qh"], a["stride_qs"], a["stride_qd"] = q.stride()
    a["stride_kb"], a["stride_kh"], a["stride_kt"], a["stride_kd"] = k.stride()
    a["stride_vb"], a["stride_vh"], a["stride_vt"], a["stride_vd"] = v.stride()
    a["S"], a["T"] = S, T
    a["window_left"] = None if window_left is None else _near(window_left)
    a["window_right"] = None if window_right is None else _near(window_right)
    a["chunk"] = None if chunk is None else _near(chunk)
    a["q_shift"] = _near(q_shift)
    a["q_offset"], a["stride_offset"] = _per_batch(q_offset)
    a["kv_len"], a["stride_len"] = _per_batch(kv_len)
    a["key_padding"], a["stride_pb"], a["stride_pt"] = _per_key(key_padding)
    if q_segments is None or k_segments is None:
        q_segments = k_segments = None
    a["q_segments"], a["stride_qsb"], a["stride_qss"] = _per_key(q_segments)
    a["k_segments"], a["stride_ksb"], a["stride_kst"] = _per_key(k_segments)
    a["bias"] = bias
    a["stride_bb"] = a["stride_bh"] = a["stride_bs"] = a["stride_bt"] = None
    kind = 0
    if bias is not None:
        kind = 2 if bias.dtype == torch.bool else 1
        a["stride_bb"], a["stride_bh"], a["stride_bs"], a["stride_bt"] = bias.expand(B, Hq, S, T).stride()
    a["sinks"], a["stride_sink"] = (None, None) if sinks is None else (sinks, sinks.stride(0))
    # Scores in units of log 2 save an operation a score; they need a positive scale (a running maximum is taken
    # before it is applied) and no additive bias (finfo.min would overflow).
    natural = kind == 1 or bool(softcap) or scale <= 0
    a["scale"] = float(scale) if natural else scale * LOG2E
    a["softcap"] = float(softcap) if softcap else None
    a["GROUP"] = Hq // k.shape[1]
    a["D"], a["DV"] = D, DV
    a["D_MAIN"], a["D_REST"] = row_tiles(k)
    a["DV_MAIN"], a["DV_REST"] = row_tiles(v)
    a["CAUSAL"] = bool(causal)
    a["BIAS"] = kind
    a["NATURAL"] = natural
    a["EMPTY"] = EMPTY_CODES[empty_rows]
    a["IEEE"] = q.dtype == torch.float32
    a["WIDE"] = _is_wide(a)
    return a


def rope_operands(q_rope: Tensor | None, k_rope: Tensor | None, wide: bool) -> dict[str, Any]:
    """The rotary part of latent attention, ``[B, H, S, R]`` and ``[B, T, R]``, or nothing.

    wide: whether the other operands' offsets may overflow int32.
    """
    names = ("stride_qrb", "stride_qrh", "stride_qrs", "stride_qrd", "stride_krb", "stride_krt", "stride_krd")
    a: dict[str, Any] = {"q_rope": q_rope, "k_rope": k_rope, "ROPE": 0, "ROPE_PAD": 0}
    if q_rope is None or k_rope is None:
        return a | dict.fromkeys(names)
    a |= zip(names, (*q_rope.stride(), *k_rope.stride()), strict=True)
    a["WIDE"] = wide or max(map(abs, (*q_rope.stride()[2:], *k_rope.stride()[1:]))) >= 1 << 22
    a["ROPE"] = q_rope.shape[3]
    a["ROPE_PAD"] = max(16, 1 << (q_rope.shape[3] - 1).bit_length())
    return a


def _near(keys: int) -> int:
    return max(-FAR, min(FAR, keys))


def _per_batch(t: Tensor | None) -> tuple[Tensor | None, int | None]:
    if t is None:
        return None, None
    return t, (t.stride(0) if t.dim() and t.shape[0] > 1 else 0)


def _per_key(t: Tensor | None) -> tuple[Tensor | None, int | None, int | None]:
    if t is None:
        return None, None, None
    return t, (t.stride(0) if t.shape[0] > 1 else 0), t.stride(1)
