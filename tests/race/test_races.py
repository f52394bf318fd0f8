"""Races on the CPU, through `torch.compile`: with real kernels, and with some that misbehave."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sm12x_compile
from sm12x_compile import YES, No, register_kernel, registry
from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import acceptances
from sm12x_compile.options import Options
from sm12x_compile.race import identity, races, verdicts
from sm12x_compile.race.spec import with_defaults
from sm12x_compile.report import Report

OPTIONS = {"codegen": "eager", "select": "race"}


def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def inputs(T: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 2, 24, 16), torch.randn(1, 2, T, 16), torch.randn(1, 2, T, 16)


def explain(**options: Any) -> Report:
    return sm12x_compile.explain(model, *inputs(), options={**OPTIONS, **options})


def kernel(name: str, run: Callable[..., Tensor] | None = None, inline: bool = True, merit: int = 90) -> None:
    """A kernel of attention that is quick and right, unless it is given something else to do."""
    given = run or (lambda q, k, v, scale, **rest: F.scaled_dot_product_attention(q, k, v, scale=scale))

    def function(q: Tensor, k: Tensor, v: Tensor, scale: float, *args: Any, **rest: Any) -> Tensor:
        out = given(q, k, v, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    register_kernel("attention", name, accepts=lambda call, arch: YES, inline=inline, merit=merit)(function)


def agrees(report: Report | None = None) -> bool:
    """The compiled model gives what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sm12x", options=OPTIONS)
    given = inputs()
    with torch.no_grad():
        return torch.allclose(compiled(*given), model(*given), atol=1e-5)


def entries(report: Report) -> dict[str, dict[str, Any]]:
    (race,) = report.races
    return {entry["name"]: entry for entry in race["entries"]}


def test_the_race_is_asked_for_on_a_cpu_and_the_default_on_a_gpu() -> None:
    for select, cpu, gpu in (("auto", False, True), ("race", True, True), ("static", False, False)):
        options = Options.parse({"select": select})
        assert (races.racing(options, CARDS["cpu"]), races.racing(options, CARDS["rtx5090"])) == (cpu, gpu)
    assert explain(select="auto").races == []


def test_a_race_decides_and_the_report_tells() -> None:
    slow = lambda q, k, v, scale, **rest: (time.sleep(0.02), F.scaled_dot_product_attention(q, k, v, scale=scale))[1]  # noqa: E731
    kernel("mine.slow", slow, inline=False)
    report = explain()
    (site,) = report.sites
    assert site.kernel in ("torch.sdpa", "torch.sdpa.masked")
    assert dict(site.refused)["mine.slow"].startswith("raced: ")
    assert entries(report)["mine.slow"]["seconds"] > 0.01 > entries(report)[site.kernel]["seconds"]
    assert report.races[0]["source"] == "raced" and report.races[0]["winner"] == site.kernel
    assert agrees()
    json.loads(report.to_json())
    assert "mine.slow" in str(report)


def test_a_verdict_is_kept_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = explain()
    assert first.races[0]["source"] == "raced"
    assert explain().races == []  # settled in this process
    monkeypatch.setattr(races, "_settled", {})
    second = explain()
    assert second.races[0]["source"] == "kept"
    assert second.races[0]["winner"] == first.races[0]["winner"]
    # Another version of anything, or of the kernels themselves: a new race.
    monkeypatch.setattr(races, "_settled", {})
    monkeypatch.setattr(races, "versions", lambda: {**identity.versions(), "triton": "99"})
    assert explain().races[0]["source"] == "raced"
    monkeypatch.setattr(races, "versions", identity.versions)
    kernel("mine.new")
    assert explain().races[0]["source"] == "raced"


def test_layers_that_are_alike_race_once() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return model(model(q, k, v), k, v)

    report = sm12x_compile.explain(twice, *inputs(), options=OPTIONS)
    assert len(report.sites) == 2 and len(report.races) == 1


def wrong(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1], scale=scale)


def nan(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.full((*q.shape[:3], v.shape[3]), torch.nan)


def crash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def other_shape(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return v.clone()


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("bad", "said"),
    [(wrong, "is off by"), (nan, "NaN"), (crash, "raised RuntimeError: CUDA error: an illegal"), (other_shape, "gave")],
)
def test_a_kernel_that_misbehaves_is_out(bad: Callable[..., Tensor], said: str, inline: bool) -> None:
    kernel("mine.bad", bad, inline)
    assert registry.kernels("attention")[0].name == "mine.bad"  # without a race it would be used
    report = explain()
    assert report.sites[0].kernel != "mine.bad"
    assert entries(report)["mine.bad"]["status"] == "out"
    assert said in dict(report.sites[0].refused)["mine.bad"] and said in str(report)
    assert agrees()


def test_a_kernel_alone_must_be_right_too_if_it_is_opaque() -> None:
    kernel("mine.bad", wrong, inline=False)
    report = explain(kernels=["mine.bad", "aten"])
    assert report.sites[0].kernel == "aten"  # the formula, which never races
    assert explain(kernels=["mine.bad"]).sites[0].kernel == "reference"


def test_a_kernel_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races.Races, "patience", 0.5)
    release = threading.Event()
    kernel("mine.hangs", lambda q, k, v, scale: (release.wait(60), v)[1], inline=False)
    begun = time.monotonic()
    report = explain()
    assert time.monotonic() - begun < 7
    assert "did not come back within 0.5 s" in entries(report)["mine.hangs"]["reason"]
    assert report.sites[0].kernel == "torch.sdpa"
    assert agrees()
    # It was not decided for good: the next process tries it once more, last; then it is out.
    for status in ("out", "out"):
        monkeypatch.setattr(races, "_settled", {})
        report = explain()
        assert entries(report)["mine.hangs"]["status"] == status
    assert "it hung" in entries(report)["mine.hangs"]["reason"] and report.sites[0].kernel != "mine.hangs"
    release.set()
    for thread in threading.enumerate():
        if thread.name == "race of mine.hangs":  # its call comes back at last, and it does nothing more
            thread.join(30)


def test_the_cache_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert explain().races[0]["source"] == "raced, could not be kept"
    assert agrees()


def test_no_race_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise races.CannotRace("the moon is wrong")

    monkeypatch.setattr(races, "describe", refuse)
    report = explain()
    assert report.sites[0].kernel == "torch.sdpa" and "the moon is wrong" in str(report)


def test_planning_for_another_card_says_what_static_would_choose() -> None:
    report = explain(arch="rtx5090")
    assert report.planned and report.sites[0].kernel == "torch.sdpa"


# ---------------------------------------------------------------- several processes


def race_in_a_process(die: bool, answers: Any) -> None:
    """Forked: race for one call and put the record and the result."""
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork

    def deadly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    kernel("mine.deadly", deadly, inline=False)
    call = with_defaults("attention", dict(zip("qkv", inputs(), strict=True)) | {"scale": 0.3})
    race = races.Races(Options.parse({"select": "race"}), CARDS["cpu"])
    accepted, _ = acceptances(call, CARDS["cpu"], Options())
    chosen, _ = race.choose(call, accepted)
    assert chosen is not None
    answers.put((chosen.name, race.records[0]["source"], [e["status"] for e in race.records[0]["entries"]]))


def test_two_processes_at_once_and_one_that_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def start(die: bool) -> Any:
        process = context.Process(target=race_in_a_process, args=(die, answers))
        process.start()
        return process

    killed = start(die=True)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    folder = verdicts.folder()
    assert [p.name.endswith(".strikes.json") for p in folder.glob("*.json")] == [True]
    # Then two at once: whoever ran when the first was killed gets another chance, and is right.
    both = [start(die=False), start(die=False)]
    found = [answers.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(source for _, source, _ in found) == ["kept", "raced"]
    assert found[0][0] == found[1][0] and found[0][2] == ["ran"] * 3
    assert not list(folder.glob("*.tmp")) and len(list(folder.glob("*.json"))) == 1


def test_accepts_that_declines_is_not_raced() -> None:
    register_kernel("attention", "mine.no", accepts=lambda call, arch: No("not today"), inline=True)(lambda q, **r: q)
    report = explain()
    assert ("mine.no", "not today") in report.sites[0].refused and "mine.no" not in entries(report)
