"""What a user may get wrong: the message says what, and what to do; never a stack trace from inside a kernel."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile import OptionError
from sm12x_compile.arch import CARDS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seelct": "race"}, "unknown option 'seelct' (did you mean 'select'?); known options: arch, capture, codegen"),
        ({"arch": "rtx4090"}, "option 'arch': unknown arch 'rtx4090'; known: auto, rtx5090, rtxpro6000, gb10"),
        ({"arch": "sm_120"}, "option 'arch': unknown arch 'sm_120'; known: auto"),
        ({"codegen": "triton"}, "option codegen='triton': choose one of 'inductor', 'eager'"),
        ({"race_seconds": 0}, "option 'race_seconds' takes a positive number of seconds, got 0"),
        ({"kernels": ["a", "-b"]}, "option 'kernels': either allow ('a') or deny ('-name'), not both"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["sm12x", sm12x_compile.sm12x])
def test_options_fail_at_the_first_call_with_our_own_message(backend: Any, options: Any, message: str) -> None:
    """`torch.compile` hands options over with the first graph. The error is ours, not Dynamo's around ours."""
    compiled = torch.compile(attention, backend=backend, options=options)
    with pytest.raises(OptionError) as error, torch.no_grad():
        compiled(*(torch.randn(1, 2, 8, 16) for _ in range(3)))
    assert str(error.value).startswith(message)
    assert isinstance(error.value, ValueError) and type(error.value).__name__ == "OptionError"


def test_a_mistake_is_not_kept() -> None:
    given = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    with pytest.raises(OptionError):
        torch.compile(attention, backend="sm12x", options={"arch": "x"})(*given)
    compiled = torch.compile(attention, backend="sm12x", options={"codegen": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), attention(*given))


# ---------------------------------------------------------------- calls that no kernel of ours takes


def refusals(q: Tensor, k: Tensor, v: Tensor, arch: str = "sm120") -> tuple[str | None, dict[str, str]]:
    """The kernel and who declined, for `arch`; the model runs here, and gives what eager gives."""
    step = torch.compile(attention, backend="sm12x", options={"codegen": "eager", "arch": arch})
    with torch.no_grad(), sm12x_compile.collect() as report:
        torch.testing.assert_close(step(q, k, v), attention(q, k, v), atol=6e-2, rtol=6e-2)
    (site,) = report.sites
    return site.kernel, dict(site.refused)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min), -1) @ v


@pytest.mark.parametrize("arch", ["sm120", "sm121", "sm90"])
def test_a_head_dim_that_is_too_large(arch: str) -> None:
    q = torch.randn(1, 2, 40, 320)
    sinks = torch.randn(2)

    def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT * 0.05, sinks.reshape(1, 2, 1, 1).expand(1, 2, 40, 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v

    report = sm12x_compile.explain(with_sinks, q, q, q, options={"arch": arch})
    (site,) = report.sites
    assert site.kernel == "aten"
    assert dict(site.refused)["triton.prefill"] == "head dim 320 is over 256"


def test_a_dtype_that_is_not_computed() -> None:
    q = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    report = sm12x_compile.explain(masked, q, q, q, options={"arch": "sm120", "kernels": ["-torch.sdpa"]})
    (site,) = report.sites
    assert dict(site.refused)["triton.prefill"] == "computes in fp16, bf16 or fp32, not float64"
    assert site.kernel == "torch.sdpa.masked"


@pytest.mark.parametrize("dim", [1, 7, 320])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_odd_calls_run_all_the_same(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel, _ = refusals(*(torch.randn(1, 2, 9, dim).to(dtype) for _ in range(3)))
    assert kernel


def test_shapes_that_do_not_fit_fail_as_they_do_in_eager() -> None:
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 3, 8, 16)
    with pytest.raises(RuntimeError) as ours, torch.no_grad():
        torch.compile(attention, backend="sm12x", options={"codegen": "eager"})(q, k, k)
    assert "sm12x" not in str(ours.value).lower().replace("sm12x_compile", "")


# ---------------------------------------------------------------- packages that are missing


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    q = torch.randn(1, 2, 40, 16)
    for arch in ("sm120", "cpu"):
        report = sm12x_compile.explain(masked, q, q, q, options={"arch": arch, "kernels": ["-torch.sdpa"]})
        assert dict(report.sites[0].refused)["triton.prefill"].startswith("Triton is not installed")
        assert report.sites[0].kernel == "torch.sdpa.masked"


def test_the_race_on_a_device_that_is_not_there() -> None:
    from sm12x_compile.options import Options
    from sm12x_compile.race import Races
    from sm12x_compile.race.spec import with_defaults
    from sm12x_compile.registry import kernels

    meta = torch.empty(1, 2, 8, 16, device="meta")
    race = Races(Options(), CARDS["cpu"])
    accepted = [k for k in kernels("attention") if k.name.startswith("torch")]
    chosen, why = race.choose(with_defaults("attention", dict(q=meta, k=meta, v=meta, scale=1.0)), accepted)
    assert chosen is accepted[0] and why == []
    assert race.records[0]["why"] == "no race: its tensors are on meta"
