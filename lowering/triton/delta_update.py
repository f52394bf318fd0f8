"""`sm12x::gated_delta_rule_update` and `.._verify` in Triton: one launch, states in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import card_of, device_guard
from .delta_tiles import StepTiles, step_tiles

_QKV = (
    "stride_qb", "stride_qt", "stride_qh", "stride_qd", "stride_kb", "stride_kt", "stride_kh", "stride_kd",
    "stride_vb", "stride_vt", "stride_vh", "stride_vd",
)  # fmt: skip
_JOURNAL = ("stride_jp", "stride_half", "stride_jt", "stride_jh", "stride_jd")


def gated_delta_rule_update(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_pool: Tensor, slots: Tensor, scale: float,
    qk_l2norm: str = "none", eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::gated_delta_rule_update`; see `sm12x_compile.ops.gated_delta_rule` for the arguments.

    No host synchronisation, no atomics: it can be captured in a CUDA graph, and its result is the same every time.

    Returns:
        o ``[B, S, Hv, V]``.

    Raises:
        ValueError: the shapes do not fit.
    """
    B, _, Hv, V = v.shape
    tiles = step_tiles(card_of(q), k.shape[3], V, B * Hv)
    return run_update(tiles, q, k, v, g, beta, state_pool, slots, scale, qk_l2norm, eps, out_dtype)


def run_update(tiles: StepTiles, *args: Any, **kwargs: Any) -> Tensor:
    """`gated_delta_rule_update` with the tiles given."""
    return _run(tiles, *update_launch(tiles, *args, **kwargs))


def _run(tiles: StepTiles, out: Tensor, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Tensor:
    from .delta_step_kernel import step_kernel

    with device_guard(out):
        if out.numel():
            step_kernel[grid](**arguments, num_warps=tiles.num_warps)
    return out


def update_launch(
    tiles: StepTiles, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_pool: Tensor, slots: Tensor,
    scale: float, qk_l2norm: str = "none", eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Any], tuple[int, int, int]]:  # fmt: skip
    """Storage of o, the kernel's arguments by name, and its grid."""
    out, a = _operands(q, k, v, g, beta, state_pool, slots, scale, qk_l2norm, eps, out_dtype)
    a["BLOCK_V"] = tiles.width
    B, _, Hv, V = v.shape
    return out, a, (V // tiles.width, Hv, B)


def gated_delta_rule_verify(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_pool: Tensor, journal: Tensor, slots: Tensor,
    accepted: Tensor, turn: Tensor, scale: float, qk_l2norm: str = "none", eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::gated_delta_rule_verify`; see `sm12x_compile.ops.gated_delta_rule` for the arguments.

    Returns:
        o ``[B, S, Hv, V]``.

    Raises:
        ValueError: the shapes do not fit.
    """
    B, _, Hv, V = v.shape
    tiles = step_tiles(card_of(q), k.shape[3], V, B * Hv)
    return run_verify(
        tiles, q, k, v, g, beta, state_pool, journal, slots, accepted, turn, scale, qk_l2norm, eps, out_dtype
    )  # fmt: skip


def run_verify(tiles: StepTiles, *args: Any, **kwargs: Any) -> Tensor:
    """`gated_delta_rule_verify` with the tiles given."""
    return _run(tiles, *verify_launch(tiles, *args, **kwargs))


def verify_launch(
    tiles: StepTiles, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_pool: Tensor, journal: Tensor,
    slots: Tensor, accepted: Tensor, turn: Tensor, scale: float, qk_l2norm: str = "none", eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Any], tuple[int, int, int]]:  # fmt: skip
    """Storage of o, the kernel's arguments by name, and its grid."""
    out, a = _operands(q, k, v, g, beta, state_pool, slots, scale, qk_l2norm, eps, out_dtype)
    B, S, Hv, V = v.shape
    width = k.shape[3] + V + (1 if g.ndim == 3 else k.shape[3])
    fits = journal.ndim == 5 and journal.shape[2] >= S and journal.shape[3:] == (Hv, width)
    if not fits or journal.shape[:2] != (state_pool.shape[0], 2) or accepted.shape != (B,) or turn.shape != (B,):
        raise ValueError(
            f"journal {tuple(journal.shape)}, accepted {tuple(accepted.shape)} and turn {tuple(turn.shape)} do not "
            f"fit v {tuple(v.shape)}"
        )
    a |= dict(journal=journal, accepted=accepted, stride_acc=accepted.stride(0), turn=turn, stride_turn=turn.stride(0))
    a |= zip(_JOURNAL, journal.stride(), strict=True)
    a |= dict(DEPTH=journal.shape[2], BLOCK_V=tiles.width)
    return out, a, (V // tiles.width, Hv, B)


def _operands(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, slots: Tensor, scale: float,
    qk_l2norm: str, eps: float, out_dtype: torch.dtype | None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    B, S, Hv, V = v.shape
    Hk, K = k.shape[2:]
    fits = q.shape == k.shape and k.shape[:2] == (B, S) and Hv % Hk == 0 and beta.shape == (B, S, Hv)
    fits = fits and g.shape in ((B, S, Hv), (B, S, Hv, K))
    if not fits or pool.shape[1:] != (Hv, K, V) or slots.shape != (B,):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta "
            f"{tuple(beta.shape)}, state_pool {tuple(pool.shape)} and slots {tuple(slots.shape)} do not fit"
        )
    out = v.new_empty(v.shape, dtype=out_dtype or v.dtype)
    a: dict[str, Any] = dict(
        q=q, k=k, v=v, g=g, beta=beta, pool=pool, slots=slots, out=out, stride_slot=slots.stride(0),
        scale=float(scale), eps=float(eps), TOKENS=S, GROUP=Hv // Hk, K=K, V=V,
        NORM=qk_l2norm != "none", PER_CHANNEL=g.ndim == 4, stride_gd=g.stride(3) if g.ndim == 4 else 0,
        DEPTH=0, journal=None, accepted=None, turn=None, stride_acc=0, stride_turn=0, **dict.fromkeys(_JOURNAL, 0),
    )  # fmt: skip
    a |= zip(_QKV, (*q.stride(), *k.stride(), *v.stride()), strict=True)
    a |= zip(("stride_gb", "stride_gt", "stride_gh"), g.stride(), strict=False)
    a |= zip(("stride_bb", "stride_bt", "stride_bh"), beta.stride(), strict=True)
    a |= zip(("stride_pp", "stride_ph", "stride_pk", "stride_pv"), pool.stride(), strict=True)
    a |= zip(("stride_ob", "stride_ot", "stride_oh"), out.stride(), strict=False)
    return out, a
