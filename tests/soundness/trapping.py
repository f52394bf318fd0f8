"""How a trap is sprung: the same calls in eager and compiled, on copies; then everything is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sm12x_compile

Function = Callable[..., Any]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The plainest attention; `mask` is bool, True where a key may be attended."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def heads(
    *, B: int = 2, H: int = 2, S: int = 5, D: int = 4, seed: int = 0, count: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, H, S, D, generator=generator) for _ in range(count))


class SelfAttention(nn.Module):
    """A small causal layer with all its weights."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, causal(x.shape[1])).transpose(1, 2).flatten(2))


def compiled(function: Function, *, codegen: str = "eager", **kwargs: Any) -> Function:
    return torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": codegen}, **kwargs)


def attention_count(report: sm12x_compile.Report) -> int:
    return report.count("attention")


def check(
    function: Function,
    *calls: tuple[Any, ...],
    sites: int | None = None,
    tolerance: float = 1e-5,
    **kwargs: Any,
) -> sm12x_compile.Report:
    """Run the calls one after the other in eager and compiled, and compare.

    Compared are the outputs, the arguments and the module's state after the calls, which outputs share memory
    with which arguments and with each other, and the state of the random generator.

    Args:
        function: a module or function; both runs get copies of a module.
        calls: the arguments of each call; one deep copy of all of them serves each run, so that tensors that
            share memory still do.
        sites: attention sites rewritten, where it can be said.
        kwargs: go to `torch.compile`.
    """
    mine = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    theirs = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    expected = everything(theirs, copied(calls), theirs)
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        found = everything(compiled(mine, **kwargs), copied(calls), mine)
    assert_same(found, expected, tolerance)
    if sites is not None:
        assert attention_count(report) == sites, str(report)
    return report


def copied(calls: tuple[tuple[Any, ...], ...]) -> list[tuple[Any, ...]]:
    """A deep copy that keeps strides, expanded dimensions and shared storage."""
    memo: dict[int, Any] = {}
    return copy.deepcopy(list(calls), memo)


def everything(function: Function, calls: list[tuple[Any, ...]], state: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    outputs = [function(*arguments) for arguments in calls]
    tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    inputs = [x for x in tree_leaves(calls) if isinstance(x, Tensor)]
    kept = dict(state.state_dict()) if isinstance(state, nn.Module) else {}
    shared = [[_same_memory(a, b) for b in (*inputs, *tensors[:i])] for i, a in enumerate(tensors)]
    plain = [x for x in tree_leaves(outputs) if not isinstance(x, Tensor)]
    return {"outputs": tensors, "arguments": inputs, "state": kept, "shared memory": shared, "values": plain,
            "generator": torch.get_rng_state()}  # fmt: skip


def _named(name: str, text: str) -> str:
    return f"{name}: {text}"


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name, wanted in expected.items():
        if name in ("shared memory", "values"):
            assert found[name] == wanted, f"{name}: {found[name]} in place of {wanted}"
        else:
            torch.testing.assert_close(
                found[name], wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=partial(_named, name)
            )
