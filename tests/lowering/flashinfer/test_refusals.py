"""What FlashInfer's candidates decline: a sentence that a user can act on, and never an exception from inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.flashinfer import declined, installed
from sm12x_compile.lowering.select import choose
from sm12x_compile.options import Options
from sm12x_compile.registry import Call, No, kernels

from . import cases
from .cases import CASES, Case, attention, delta_rule, experts, latent
from .check import check
from .stand_ins import ENTRIES

RTX5090 = CARDS["rtx5090"]
bf16, half = torch.bfloat16, torch.float16


def verdict(kernel: str, call: Call, card: str = "rtx5090") -> str:
    """Why it declines, or nothing."""
    found = next(k for k in kernels(call.op) if k.name == kernel).accepts(call, CARDS[card])
    return found.reason if isinstance(found, No) else ""


def bias() -> Any:
    return torch.zeros(1, 1, 1, 64)


padding = lambda: torch.ones(2, 64, dtype=torch.bool)  # noqa: E731
position = cases._at(40)

WORDS = [
    ("xqa", attention(dtype=torch.float32), r"fp16 or bf16 alike, not float32, float32, float32"),
    ("xqa", attention(D=72), r"multiple of 16 up to 512, here 72 and 72"),
    ("xqa", attention(D=64, Dv=128), r"here 64 and 128"),
    ("xqa", attention(Hq=66, Hkv=2), r"among up to 32 heads of 64, not 33"),
    ("xqa", attention(Hq=40, Hkv=2, D=512), r"among up to 16 heads of 512, not 20"),
    ("xqa", attention(T=50), r"a cache of 50 keys cannot be cut"),
    ("xqa", attention(S=3, T=64), r"one query a sequence, not 3"),
    ("xqa", attention(softcap=5.0), r"no softcap"),
    ("xqa", attention(bias=bias), r"does not take a bias or mask tensor"),
    ("xqa", attention(key_padding=padding), r"does not take a padding mask"),
    ("xqa", attention(causal=True, chunk=8), r"no attention in chunks"),
    ("xqa", attention(causal=True, q_offset=position, window_left=7), r"aligns the window to the last key"),
    ("xqa", attention(causal=True, q_shift=20, window_left=7, window_right=3, S=1), r""),
    ("xqa", attention(window_right=3), r"no window to the right"),
    ("xqa", attention(causal=True, q_shift=-1), r"has no keys"),
    ("xqa", attention(causal=True, q_offset=position, empty_rows="mean"), r"cannot tell a query without keys"),
    ("xqa", attention(out_dtype=torch.float64), r"writes fp16, bf16 or fp32, not float64"),
    ("fa2", attention(S=8, T=8, D=96), r"head dims 64, 128, 256, 192/128, here 96/96"),
    ("fa2", attention(S=8, T=8, D=512), r"here 512/512"),
    ("fa2", attention(S=8, causal=True, q_offset=position), r"known on the device alone"),
    ("fa2", attention(kv_len=position), r"known on the device alone"),
    ("fa2", attention(S=8, T=4, causal=True), r"aligns masks to the last key"),
    ("fa2", attention(S=8, T=16, window_left=3), r"aligns masks to the last key"),
    ("fa2", attention(S=8, T=8, causal=True, q_shift=-2), r"first queries have no keys"),
    ("fa2", attention(S=8, T=8, dtype=torch.float32), r"fp16 or bf16 alike"),
    ("fa2", attention(S=8, T=8, causal=True, softcap=2.0, sinks=cases._sinks(4)), r"neither a softcap nor different"),
    ("mla_fa2", latent(kv_len=position), r"known on the device alone"),
    ("mla_fa2", latent(dtype=torch.float32), r"fp16 or bf16 alike, not float32"),
    ("mla_fa2", latent(H=96, S=2, T=64, causal=True, q_shift=62), r"lose a query's last key .* here 96"),
    ("mla_fa2", latent(softcap=2.0), r"neither a softcap nor sinks"),
    ("mla_fa3", latent(H=8, T=8192), r"64 rows at a time, here 8"),
    ("mla_fa3", latent(H=128, T=4096, packed=True), r"would be copied at every step"),
    ("mla_fa3", latent(H=128, T=2048), r"faster from 8192 keys on, here 4096"),
    ("mla_fa3", latent(H=128, T=8192, kv_len=position), r"known on the device alone"),
    ("mla_fa3_token", latent(H=128, T=8192), r"has absorbed the up-projections"),
    ("mla_fa3_token", latent(B=1, H=128, S=2, T=8192, weights=(128, 128)), r"one token of one sequence"),
    ("mla_fa3_token", latent(B=1, H=128, T=16384, weights=(128, 128)), r"faster from 20480 keys on, here 16384"),
    ("mla_xqa", latent(packed=True), r"exactly 128 heads, here 1 of 8"),
    ("mla_xqa", latent(H=128), r"two tensors, to be joined at every step"),
    ("mla_xqa", latent(H=128, packed=True, dtype=half), r"bf16 latents, not float16"),
    ("mla_xqa", latent(H=128, packed=True, T=50), r"a cache of 50 cannot be cut"),
    ("gdn", delta_rule(dtype=torch.float32), r"fp16 or bf16 alike"),
    ("b12x_moe", experts(D=96), r"multiples of 128, not for 96 and 128"),
]


@pytest.mark.parametrize(("kernel", "make", "words"), WORDS)
def test_declines(kernel: str, make: Any, words: str, enter: Callable[[dict[str, Any]], None]) -> None:
    enter(ENTRIES)
    op = next(case.op for case in CASES if case.kernel == f"flashinfer.{kernel}")
    said = verdict(f"flashinfer.{kernel}", Case("", op, "", make).call())
    assert re.search(words, said) and bool(said) == bool(words), said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(activation="swiglu_oai"), "for silu alone, not for swiglu_oai"),
        (dict(limit=7.0), "no limit"),
        (dict(w13_bias=torch.zeros(4, 256)), "no biases"),
        (dict(weight_on="input"), "weights what experts give"),
        (dict(format="nvfp4"), "MXFP4 weights, not nvfp4"),
        (dict(x=torch.zeros(5, 128)), "bf16, not float32"),
        (dict(topk_ids=torch.zeros(5, 2, dtype=torch.int16)), "int32 or int64, not int16"),
    ],
)  # fmt: skip
def test_experts_decline(changed: dict[str, Any], words: str, enter: Callable[[dict[str, Any]], None]) -> None:
    enter(ENTRIES)
    call = Case("", "moe", "", experts()).call()
    assert words in verdict("flashinfer.b12x_moe", Call("moe", {**call.arguments, **changed}))


def test_caches_that_are_no_pages(enter: Callable[[dict[str, Any]], None]) -> None:
    enter(ENTRIES)
    a = Case("", "attention", "", attention(causal=True, q_offset=position)).call().arguments
    wider = torch.zeros(2, 2, 64, 66, dtype=bf16)[..., :64]
    other = {**a, "v": a["v"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert "cannot see a cache with strides" in verdict(
        "flashinfer.xqa", Call("attention", {**a, "k": wider, "v": wider})
    )
    assert "lie in memory alike" in verdict("flashinfer.xqa", Call("attention", other))


# ---------------------------------------------------------------- what is installed


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """`installed.refusal` on a machine with these things."""

    def ask(
        version: tuple[int, ...] | None = (0, 7, 2), modules: tuple[str, ...] = ("tvm_ffi", "cutlass"),
        nvcc: bool = True, card: str = "rtx5090", **needs: Any,
    ) -> str | None:  # fmt: skip
        monkeypatch.setattr(installed, "release", lambda: version)
        monkeypatch.setattr(installed, "_nvcc", lambda: nvcc)
        monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: name if name in modules else None)
        return installed.refusal(CARDS[card], ("sm9x", "sm12x"), **needs)

    return ask


def test_what_is_missing_is_named_with_its_remedy(machine: Callable[..., str | None]) -> None:
    assert machine() is None
    install = 'pip install "sm12x-compile[flashinfer]"'
    assert machine(version=None) == f"flashinfer-python is not installed: {install}"
    assert machine(version=(0, 6, 8)) == f"needs flashinfer-python 0.6.18 or later, not 0.6.8: {install} --upgrade"
    assert "pip install apache-tvm-ffi" in str(machine(modules=()))
    assert "nvcc" in str(machine(nvcc=False)) and machine(nvcc=False, needs_nvcc=False) is None
    assert "pip install nvidia-cutlass-dsl" in str(machine(modules=("tvm_ffi",), needs_cute=True))
    assert machine(card="b200") == "FlashInfer has this kernel for SM9x and SM12x, not for b200"
    assert "not for cpu" in str(machine(card="cpu"))


@pytest.mark.skipif(installed.release() is not None, reason="flashinfer-python is installed")
@pytest.mark.parametrize("card", ["rtx5090", "gb10", "h200", "a100", "b200", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_flashinfer_everything_is_lowered(case: Case, card: str) -> None:
    call = case.call()
    kernel, refused = choose(call, CARDS[card], Options())
    assert kernel is None or not kernel.name.startswith("flashinfer.")
    assert verdict(case.kernel, call, card)
    assert not any("failed" in why for name, why in refused if name.startswith("flashinfer."))


def test_an_entry_point_that_is_gone_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"does not give no_such_package:thing.*'-flashinfer.fa2'"):
        installed.entry("no_such_package:thing")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_fails_inside_is_told_in_a_sentence(case: Case, enter: Callable[[dict[str, Any]], None]) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("building\nsomething.cu(7): error: no such header\n1 error")

    enter(dict.fromkeys(ENTRIES, fail))
    with pytest.raises(installed.FlashInferError) as told:
        check(case)
    assert "something.cu(7): error: no such header" in str(told.value)
    assert f"options={{'kernels': ['-{case.kernel}']}}" in str(told.value)


def test_kernels_that_never_serve_say_why() -> None:
    for (op, name), reason in declined.DECLINED.items():
        kernel = next(k for k in kernels(op) if k.name == name)
        assert kernel.accepts(Call(op, {}), RTX5090) == No(reason)
        for other in re.findall(r"(?:flashinfer|triton)\.\w+", reason):
            assert other in {k.name for k in kernels(op)}
