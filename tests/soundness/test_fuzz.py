"""Random attention-like graphs and mutations of them: compiled must equal eager; refusing is always allowed.

SM12X_FUZZ_CASES sets the number of graphs, SM12X_FUZZ_SEED the seed (without it the run in CI is derandomized
and the nightly run draws a seed and prints it). A failure prints the `Spec` that rebuilds the graph.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sm12x_compile

from .graphs import attention_like
from .operands import Inputs, draw_inputs
from .spec import MUTATIONS, Spec, fitted, specs

# Of the graphs that are plain attention this share must be rewritten, or the fuzz would prove nothing.
LEAST_REWRITTEN = 0.6
# The nightly run in parts, each from a seed of its own, so that the cores share it.
SHARDS = 20


@dataclass
class Tally:
    rewritten: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, spec: Spec, report: sm12x_compile.Report) -> None:
        kind = "mutated" if spec.mutations else "plain"
        for key in (kind, *spec.mutations):
            self.seen[key] += 1
            self.rewritten[key] += bool(report.count("attention"))
        if not spec.mutations and not report.count("attention"):
            self.reasons[report.near_misses[0].reason or "" if report.near_misses else "nothing found"] += 1

    @property
    def share(self) -> float:
        return self.rewritten["plain"] / max(1, self.seen["plain"])

    def __str__(self) -> str:
        lines = [f"{key}: {self.rewritten[key]} of {n} rewritten" for key, n in sorted(self.seen.items())]
        lines += [f"plain, refused {n} times: {reason}" for reason, n in self.reasons.most_common(20)]
        return "\n".join(lines)


def outcome(function: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    """What a call returns and what it leaves in its inputs, from one state of the random generator."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = function(inputs)
    return [x.clone() for x in tree_leaves([result, inputs])]


def tolerance(spec: Spec) -> float:
    """How far two right answers may lie apart in fp64: 1e-9, more where the graph itself computes in less."""
    if spec.has("weights_bf16"):
        return 1e-2
    if spec.softmax in ("float", "dtype"):
        return 1e-5
    return 1e-6 if spec.fill in ("1e9", "add_1e9", "add_1e4") else 1e-9


def assert_right(spec: Spec, ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """fp64: equal within `tolerance` and eager's error. fp32: at most twice eager's error, and 2e-5 more."""
    assert len(ours) == len(eager)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, spec
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs), spec
            continue
        special = ~theirs.isfinite()
        same = torch.equal(mine[special].nan_to_num(1.5), theirs[special].nan_to_num(1.5))
        assert same and torch.equal(special, ~mine.isfinite()), f"NaN or inf differ in {spec}"
        # Where fp64 itself overflows (finfo.min of fp64 in a softmax of fp32) only eager can be the measure.
        truth = torch.where(truth.isfinite(), truth, theirs.double())
        mine, theirs, truth = (x.double().masked_fill(special, 0.0) for x in (mine, theirs, truth))
        size = 1.0 + _largest(theirs)
        if spec.dtype == "float64":
            # A softmax in fp32 may drown whole rows in -1e9; there eager's own error is the measure.
            wrong = (mine - theirs).abs() > tolerance(spec) * size + 2 * _rows(theirs - truth)
            assert not wrong.any(), f"{_largest((mine - theirs)[wrong]):.3g} in {spec}"
        else:
            least = 1e-2 if spec.has("weights_bf16") or spec.has("large_scores") else 2e-5
            bound = 2 * _largest(theirs - truth) + least * size
            assert _largest(mine - truth) <= bound, f"{_largest(mine - truth):.3g} > {bound:.3g} in {spec}"


def _rows(error: Tensor) -> Tensor:
    """The largest of every row, beside each of its elements; errors that rounding alone explains are left out."""
    largest = error.abs().amax(-1, keepdim=True).expand_as(error) if error.numel() else error
    return torch.where(largest > 1e-5, largest, 0.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(spec: Spec, tally: Tally) -> None:
    torch._dynamo.reset()
    function = attention_like(spec)
    # The same in fp64 all through: what a softmax in fp32 loses is no measure of ours.
    exact = attention_like(replace(spec, softmax="method")) if spec.softmax in ("float", "dtype") else function
    compiled = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    dtype = getattr(torch, spec.dtype)
    with sm12x_compile.collect() as report:
        # The second draw runs the code compiled for the first: nothing may be baked in from values.
        for drawn in (spec, replace(spec, seed=spec.seed + 1000)):
            inputs = draw_inputs(drawn, dtype)
            wide = {k: x.double() if x.is_floating_point() else x.clone() for k, x in inputs.items()}
            copies = {k: x.clone() for k, x in inputs.items()}
            ours = outcome(compiled, copies)
            assert_right(spec, ours, outcome(function, inputs), outcome(exact, wide))
    tally.add(spec, report)


def fuzz(cases: int, seed: int | None) -> Tally:
    tally = Tally()

    @settings(
        max_examples=cases, derandomize=seed is None, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
        # No shrinking: every step of it compiles, and a Spec is small enough to cut down by hand.
        phases=[Phase.generate],
    )  # fmt: skip
    @given(specs())
    def run(spec: Spec) -> None:
        check(spec, tally)

    run = hypothesis.seed(seed)(run) if seed is not None else run
    run()
    return tally


def cases_wanted(default: int) -> int:
    return int(os.environ.get("SM12X_FUZZ_CASES", default))


def seed_wanted(default: int | None) -> int | None:
    given_seed = os.environ.get("SM12X_FUZZ_SEED")
    return int(given_seed) if given_seed else default


def assert_tally(tally: Tally) -> None:
    print(tally)
    assert tally.seen["plain"] and tally.seen["mutated"]
    assert tally.share >= LEAST_REWRITTEN, (
        f"only {tally.share:.0%} of the plain graphs were rewritten:\n{tally}"
    )


def test_fuzz():
    assert_tally(fuzz(cases_wanted(300), seed_wanted(None)))


@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(SHARDS))
def test_fuzz_nightly(shard: int):
    seed = seed_wanted(random.SystemRandom().randrange(2**32)) + shard
    print(f"SM12X_FUZZ_SEED={seed}")
    assert_tally(fuzz(-(-cases_wanted(10_000) // SHARDS), seed))


# Graphs that once gave a wrong answer or failed at run time, cut down.
REMEMBERED = [
    # All keys masked by one constant, which a sink notices.
    Spec(B=1, S=1, D=8, Dv=8, dtype="float32", layout="tokens_first", scale="k", masks=("causal_arange", "packed"),
         fill="add_1e9", softmax="by_hand", softcap=3.0, sinks="denominator", cache="index_copy", output="tokens",
         mutations=("mask_written_before",), seed=57),
    # -1e4 is no mask where scores are as large.
    Spec(B=1, G=1, S=4, T=9, D=8, Dv=5, layout="no_batch", qk="einsum", pv="broadcast", grouping="expand", scale="k",
         masks=("causal_tril",), combine="one_by_one", fill="add_1e4", bias="heads",
         mutations=("softcap_after_mask", "large_scores"), seed=379),
    # A sink column under a softmax written out.
    Spec(softmax="by_hand", sinks="column"),
    Spec(softmax="by_hand_unshifted", sinks="column", T=9),
    Spec(softmax="logsumexp", sinks="column", S=1, T=9),
    Spec(softmax="log_softmax", sinks="column", S=7, masks=("causal_tril",)),
    # finfo.min of fp64 as a Python number, and what softmax in fp32 makes of it: minus infinity.
    Spec(masks=("dense",), fill="finfo"),
    Spec(masks=("offset",), fill="where_finfo"),
    Spec(masks=("causal_arange",), fill="add_finfo", softmax="dtype", mutations=("mask_inverted",)),
    # Rows without keys: finite fills under exp(s) / sum are 0 / 0, and s - logsumexp(s) loses the row's size.
    Spec(Hkv=1, S=3, D=8, masks=("dense",), fill="add_1e4", softmax="by_hand_unshifted", seed=284),
    Spec(B=1, S=1, dtype="float32", masks=("window", "padding"), fill="where_finfo", softmax="by_hand_unshifted"),
    Spec(G=2, S=7, masks=("causal_arange",), fill="add_finfo", softmax="logsumexp", bias="heads"),
    Spec(S=7, masks=("band",), fill="add_finfo", softmax="logsumexp"),
    Spec(S=1, T=7, masks=("lengths",), fill="1e9", mutations=("everything_masked",)),
    Spec(Hkv=1, S=3, masks=("causal_tril",), fill="1e9", mutations=("mask_inverted",)),
    Spec(fill="finfo", softmax="log_softmax", mutations=("everything_masked",)),
    # A maximum over the wrong dimension cancels the mask's number.
    Spec(B=1, Hkv=1, G=2, S=7, T=7, D=8, Dv=8, dtype="float32", layout="fused", masks=("causal_arange", "packed"),
         fill="add_finfo", softmax="subtract_max", bias="heads", bias_after_mask=True, cache="setitem",
         mutations=("max_of_queries",), seed=983),
    # The trace flattened SDPA's result with a view, by strides that the kernel did not give.
    Spec(Hkv=1, G=2, D=8, Dv=8, dtype="float32", layout="fused", qk="sdpa", masks=("lengths",), bias="alibi",
         cache="fused", output="tokens", seed=504),
]  # fmt: skip


@pytest.mark.parametrize("spec", REMEMBERED, ids=range(len(REMEMBERED)))
def test_remembered(spec: Spec):
    check(fitted(spec), Tally())


def test_every_mutation_changes_something():
    """The mutations are not idle: each one changes the numbers of at least one graph."""
    base = (
        Spec(masks=("causal_arange",), G=2, seed=1),
        Spec(masks=("dense",), softmax="by_hand", fill="where_inf", seed=2, softcap=3.0, bias="heads"),
        Spec(masks=("offset", "dense"), softmax="by_hand", fill="1e9", T=7, seed=3, combine="one_by_one"),
        Spec(masks=("dense",), T=1, S=7, seed=5),
        Spec(softmax="subtract_max", seed=4, masks=("causal_arange",), bias="whole"),
    )
    for mutation in MUTATIONS:
        changed = False
        for spec in base:
            mutant = fitted(replace(spec, mutations=(mutation,)))
            plain = fitted(replace(mutant, mutations=()))
            a = outcome(attention_like(mutant), draw_inputs(mutant, torch.float64))
            b = outcome(attention_like(plain), draw_inputs(plain, torch.float64))
            changed |= len(a) != len(b) or any(
                x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=False)
            )
        assert changed, mutation
