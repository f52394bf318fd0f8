"""Operands, the judge and the CPU's own kernels: what is right passes, what is a little wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import acceptances
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.race.contest import Wrong
from sm12x_compile.race.entrant import Entrant, Field
from sm12x_compile.race.judge import ALLOWED, disagreement
from sm12x_compile.race.operands import draw
from sm12x_compile.race.spec import CannotRace, Spec, bucket, describe, shrunk, sizes, with_defaults
from sm12x_compile.race.timing import HostTimer
from sm12x_compile.registry import YES, Kernel

CPU = CARDS["cpu"]
BF16, INT = torch.bfloat16, torch.int64


def e(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def attention(**more: Any) -> dict[str, Any]:
    return {"q": e(2, 4, 24, 16), "k": e(2, 2, 40, 16), "v": e(2, 2, 40, 8), "scale": 0.25, **more}


def delta(**more: Any) -> dict[str, Any]:
    return {
        "q": e(2, 5, 2, 16), "k": e(2, 5, 2, 16), "v": e(2, 5, 4, 8), "g": e(2, 5, 4), "beta": e(2, 5, 4),
        "scale": 0.25, **more,
    }  # fmt: skip


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("attention", attention()),
    "bf16": ("attention", {n: v.to(BF16) if isinstance(v, Tensor) else v for n, v in attention().items()}),
    "cache": ("attention", attention(causal=True, q_offset=e(dtype=INT))),
    "lengths": ("attention", attention(kv_len=e(2, dtype=INT), window_left=7, causal=True, q_shift=16)),
    "masks": ("attention", attention(key_padding=e(2, 40, dtype=torch.bool), bias=e(2, 1, 24, 40), sinks=e(4))),
    "packed": ("attention", attention(q_segments=e(1, 24, dtype=torch.int32), k_segments=e(1, 40, dtype=torch.int32))),
    "heads last": ("attention", attention(k=e(2, 40, 2, 16).transpose(1, 2), v=e(2, 40, 2, 8).transpose(1, 2))),
    "broadcast": ("attention", attention(k=e(1, 2, 40, 16).expand(2, -1, -1, -1), softcap=20.0)),
    "latent": ("mla", {
        "q_nope": e(1, 4, 6, 16), "q_rope": e(1, 4, 6, 8), "latent": e(1, 12, 32), "k_rope": e(1, 12, 8),
        "w_uk": e(4, 28, 32)[:, :16], "w_uv": e(4, 28, 32)[:, 16:], "scale": 0.2, "causal": True, "q_shift": 6,
    }),
    "experts": ("moe", {
        "x": e(9, 16), "topk_ids": e(9, 2, dtype=INT), "topk_weights": e(9, 2), "w13": e(4, 24, 16), "w2": e(4, 16, 12),
        "w13_bias": e(4, 24), "w2_bias": e(4, 16),
    }),
    "experts, mxfp4": ("moe", {
        "x": e(9, 64, dtype=BF16), "topk_ids": e(9, 2, dtype=INT), "topk_weights": e(9, 2), "format": "mxfp4",
        "w13": e(4, 64, 32, dtype=torch.uint8), "w2": e(4, 64, 16, dtype=torch.uint8),
        "w13_scale": e(4, 64, 2, dtype=torch.uint8), "w2_scale": e(4, 64, 1, dtype=torch.uint8),
    }),
    "route": ("moe_route", {"logits": e(9, 16), "top_k": 4, "renormalise": True, "correction_bias": e(16)}),
    "route, bf16": ("moe_route", {"logits": e(9, 128, dtype=BF16), "top_k": 8, "score": "sigmoid"}),
    "mxfp4": ("mxfp4_linear", {
        "x": e(3, 5, 64), "weight": e(24, 32, dtype=torch.uint8), "scales": e(24, 2, dtype=torch.uint8),
    }),
    "delta": ("gated_delta_rule", delta(initial_state=e(2, 4, 16, 8))),
    "delta, packed": ("gated_delta_rule", {
        "q": e(1, 20, 2, 16), "k": e(1, 20, 2, 16), "v": e(1, 20, 2, 8), "g": e(1, 20, 2, 16), "beta": e(1, 20, 2),
        "scale": 1.0, "cu_seqlens": e(4, dtype=INT), "qk_l2norm": "rsqrt",
    }),
    "delta, step": ("gated_delta_rule_update", delta(state_pool=e(7, 4, 16, 8), slots=e(2, dtype=INT))),
    "delta, verify": ("gated_delta_rule_verify", delta(
        state_pool=e(7, 4, 16, 8), journal=e(7, 2, 6, 4, 25), slots=e(2, dtype=INT), accepted=e(2, dtype=INT),
        turn=e(2, dtype=INT),
    )),
    "conv": ("causal_conv1d", {"x": e(2, 20, 6).mT, "w": e(6, 4), "initial_state": e(2, 6, 3), "activation": "silu"}),
    "conv, step": ("causal_conv1d_update", {
        "x": e(2, 6, 1), "w": e(6, 4), "state_pool": e(5, 6, 4), "slots": e(2, dtype=INT), "bias": e(6),
    }),
}  # fmt: skip


def spec_of(case: str) -> Spec:
    op, given = CALLS[case]
    return describe(with_defaults(op, given))


def field_of(spec: Spec, seed: int = 3) -> Field:
    return Field(spec, torch.device("cpu"), CPU, Options(), HostTimer(), seed=seed)


def entrant(spec: Spec, run: Callable[..., Any]) -> Entrant:
    return Entrant(Kernel(spec.op, "made up", lambda call, arch: YES, run, True, 50, None), field_of(spec))


def test_every_op_is_drawn() -> None:
    assert {op for op, _ in CALLS.values()} == {op for op in OPS if op in describe.__globals__["DIMS"]}


@pytest.mark.parametrize("case", CALLS)
def test_operands_are_as_the_call_says_and_the_kernels_here_are_right(case: str) -> None:
    op, given = CALLS[case]
    call, spec = with_defaults(op, given), spec_of(case)
    drawn = draw(spec, torch.device("cpu"), torch.Generator().manual_seed(1))
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            assert (drawn[name].shape, drawn[name].stride()) == (value.shape, value.stride()), name
            assert drawn[name].dtype == value.dtype
        else:
            assert drawn[name] == value
    accepted, _ = acceptances(call, CPU, Options())
    for kernel in accepted:
        assert Entrant(kernel, field_of(spec)).check() <= ALLOWED[BF16], kernel.name
    truth = entrant(spec, OPS[op].reference)
    assert truth.check() == 0.0 and truth.seconds() > 0


WRONG: dict[str, Callable[[Any], Any]] = {
    "scaled": lambda x: x * 1.1,
    "one element": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == x.numel() // 2, 3 + x.abs(), x),
    "NaN": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == 3, torch.nan, x),
    "shifted": lambda x: x.roll(1, 0) if x.shape[0] > 1 else x.roll(1, 1),
    "wider": lambda x: x.double(),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", ["bf16", "experts", "delta", "delta, step", "conv", "mxfp4"])
def test_what_is_wrong_is_found(case: str, wrong: str) -> None:
    spec = spec_of(case)

    def run(**arguments: Any) -> Any:
        found = OPS[spec.op].reference(**arguments)
        return (WRONG[wrong](found[0]), *found[1:]) if isinstance(found, tuple) else WRONG[wrong](found)

    with pytest.raises(Wrong):
        entrant(spec, run).check()


@pytest.mark.parametrize("case", ["delta, step", "delta, verify", "conv, step"])
def test_a_state_that_is_not_written_is_found(case: str) -> None:
    spec = spec_of(case)

    def forgetful(**arguments: Any) -> Any:
        copies = {n: a.clone() if n in OPS[spec.op].mutates else a for n, a in arguments.items()}
        return OPS[spec.op].reference(**copies)

    with pytest.raises(Wrong):
        entrant(spec, forgetful).check()


def test_a_choice_of_experts_may_come_in_any_order_but_must_be_that_choice() -> None:
    spec = spec_of("route, bf16")

    def run(change: Callable[[Tensor, Tensor], Any], **arguments: Any) -> Any:
        return change(*OPS["moe_route"].reference(**arguments))

    assert entrant(spec, lambda **a: run(lambda i, w: (i.flip(1), w.flip(1)), **a)).check() == 0.0
    for change in (lambda i, w: (i.flip(1), w), lambda i, w: ((i + 1) % 128, w)):
        with pytest.raises(Wrong):
            entrant(spec, lambda change=change, **a: run(change, **a)).check()


def test_the_judge() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert disagreement(x, x, 1e-3) == (0.0, None)
    assert disagreement(x.bfloat16().float(), x, 2e-2)[1] is None
    for bad in (x[:1], x.half(), (x, x)):
        assert disagreement(bad, x, 1.0)[1] is not None
    holes = x.masked_fill(x > 2, torch.nan)
    assert disagreement(holes, holes.clone(), 1e-3)[1] is None
    assert "gave" in (disagreement(holes, x, 1e-3)[1] or "")
    assert "lost a NaN" in (disagreement(x, holes, 1e-3)[1] or "")
    zeros = torch.zeros(3)
    assert disagreement(zeros, zeros, 1e-3)[1] is None and disagreement(zeros + 1, zeros, 1e-3)[1] is not None


def test_a_large_call_is_checked_in_part() -> None:
    given = attention(q=e(4, 4, 512, 16), k=e(4, 4096, 2, 16).transpose(1, 2), v=e(4, 2, 4096, 8), causal=True)
    spec = describe(with_defaults("attention", given))
    small = shrunk(spec, spec.flops / 50)
    assert small.flops <= spec.flops / 50 and sizes(small)["D"] == 16 and sizes(small)["H"] == 4
    assert small.tensors["k"].stride == spec.tensors["k"].stride
    assert sizes(small)["T"] == small.tensors["v"].shape[2]
    # The smaller call passes through the reference.
    arguments = draw(small, torch.device("cpu"), torch.Generator())
    assert OPS["attention"].reference(**arguments).shape[2] == sizes(small)["S"]


def test_calls_of_one_bucket() -> None:
    def key(T: int, **more: Any) -> Any:
        return bucket(describe(with_defaults("attention", attention(k=e(2, 2, T, 16), v=e(2, 2, T, 8), **more))))

    assert key(1000) == key(1024) != key(1025)
    assert key(8) != key(9)
    assert key(64) != key(64, causal=True)
    assert key(64, q=e(2, 4, 24, 16)) != key(64, q=e(2, 24, 4, 16).transpose(1, 2))
    assert key(64, q=e(2, 4, 24, 16)) != key(64, q=e(2, 4, 24, 16, dtype=BF16))


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(CannotRace, match="no rule"):
        draw(Spec("someone's", {}, {}), torch.device("cpu"), torch.Generator())
    overlapping = spec_of("plain")
    x = torch.empty(100).as_strided((2, 4, 24, 16), (1, 1, 1, 1))
    with pytest.raises(CannotRace, match="overlap"):
        draw(describe(with_defaults("attention", attention(q=x))), torch.device("cpu"), torch.Generator())
    with pytest.raises(CannotRace, match="MiB"):
        Field(overlapping, torch.device("cpu"), CPU, Options(), HostTimer(), free_bytes=lambda: 100)


def test_the_users_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    entrant(spec_of("experts"), OPS["moe"].reference).check()
    assert torch.equal(torch.rand(3), expected)
