"""The race's logic, with candidates and a clock that a test invents: no device, no kernels."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sm12x_compile.race.compiling import compiler_at_work
from sm12x_compile.race.contest import Entry, Verdict, Wrong, contest, from_json, to_json
from sm12x_compile.race.verdicts import Verdicts

KEY = {"call": "something", "device": "a card"}


class Fake:
    """A candidate that takes so long, or does something bad instead."""

    abandoned = False

    def __init__(self, name: str, seconds: float = 1.0, bad: Callable[[], float] | None = None) -> None:
        self.name, self._seconds, self._bad = name, seconds, bad

    def check(self) -> float:
        return self._bad() if self._bad else 1e-3

    def seconds(self) -> float:
        return self._seconds


def raising(error: BaseException) -> Callable[[], float]:
    def bad() -> float:
        raise error

    return bad


def test_the_fastest_wins() -> None:
    verdict = contest([Fake("a", 3.0), Fake("b", 1.0), Fake("c", 2.0)])
    assert (verdict.winner, verdict.complete, verdict.out) == ("b", True, {})
    assert [e.seconds for e in verdict.entries] == [3.0, 1.0, 2.0]


def test_merit_decides_where_times_are_about_equal() -> None:
    assert contest([Fake("a", 1.0), Fake("b", 0.98)]).winner == "a"
    assert contest([Fake("a", 1.0), Fake("b", 0.90)]).winner == "b"
    assert contest([Fake("a", 0.98), Fake("b", 1.0)]).winner == "a"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: no kernel image\nsecond line"), "raised RuntimeError: CUDA error: no kernel image"),
        (Wrong("is off by 1e+00"), "is off by 1e+00"),
        (MemoryError(), "raised MemoryError: "),
        (SystemExit(3), "raised SystemExit: 3"),  # not even this ends the user's process
    ],
)
def test_a_candidate_that_fails_is_out(error: BaseException, said: str) -> None:
    verdict = contest([Fake("bad", 0.1, raising(error)), Fake("good", 5.0)])
    assert verdict.winner == "good" and verdict.complete
    assert verdict.out == {"bad": said}


def test_all_are_out() -> None:
    verdict = contest([Fake("a", bad=raising(Wrong("no"))), Fake("b", bad=raising(Wrong("no")))])
    assert verdict.winner is None and set(verdict.out) == {"a", "b"}


def test_one_that_hangs_is_not_waited_for() -> None:
    release = threading.Event()

    def hang() -> float:
        release.wait(60)
        return 0.0

    tried: list[str] = []
    verdict = contest(
        [Fake("first", 2.0), Fake("hangs", 0.1, hang), Fake("later", 0.1)], patience=0.2,
        step=lambda name, number: tried.append(name),
    )  # fmt: skip
    release.set()
    assert verdict.winner == "first" and not verdict.complete
    assert verdict.out == {"hangs": "did not come back within 0.2 s"}
    assert verdict.entries[2] == Entry("later", "not raced", reason="hangs hangs, and may keep the device busy")
    assert tried == ["first", "hangs"]


def test_the_bound_ends_the_race_but_someone_has_run() -> None:
    now = [0.0]

    def slow() -> float:
        now[0] += 10.0
        return 0.0

    runners = [Fake("bad", 1.0, raising(Wrong("no"))), Fake("a", 2.0, slow), Fake("b", 1.0, slow)]
    verdict = contest(runners, bound=3.0, clock=lambda: now[0])
    assert verdict.winner == "a" and not verdict.complete
    assert verdict.entries[2] == Entry("b", "not raced", reason="the race's 3 s were up")
    # The bound alone does not stop the search for one that is right.
    late = contest([Fake("x", 1.0, lambda: slow() or raising(Wrong("no"))()), Fake("y", 1.0)], clock=lambda: now[0])
    assert late.winner == "y"


def test_one_that_is_still_compiled_is_raced_another_time(tmp_path: Path) -> None:
    release, where = threading.Event(), Verdicts(tmp_path)

    def compile_first() -> float:
        release.wait(60)
        return 0.0

    slow = Fake("slow to build", 0.1, compile_first)
    verdict = contest([slow, Fake("other", 1.0)], patience=0.2, strikes=where.strikes(KEY), compiling=lambda: "nvcc")
    release.set()
    assert verdict.winner == "other" and verdict.out == {} and not verdict.complete
    assert verdict.entries[0].reason == "nvcc is still compiling it; it is raced the next time"
    assert where.strikes(KEY).count("slow to build") == 0 and slow.abandoned


def test_compilers_are_found_below_this_process(tmp_path: Path) -> None:
    for number, name, children in (("1", "python", "2 3"), ("2", "bash", "4"), ("3", "python", ""), ("4", "nvcc", "")):
        task = tmp_path / number / "task" / number
        task.mkdir(parents=True)
        (task / "children").write_text(children)
        (tmp_path / number / "comm").write_text(name + "\n")
    assert compiler_at_work(1, tmp_path) == "nvcc"
    assert compiler_at_work(3, tmp_path) is None and compiler_at_work(99, tmp_path) is None
    assert compiler_at_work() is None


def test_one_that_loses_the_device_is_named_and_the_others_are_not_blamed(tmp_path: Path) -> None:
    where, lost = Verdicts(tmp_path), [False]

    def illegal_access() -> float:
        lost[0] = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def needs_the_device() -> float:
        assert not lost[0], "blamed for what another has done"
        return 0.0

    runners = [Fake("bad", 0.1, illegal_access), Fake("good", 1.0, needs_the_device)]
    verdict = contest(runners, strikes=where.strikes(KEY), works=lambda: not lost[0])
    assert set(verdict.out) == {"bad"} and not verdict.complete
    assert "bad has made the device unusable" in (verdict.entries[1].reason or "")
    # The next process does not try it.
    lost[0] = False
    verdict = contest(runners, strikes=where.strikes(KEY), works=lambda: not lost[0])
    assert verdict.winner == "good" and set(verdict.out) == {"bad"} and verdict.complete


# ---------------------------------------------------------------- a process that ends in the middle


class Killed(BaseException):
    """The process ends here: nothing after it is run."""


def die_while(name: str, where: Verdicts, candidates: list[Fake]) -> None:
    strikes = where.strikes(KEY)
    begin = strikes.begin

    def killed(running: str) -> None:
        begin(running)
        if running == name:
            raise Killed

    strikes.begin = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        contest(candidates, strikes=strikes)


def test_whoever_ran_when_a_process_ended_goes_last_and_then_out(tmp_path: Path) -> None:
    where, runners = Verdicts(tmp_path), [Fake("a", 1.0), Fake("b", 2.0)]
    die_while("a", where, runners)
    assert where.load(KEY) is None  # nothing was decided
    order: list[str] = []
    verdict = contest(runners, strikes=where.strikes(KEY), step=lambda name, number: order.append(name))
    assert order == ["b", "a"] and verdict.winner == "a"  # it gets another chance, behind the others
    assert where.strikes(KEY).count("a") == 0
    die_while("a", where, runners)
    die_while("a", where, runners)
    verdict = contest(runners, strikes=where.strikes(KEY))
    assert verdict.winner == "b"
    assert verdict.out == {"a": "it hung, or the process or the device was lost, when it was tried before"}


# ---------------------------------------------------------------- on disk


def decided() -> Verdict:
    return contest([Fake("a", 1.0), Fake("b", bad=raising(Wrong("no")))])


def test_a_verdict_comes_back(tmp_path: Path) -> None:
    where = Verdicts(tmp_path / "not there yet")
    assert where.load(KEY) is None
    assert where.store(KEY, decided())
    assert where.load(KEY) == decided()
    assert where.load({**KEY, "device": "another"}) is None
    assert not list(tmp_path.rglob("*.tmp"))


_HEAD = '{"version": 1, "key": {"call": "something", "device": "a card"}, "verdict": '


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "3", '{"version": 1}', '{"version": 2, "key": {}, "verdict": {}}', "\x00\xff",
        "[" * 100000, _HEAD + '{"complete": true, "entries": []}}',
        _HEAD + '{"complete": true, "entries": [{"name": "a", "status": "ran", "seconds": "1"}]}}',
        _HEAD + '{"complete": true, "entries": [{"name": "a", "status": "ran", "seconds": 1, "more": "import os"}]}}',
        _HEAD + '{"complete": 1, "entries": [{"name": "a", "status": "ran", "seconds": 1}]}}',
    ],
)  # fmt: skip
def test_a_corrupt_file_is_none_and_is_rewritten(tmp_path: Path, content: str) -> None:
    where = Verdicts(tmp_path)
    where.store(KEY, decided())
    file = next(tmp_path.glob("*.json"))
    file.write_bytes(content.encode("latin-1"))
    assert where.load(KEY) is None
    assert where.store(KEY, decided()) and where.load(KEY) == decided()


def test_another_key_in_the_file_is_not_believed(tmp_path: Path) -> None:
    where = Verdicts(tmp_path)
    where.store(KEY, decided())
    file = next(tmp_path.glob("*.json"))
    data = json.loads(file.read_text())
    data["key"]["device"] = "another"
    file.write_text(json.dumps(data))
    assert where.load(KEY) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a folder cannot be made below a file, whoever asks
    where = Verdicts(blocked / "race")
    with where.alone(1.0):
        assert contest([Fake("a")], strikes=where.strikes(KEY)).winner == "a"
    assert not where.store(KEY, decided()) and where.load(KEY) is None


def test_json_that_is_no_verdict() -> None:
    assert from_json(to_json(decided())) == decided()
    for bad in ({}, {"entries": 3}, {"entries": [3], "complete": True}, {"entries": [{}], "complete": True}):
        with pytest.raises(ValueError, match="no"):
            from_json(bad)
