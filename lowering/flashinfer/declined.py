"""FlashInfer's kernels that cannot keep what a semantic op promises: they decline, so that reports say why."""

from __future__ import annotations

from typing import Any, NoReturn

from ...arch import Arch
from ...registry import Call, No, Verdict, register_kernel

_MXFP8 = (
    "rounds rows to MXFP8 (three bits of mantissa) before it multiplies, which the model does not; "
    "the same weights with bf16 rows are {}"
)
DECLINED = {
    ("gated_delta_rule_update", "flashinfer.gdn_decode"): (
        "takes the raw projections a and b in bf16 and computes decay and rate from them; what the model computed "
        "itself cannot be given back without rounding, nor a rate above 1"
    ),
    ("gated_delta_rule_verify", "flashinfer.gdn_mtp"): (
        "keeps a state of each draft, or none, and no journal to commit the accepted drafts from"
    ),
    ("moe", "flashinfer.moe_w4a8"): _MXFP8.format("flashinfer.b12x_moe and triton.moe_grouped"),
    ("moe", "flashinfer.cutlass_moe"): _MXFP8.format("triton.moe_decode and triton.moe_grouped"),
}


def _declines(reason: str) -> Any:
    def accepts(call: Call, arch: Arch) -> Verdict:
        return No(reason)

    return accepts


def _never(*args: Any) -> NoReturn:
    raise RuntimeError("a kernel that declines every call was called")


for (_op, _name), _reason in DECLINED.items():
    register_kernel(_op, _name, accepts=_declines(_reason), inline=True, merit=1)(_never)
