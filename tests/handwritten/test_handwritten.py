"""Every hand-written attention: the same numbers, the site found, the tags read, refusals said in words."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sm12x_compile

from .cases import (
    Arguments,
    Case,
    Draw,
    Registry,
    assert_as_good_as_eager,
    calls,
    convert,
    make,
    run,
    tag_faults,
)
from .rename import renamed

FILES = (
    "attentions", "layouts", "vision", "masks", "caches", "refused", "sdpa_forms", "latents", "delta_rules",
    "delta_forms", "convolutions", "moes", "moes_dispatched", "moes_refused",
)  # fmt: skip
MODULES = {name: importlib.import_module(f".{name}", __package__) for name in FILES}
REGISTRIES: dict[str, Registry] = {name: getattr(module, name.upper()) for name, module in MODULES.items()}
CASES = [case for registry in REGISTRIES.values() for case in registry]
SIZES = {"B2-S7-T11": dict(B=2, S=7, T=11), "B1-S13-T5": dict(B=1, S=13, T=5)}

each_case = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_here(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=True)


def check_numbers(
    function: Callable[..., Any], arguments: list[Arguments], dtype: torch.dtype
) -> sm12x_compile.Report:
    """Run compiled, eager and fp64 copies over the same calls, and once more on values not yet seen."""
    is_module = isinstance(function, nn.Module)
    mine = convert(function, dtype) if is_module else function
    exact = convert(function, torch.float64) if is_module else function
    compiled = compile_here(mine)
    fresh = convert(arguments, dtype)
    with sm12x_compile.collect() as report:
        ours = run(compiled, mine, fresh)
    wide = convert(arguments, torch.float64)
    assert_as_good_as_eager(ours, run(function, function, arguments), run(exact, exact, wide))
    return report


def check_report(case: Case, report: sm12x_compile.Report) -> None:
    found = [site for site in report.rewritten if site.pattern == case.pattern]
    if case.sites is not None:
        assert len(found) == case.sites * report.graphs, f"{case.sites} a graph expected:\n{report}"
    faults = [fault for site in found for fault in tag_faults(case.tags, site.tags)]
    assert not faults, f"{'; '.join(faults)}\n{report}"
    if case.refused:
        assert report.near_misses, f"nothing said about it:\n{report}"
    for site in report.near_misses:
        assert_sentence(site.reason)
        assert site.source, "a near-miss names the user's line"


def assert_sentence(reason: str | None) -> None:
    """Words, not a dump: several of them, no bare object addresses or symbol reprs."""
    assert reason is not None
    assert len(reason.split()) >= 4, reason
    assert "<" not in reason or " at 0x" not in reason, reason
    assert len(reason) < 400, reason


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_good_as_eager_and_recognised(case: Case, dtype: torch.dtype):
    size = SIZES["B2-S7-T11" if dtype == torch.float32 else "B1-S13-T5"]
    function, inputs = make(case, dtype)
    report = check_numbers(function, calls(inputs, Draw(dtype, seed=1, **size)), dtype)
    check_report(case, report)


@pytest.mark.nightly
@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_all_dtypes_and_sizes(case: Case, dtype: torch.dtype, size: dict[str, int]):
    function, inputs = make(case, dtype, seed=2)
    arguments = calls(inputs, Draw(dtype, seed=3, **size))
    try:
        eager = convert(function, dtype) if isinstance(function, nn.Module) else function
        run(eager, eager, convert(arguments, dtype))
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        pytest.skip("eager itself cannot fill with -1e9 in fp16")
    report = check_numbers(function, arguments, dtype)
    check_report(case, report)


@each_case
def test_compiled_once_right_on_other_values(case: Case):
    """What was proved on the first inputs must hold for all: the same compiled code on five more draws."""
    function, inputs = make(case, torch.float32)
    arguments = [a for seed in range(5) for a in calls(inputs, Draw(torch.float32, seed=seed))]
    check_numbers(function, arguments, torch.float32)


@pytest.mark.parametrize("name", FILES)
def test_names_do_not_matter(name: str):
    """Every function, class, argument, local and attribute renamed: the same sites."""
    original = REGISTRIES[name]
    keep = frozenset({"self", "case"})
    source = renamed(inspect.getsource(MODULES[name]), keep)
    assert "forward" in source or "lambda" in source
    made: list[Registry] = []
    namespace = {**_shared(MODULES[name]), "Registry": _recorder(made)}
    exec(compile(source, "renamed.py", "exec"), namespace)
    (registry,) = made
    assert len(registry) == len(original)
    assert all(a.name != b.name for a, b in zip(original, registry, strict=True))
    for before, after in zip(original, registry, strict=True):
        if before.sites is None:
            continue
        torch._dynamo.reset()
        function, inputs = make(after, torch.float32)
        with sm12x_compile.collect() as report:
            run(compile_here(function), function, calls(inputs, Draw(torch.float32, seed=4)))
        assert report.count(before.pattern) == before.sites * report.graphs, f"{before.name}, renamed:\n{report}"


def _shared(module: Any) -> dict[str, Any]:
    """What a module imports from beside it: `renamed` leaves these imports out."""
    imports = [n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ImportFrom) and n.level]
    return {alias.name: getattr(module, alias.name) for n in imports for alias in n.names}


def _recorder(made: list[Registry]) -> Callable[..., Registry]:
    def registry(*pattern: str) -> Registry:
        made.append(Registry(*pattern))
        return made[-1]

    return registry


def test_enough_of_them():
    must = [c for c in CASES if c.sites]
    assert len(must) >= 45
    assert len({c.name for c in CASES}) == len(CASES)
