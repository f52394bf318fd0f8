"""`sm12x::gated_delta_rule`, `sm12x::causal_conv1d` and their steps → Triton kernels.

triton.delta_chunked   two kernels over chunks of 64 tokens; three for few heads, in parallel parts
triton.delta_update    one or a few tokens, states in place
triton.delta_verify    drafts, any of which may be rejected later
triton.conv            whole sequences
triton.conv_update     one or a few tokens, states in place
"""

from __future__ import annotations

from typing import Any

import torch

from sm12x_compile.arch import Arch
from sm12x_compile.registry import Call, accepts_unless, register_kernel

from .triton import causal_conv1d, delta_chunked, delta_update
from .triton.arguments import DTYPES, dtype_name, gpu_refusal
from .triton.delta_tiles import keys_fit

HEAD_DIMS = (64, 128, 256)
MAX_TOKENS = 16  # of a step: its kernels unroll them
MAX_WIDTH = 8
INTEGERS = (torch.int32, torch.int64)


def _dtypes(call: Call, *names: str) -> str | None:
    """The first of these tensors (or dtypes) that the kernels cannot read or write."""
    for name in names:
        value = call.arguments.get(name)
        dtype = value.dtype if isinstance(value, torch.Tensor) else value
        if dtype is not None and dtype not in DTYPES:
            return f"reads and writes fp16, bf16 or fp32, but {name} is {dtype_name(dtype)}"
    return None


def _indices(call: Call, *names: str) -> str | None:
    for name in names:
        tensor = call.arguments.get(name)
        if tensor is not None and tensor.dtype not in INTEGERS:
            return f"{name} must be int32 or int64, not {dtype_name(tensor.dtype)}"
    return None


def _heads(call: Call) -> str | None:
    K, V = call.k.shape[3], call.v.shape[3]
    if K not in HEAD_DIMS or V not in HEAD_DIMS:
        return f"the head dims must be 64, 128 or 256, not {K} and {V}"
    if not isinstance(call.k.shape[2], int) or not isinstance(call.v.shape[2], int):
        return "the numbers of heads must be known while compiling"
    return None


def _few_tokens(tokens: Any) -> str | None:
    if not isinstance(tokens, int):
        return "the number of tokens must be known while compiling"
    return f"{tokens} tokens are more than the {MAX_TOKENS} that it is made for" if tokens > MAX_TOKENS else None


def chunked_refusal(call: Call, arch: Arch) -> str | None:
    """Why `delta_chunked` cannot take this call on this card, in one sentence, or None."""
    missing = gpu_refusal(arch)
    if missing:
        return missing
    if call.v.dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies in v's dtype, which must be fp16 or bf16, not {dtype_name(call.v.dtype)}"
    if call.g.ndim == 4 and not keys_fit(arch, call.k.shape[3]):
        return (
            "a decay per channel takes three tiles of keys and queries, and two chunks of them with 256 channels do "
            "not fit in Hopper's 227 KiB"
        )
    return (
        _heads(call)
        or _dtypes(call, "q", "k", "g", "beta", "initial_state", "out_dtype")
        or _indices(call, "cu_seqlens")
    )


def step_refusal(call: Call, arch: Arch) -> str | None:
    """Why `delta_update` (or `delta_verify`) cannot take this call on this card, in one sentence, or None."""
    journal = call.arguments.get("journal")
    return (
        gpu_refusal(arch)
        or _heads(call)
        or _few_tokens(call.v.shape[1] if journal is None else journal.shape[2])
        or _few_tokens(call.v.shape[1])
        or _dtypes(call, "q", "k", "v", "g", "beta", "state_pool", "journal", "out_dtype")
        or _indices(call, "slots", "accepted", "turn")
    )


def conv_refusal(call: Call, arch: Arch) -> str | None:
    """Why the Triton convolutions cannot take this call on this card, in one sentence, or None."""
    channels, width = call.w.shape
    if not isinstance(channels, int) or not isinstance(width, int) or width > MAX_WIDTH:
        return f"the width must be known while compiling, and at most {MAX_WIDTH}, not {width}"
    state = call.arguments.get("initial_state")
    lengths = [call.arguments.get("state_len"), None if state is None else state.shape[2]]
    if "state_pool" in call.arguments:
        lengths = [call.state_pool.shape[2]]
    if any(n is not None and (not isinstance(n, int) or n > MAX_TOKENS) for n in lengths):
        return f"the state's length must be known while compiling, and at most {MAX_TOKENS}"
    return (
        gpu_refusal(arch)
        or ("state_pool" in call.arguments and _few_tokens(call.x.shape[2]))
        or _dtypes(call, "x", "w", "bias", "initial_state", "state_pool")
        or _indices(call, "slots")
    ) or None


for _op, _kernel, _refusal, _function in (
    ("gated_delta_rule", "triton.delta_chunked", chunked_refusal, delta_chunked.gated_delta_rule_chunked),
    ("gated_delta_rule_update", "triton.delta_update", step_refusal, delta_update.gated_delta_rule_update),
    ("gated_delta_rule_verify", "triton.delta_verify", step_refusal, delta_update.gated_delta_rule_verify),
    ("causal_conv1d", "triton.conv", conv_refusal, causal_conv1d.causal_conv1d),
    ("causal_conv1d_update", "triton.conv_update", conv_refusal, causal_conv1d.causal_conv1d_update),
):
    register_kernel(_op, _kernel, accepts=accepts_unless(_refusal), merit=30, triton=True)(_function)
