"""Random mixtures of experts and mutations of them: compiled must equal eager in fp64; refusing is always allowed.

SM12X_FUZZ_CASES sets the number of graphs, SM12X_FUZZ_SEED the seed. A failure prints the `Spec` that rebuilds it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sm12x_compile

from .expert_graphs import MUTATIONS, PARTS, Spec, draw_inputs, mixture
from .test_fuzz import cases_wanted, outcome, seed_wanted


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    chosen = {name: draw(st.sampled_from(values)) for name, values in PARTS.items()}
    mutations = draw(st.lists(st.sampled_from(MUTATIONS), max_size=2, unique=True))
    return sensible(Spec(**chosen, mutations=tuple(mutations), seed=draw(st.integers(0, 999))))


def sensible(spec: Spec) -> Spec:
    """Combinations that mean something, and that no two roundings of eager can tell apart."""
    if spec.form in ("dense", "batched", "loop", "own", "picked") and spec.weigh == "between":
        spec = replace(spec, weigh="output")
    if spec.form == "picked" and spec.weigh == "input":
        spec = replace(spec, weigh="output")
    if spec.act == "oai" and spec.gate == "none":
        spec = replace(spec, act="silu")
    return spec


def check(spec: Spec, seen: Counter[str]) -> None:
    torch._dynamo.reset()
    function = mixture(spec)
    compiled = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with sm12x_compile.collect() as report:
        for drawn in (spec, replace(spec, seed=spec.seed + 1000 * 2)):
            inputs = draw_inputs(drawn)
            copies = {k: x.clone() for k, x in inputs.items()}
            for mine, theirs in zip(outcome(compiled, copies), outcome(function, inputs), strict=True):
                torch.testing.assert_close(
                    mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{m}\n{spec}"
                )
    kind = "mutated" if spec.mutations else "plain"
    seen[kind] += 1
    seen[f"{kind}, rewritten"] += bool(report.count("moe"))
    seen[f"{kind}, routed"] += bool(report.count("moe_route"))


def fuzz(cases: int, seed: int | None) -> Counter[str]:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases, derandomize=seed is None, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(specs())
    def run(spec: Spec) -> None:
        check(spec, seen)

    run = hypothesis.seed(seed)(run) if seed is not None else run
    run()
    return seen


def assert_tally(seen: Counter[str]) -> None:
    print(seen)
    assert seen["mutated"] and seen["plain, rewritten"] >= 0.7 * seen["plain"], seen
    assert seen["plain, routed"] >= 0.2 * seen["plain"], seen


def test_fuzz_moe() -> None:
    assert_tally(fuzz(cases_wanted(100), seed_wanted(None)))


@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(4))
def test_fuzz_moe_nightly(shard: int) -> None:
    seed = seed_wanted(random.SystemRandom().randrange(2**32)) + shard
    print(f"SM12X_FUZZ_SEED={seed}")
    assert_tally(fuzz(-(-cases_wanted(4_000) // 4), seed))
