"""`x[..., i]` with a 0-d tensor i: the same as PyTorch in every position, and one compile for every i."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sm12x_compile
from sm12x_compile.scalar_index import getitem, is_scalar_index, setitem

SHAPE = (3, 4, 5, 2)
ALL = slice(None)
I = torch.tensor(1)


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def base() -> Tensor:
    return torch.arange(120.0).reshape(SHAPE)


INDICES: dict[str, Any] = {
    "alone": I,
    "first": (I,),
    "first of two": (I, ALL),
    "second": (ALL, I),
    "third": (ALL, ALL, I),
    "last": (ALL, ALL, ALL, I),
    "after an ellipsis": (Ellipsis, I),
    "before the last": (Ellipsis, I, ALL),
    "before an ellipsis": (I, Ellipsis),
    "between slices and an ellipsis": (ALL, I, Ellipsis),
    "an empty ellipsis": (ALL, I, Ellipsis, ALL, ALL),
    "after an int": (2, I),
    "before an int": (I, 2),
    "after a negative int": (ALL, -1, I),
    "between ints": (2, I, -1),
    "after a new axis": (None, I),
    "before a new axis": (I, None),
    "among new axes": (None, ALL, None, I, None),
    "after an ellipsis and a new axis": (Ellipsis, None, I),
    "all kinds": (None, -1, Ellipsis, I, None, slice(1, None)),
    "after slices with steps": (slice(0, 3, 2), slice(1, 3), I),
    "negative": (ALL, torch.tensor(-2)),
    "negative after an int": (0, torch.tensor(-1)),
    "the first of all": (Ellipsis, torch.tensor(0)),
    "int32": (ALL, torch.tensor(3, dtype=torch.int32)),
    "int8": (ALL, torch.tensor(-3, dtype=torch.int8)),
    "int16": torch.tensor(2, dtype=torch.int16),
}
each_index = pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)


@each_index
def test_getitem(index: Any) -> None:
    assert is_scalar_index(index)
    expected = base()[index]
    found = getitem(base(), index)
    assert torch.equal(found, expected)


def values(shape: torch.Size) -> dict[str, Any]:
    """What may be assigned to a part of this shape."""
    full = -torch.arange(1.0, 1 + shape.numel()).reshape(shape)
    return {
        "full": full,
        "a number": 7.5,
        "an int": -3,
        "a bool": True,
        "0-d": torch.tensor(9.0),
        "one element": torch.tensor([8.0]),
        "another dtype": (full * 2).to(torch.int32),
        "broadcast from the right": full.reshape(-1, shape[-1])[0],
        "broadcast along the first": full[:1],
        "leading ones": full[None, None],
        "strides of its own": full.mT.contiguous().mT if full.dim() > 1 else full,
    }


@each_index
def test_setitem(index: Any) -> None:
    for name, value in values(base()[index].shape).items():
        expected, found = base(), base()
        expected[index] = value
        setitem(found, index, value)
        assert torch.equal(found, expected), name


def test_setitem_in_place_of_a_view() -> None:
    expected, found = base(), base()
    expected[1:, ::2][:, :, I] = -1.0
    setitem(found[1:, ::2], (ALL, ALL, I), -1.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("at", [4, -5, 100])
def test_outside_of_the_dimension(at: int) -> None:
    where = (ALL, torch.tensor(at))
    with pytest.raises(IndexError):
        base()[where]
    with pytest.raises((IndexError, RuntimeError)):
        getitem(base(), where)
    with pytest.raises((IndexError, RuntimeError)):
        setitem(base(), where, 0.0)


def test_values_that_do_not_fit() -> None:
    for value in (torch.zeros(2, 3), torch.zeros(2, 5, 2), torch.zeros(2, 1, 1, 5, 2)):
        with pytest.raises(RuntimeError):
            base()[:, 1] = value
        with pytest.raises(RuntimeError):
            setitem(base(), (ALL, I), value)


@pytest.mark.parametrize(
    "index",
    [
        1, (1, ALL), ALL, Ellipsis, None, (ALL, None), torch.tensor([1]), (ALL, torch.tensor([1, 2])),
        (I, I), (I, torch.tensor([0])), (I, [0, 1]), torch.tensor(True), (ALL, torch.tensor(True)),
        torch.tensor(1, dtype=torch.uint8), (True, I), (I, False), torch.tensor(1.0), "x",
    ],
    ids=repr,
)  # fmt: skip
def test_other_indices_are_left_to_pytorch(index: Any) -> None:
    assert not is_scalar_index(index)


# ------------------------------------------------------------------ through torch.compile


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def heads(length: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(seed))


def write(q: Tensor, cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, position] = new
    return attend(q, cache, cache)


def add(q: Tensor, cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, position] += new
    return attend(q, cache, cache)


def pick(q: Tensor, cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return attend(q, cache, cache)[:, :, position] + new * cache[0, 1, position]


def write_twice(q: Tensor, cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, position] = new
    cache[1, ..., position, :] = 0.5
    return attend(q, cache, cache)


@pytest.mark.parametrize(
    ("function", "codegen"),
    [(write, "eager"), (add, "eager"), (pick, "eager"), (write_twice, "eager"), (add, "inductor"),
     (pick, "inductor")],
)  # fmt: skip
def test_one_compile_is_right_at_every_position(function: Callable[..., Tensor], codegen: str) -> None:
    """Dynamo guards on the value of a 0-d CPU tensor in an index; what we compile does not depend on it."""
    q, cache, new = heads(seed=1), heads(seed=2), heads(1, seed=3)[:, :, 0]
    steps: list[Callable[..., Any]] = []
    order: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        steps.append(sm12x_compile.sm12x(gm, inputs, options={"codegen": codegen}))

        def run(*given: Tensor) -> Any:
            order[:] = [next(k for k, known in enumerate(arguments) if known is x) for x in given]
            return steps[0](*given)

        return run

    with sm12x_compile.collect() as report:
        arguments = [q, cache.clone(), new, torch.tensor(2)]
        torch.testing.assert_close(
            torch.compile(function, backend=backend, fullgraph=True)(*arguments), function(q, cache.clone(), new, 2)
        )
    assert report.count("attention") == 1, str(report)
    for at in (5, 0, -1, -6, 3):
        ours, theirs = cache.clone(), cache.clone()
        expected = function(q, theirs, new, torch.tensor(at))
        given = (q, ours, new, torch.tensor(at))
        (found,) = steps[0](*(given[k] for k in order))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours, theirs)


def test_one_compile_of_the_model_for_each_position() -> None:
    step = torch.compile(write, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True)
    with sm12x_compile.collect() as report:
        for at in (2, 5, 2, -1):
            ours, theirs = heads(seed=2), heads(seed=2)
            q, new, i = heads(seed=1), heads(1, seed=at + 9)[:, :, 0], torch.tensor(at)
            torch.testing.assert_close(step(q, ours, new, i), write(q, theirs, new, i))
            torch.testing.assert_close(ours, theirs)
    assert report.count("attention") == report.graphs


# ------------------------------------------------------------------ x[i] is a view


def check(function: Callable[..., Any], rewritten: int, *arguments: Tensor) -> sm12x_compile.Report:
    """Results, arguments after the call, and whether results are views of arguments: as in eager."""
    theirs, ours = ([a.clone() for a in arguments] for _ in range(2))
    expected = function(*theirs)
    with sm12x_compile.collect() as report:
        found = torch.compile(
            function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True
        )(*ours)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)
    for a, b in ((ours, found), (theirs, expected)):
        memory = {x.untyped_storage().data_ptr() for x in a}
        views = [y.untyped_storage().data_ptr() in memory for y in (b if isinstance(b, tuple) else (b,))]
        assert views == ([False, True] if "returned" in function.__name__ else [False] * len(views))
    assert report.count("attention") == rewritten, str(report)
    return report


def written_through_the_view(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    cache[:, :, i].copy_(q[:, :, 0])
    return attend(q, cache, cache)


def written_through_a_view_of_the_view(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    cache[:, :, i].transpose(0, 1).mul_(2.0)
    return attend(q, cache, cache)


def base_written_after(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    cache.mul_(2.0)
    return attend(q, cache, cache) + seen[:, :, None]


def base_written_before_the_sum_is_stored(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    cache.mul_(2.0)
    seen += q[:, :, 0]
    cache[:, :, i] = seen
    return attend(q, cache, cache)


def sum_stored_elsewhere(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    seen += q[:, :, 0]
    cache[:, :, 0] = seen
    return attend(q, cache, cache)


def something_else_stored(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    seen += q[:, :, 0]
    cache[:, :, i] = q[:, :, 1]
    return attend(q, cache, cache) + seen[:, :, None]


def base_read_before_the_sum_is_stored(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    seen += q[:, :, 0]
    out = attend(q, cache, cache)
    cache[:, :, i] = seen
    return out


def written_and_forgotten(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    out = attend(q, cache, cache)
    cache[:, :, i].zero_()
    return out


def written_after_it_was_stored(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
    seen = cache[:, :, i]
    seen += q[:, :, 0]
    cache[:, :, i] = seen
    seen.mul_(3.0)
    return attend(q, cache, cache)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (written_through_the_view, "written"),
        (written_through_a_view_of_the_view, "written"),
        (written_and_forgotten, "written"),
        (written_after_it_was_stored, "written"),
        (sum_stored_elsewhere, "written"),
        (something_else_stored, "written"),
        (base_read_before_the_sum_is_stored, "written"),
        (base_written_after, "used after its base was written"),
        (base_written_before_the_sum_is_stored, "used after its base was written"),
    ],
)
def test_writes_that_a_copy_would_miss(function: Callable[..., Any], why: str) -> None:
    """The graph is left alone, because our copy of ``x[i]`` would not see the write, or would not pass it on."""
    report = check(function, 0, heads(seed=1), heads(seed=2), torch.tensor(1))
    assert report.warnings == [f"a graph was left as it is: a view taken at the index of a 0-d tensor is {why}"]


def returned_with_its_base(q: Tensor, cache: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q, cache, cache), cache[:, :, i]


def test_view_that_is_returned() -> None:
    report = check(returned_with_its_base, 0, heads(seed=1), heads(seed=2), torch.tensor(1))
    assert report.warnings == [
        "a graph was left as it is: an output is a view taken at the index of a 0-d tensor"
    ]


def test_views_that_nothing_tells_from_copies() -> None:
    def read(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
        return attend(q, cache, cache) * cache[:, :, i][:, :, None]

    def of_an_intermediate(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
        return attend(q, cache, cache)[:, :, i]

    def added_twice(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
        cache[:, :, i] += q[:, :, 0]
        cache[:, :, i] *= 2.0
        return attend(q, cache, cache)

    def read_then_written(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
        before = cache[:, :, i] * 2.0
        cache[:, :, i] = q[:, :, 0]
        return attend(q, cache, cache) + before[:, :, None]

    def written_copy(q: Tensor, cache: Tensor, i: Tensor) -> Tensor:
        out = attend(q, cache, cache)
        row = out[:, :, i]
        row.mul_(2.0)
        return row

    for function in (read, of_an_intermediate, added_twice, read_then_written, written_copy):
        torch._dynamo.reset()
        assert check(function, 1, heads(seed=1), heads(seed=2), torch.tensor(1)).warnings == []
