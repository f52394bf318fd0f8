"""A recording: what is seen while the code still runs, and when it is given up. No GPU is needed for any of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sm12x_compile.cuda_graphs import recording
from sm12x_compile.cuda_graphs.recording import LARGE, MAX_MOVES, MAX_NUMBERS, Recording, recordings


class Trees:
    """Stands for Inductor and its CUDA graph trees: notes which calls run the code and which replay."""

    def __init__(self, static: Sequence[int] = (), written: Sequence[int] = ()) -> None:
        self.log: list[str] = []
        self.recorded: list[list[int]] = []
        self.reasons: list[str] = []
        names = ["ids", "cache", "large"]
        self.part = Recording(self.code, self.record, static, written, names, self.reasons.append)

    def code(self, inputs: list[Any]) -> str:
        self.log.append("run")
        inputs.clear()
        return "result"

    def record(self, code: Any, static: Sequence[int]) -> Any:
        self.recorded.append(list(static))

        def replay(inputs: list[Any]) -> str:
            self.log.append("replay")
            inputs.clear()
            return "result"

        return replay

    def call(self, *inputs: Any) -> str:
        given = list(inputs)
        assert self.part(given) == "result" and given == []
        return self.log[-1]


IDS, CACHE, BIG = torch.zeros(1), torch.zeros(4), torch.zeros(LARGE // 4)


def elsewhere(like: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(like.clone())
    return kept[-1]


def test_two_calls_run_then_it_replays() -> None:
    trees = Trees(static=[1])
    assert [trees.call(IDS.clone(), CACHE) for _ in range(4)] == ["run", "run", "replay", "replay"]
    assert trees.recorded == [[1]] and trees.part.replays and not trees.reasons


def test_what_is_written_or_large_and_stays_is_static() -> None:
    kept: list[Tensor] = []
    trees = Trees(written=[1])
    for _ in range(3):
        trees.call(elsewhere(IDS, kept), CACHE, BIG)
    assert trees.recorded == [[1, 2]]


def test_what_is_large_and_moves_is_copied() -> None:
    kept: list[Tensor] = []
    trees = Trees(written=[1])
    said = [trees.call(IDS, CACHE, elsewhere(BIG, kept)) for _ in range(3 * MAX_MOVES)]
    assert said[2:] == ["replay"] * (3 * MAX_MOVES - 2)
    assert trees.recorded == [[1]] and not trees.reasons


def test_what_is_large_and_begins_to_move_is_copied_from_then_on() -> None:
    kept: list[Tensor] = []
    trees = Trees()
    for _ in range(3):
        trees.call(IDS, CACHE, BIG)
    assert [trees.call(IDS, CACHE, elsewhere(BIG, kept)) for _ in range(3 * MAX_MOVES)] == ["replay"] * 3 * MAX_MOVES
    assert trees.recorded == [[2], []]


def test_what_is_written_and_moves_is_not_recorded() -> None:
    kept: list[Tensor] = []
    trees = Trees(written=[1])
    assert {trees.call(IDS, elsewhere(CACHE, kept)) for _ in range(3 * MAX_MOVES)} == {"run"}
    assert not trees.recorded and not trees.part.replays
    (reason,) = trees.reasons
    assert reason.startswith("it writes input cache, which lies elsewhere from call to call")
    assert "mark_static_address" in reason


def test_two_caches_in_turn_are_two_recordings() -> None:
    """The trees hold one for each address; only the number of addresses counts."""
    trees = Trees(written=[1])
    other = CACHE.clone()
    for _ in range(2):
        trees.call(IDS, CACHE)
    for _ in range(4 * MAX_MOVES):
        assert trees.call(IDS, CACHE) == trees.call(IDS, other) == "replay"
    assert not trees.reasons


def test_numbers_that_change() -> None:
    """So many values are recorded; a new one runs, a known one replays."""
    trees = Trees()
    assert [trees.call(IDS, n) for n in range(MAX_NUMBERS)][2:] == ["replay"] * (MAX_NUMBERS - 2)
    assert {trees.call(IDS, n) for n in range(MAX_NUMBERS, 3 * MAX_NUMBERS)} == {"run"}
    assert trees.call(IDS, 0) == "replay"
    assert len(trees.reasons) == 1 and "a number that it is given changes" in trees.reasons[0]


class Waits(Trees):
    """Its code says what PyTorch says when it waits for the GPU, in the calls given."""

    def __init__(self, calls: Sequence[int]) -> None:
        super().__init__()
        self.calls = calls

    def code(self, inputs: list[Any]) -> str:
        if len(self.log) in self.calls:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return super().code(inputs)


def test_code_that_waits_is_not_recorded() -> None:
    with mock.patch.object(recording, "_debug_syncs"):
        trees = Waits(range(100))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert {trees.call(IDS) for _ in range(12)} == {"run"}
    (reason,) = trees.reasons
    assert reason.startswith("its code waits for the GPU (") and "test_recording.py" in reason


def test_waiting_in_the_first_call_or_once_is_no_reason() -> None:
    """Kernels are compiled and tuned then; another thread may wait while this one runs."""
    trees = Waits([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = [trees.call(IDS) for _ in range(5)]
    assert said == ["run", "run", "run", "replay", "replay"] and not trees.reasons


def test_other_warnings_come_through() -> None:
    trees = Trees()

    def code(inputs: list[Any]) -> str:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        warnings.warn("mine", stacklevel=1)
        return trees.code(inputs)

    trees.call(IDS)
    trees.part.code = code
    with pytest.warns(UserWarning) as said:
        assert trees.call(IDS) == "run"
    assert [str(w.message) for w in said] == ["mine"]


def test_between_inductor_and_its_trees() -> None:
    """Inductor's function is replaced for the compilation alone, and what it says in its log is heard."""
    from torch._inductor import compile_fx, cudagraph_utils

    handlers = list(cudagraph_utils.cudagraphs_log.handlers)
    original = compile_fx.cudagraphify
    seen: list[Any] = []
    with mock.patch.object(compile_fx, "cudagraphify", lambda *a, **k: seen.append((a, k)) or "replayer"):
        inner = compile_fx.cudagraphify
        with recordings(lambda reason: None) as made:
            part = compile_fx.cudagraphify(
                "code", static_input_idxs=(0,), device_index=0, stack_traces=[], is_backward=False, is_inference=True,
                mutated_input_idxs=(1,),
            )  # fmt: skip
            cudagraph_utils.cudagraphs_log.warning("skipping cudagraphs due to cpu device (arg0)")
        assert compile_fx.cudagraphify is inner
        assert made.parts == [part] and made.skipped == ["skipping cudagraphs due to cpu device (arg0)"]
        assert not made.replays() and not seen
        assert part._record("code", [0, 1]) == "replayer"
        assert seen[0][1]["static_input_idxs"] == (0, 1) and seen[0][1]["device_index"] == 0
        with pytest.raises(ZeroDivisionError), recordings(lambda reason: None):
            _ = 1 // 0
        assert compile_fx.cudagraphify is inner
    assert compile_fx.cudagraphify is original and cudagraph_utils.cudagraphs_log.handlers == handlers
