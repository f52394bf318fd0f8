"""Which kernel each card would get, for sample calls and for the sites of tiny models, and why not the others.

    python tests/golden/plans.py > tests/golden/plans.txt      regenerates; look at the difference

A model's graph is matched once and lowered for every card. Kernels of packages that may be missing are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import sm12x_compile
from sm12x_compile import pipeline, registry
from sm12x_compile.arch import by_name
from sm12x_compile.lowering.select import REFERENCE, choose, plan
from sm12x_compile.model_zoo import Workload, build, family
from sm12x_compile.options import Options
from sm12x_compile.report import Site
from sm12x_compile.samples import samples

CARDS = ("sm80", "sm89", "sm90", "sm100", "sm120", "sm121", "cpu")
OPTIONAL = ("flashinfer",)  # prefixes of kernels that an optional package brings

# Head sizes that real models have, so that the plans are those of real models.
_MODELS: dict[tuple[str, Any], dict[str, Any]] = {
    ("llama", "prefill"): dict(head_dim=64),
    ("gpt_oss", "static"): dict(head_dim=64),
    ("deepseek_v3", "prefill"): dict(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
                                     head_dim=32),
    ("deepseek_v3", "static"): dict(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
                                    head_dim=32),
    ("qwen3_next", "static"): dict(head_dim=64, linear_key_head_dim=64, linear_value_head_dim=64),
    ("qwen3_moe", "prefill"): dict(head_dim=64),
}  # fmt: skip

Plan = tuple[str, list[tuple[str, str]]]


def _options() -> Options:
    names = [k.name for op in sm12x_compile.ops.OPS for k in registry.kernels(op)]
    return Options(kernels=tuple(f"-{name}" for name in names if name.startswith(OPTIONAL)) or None)


def _known(refused: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, why) for name, why in refused if not name.startswith(OPTIONAL)]


def sample_plans() -> Iterator[tuple[str, dict[str, Plan]]]:
    """(call, plan by card) of every sample call."""
    options = _options()
    for sample in samples("cpu", large=True):
        plans: dict[str, Plan] = {}
        for card in CARDS:
            kernel, refused = choose(sample.call, by_name(card), options)
            plans[card] = (kernel.name if kernel else REFERENCE, _known(refused))
        yield f"{sample.call.op}: {sample.title}", plans


def model_plans(name: str, phase: Any) -> Iterator[tuple[str, dict[str, Plan]]]:
    """(site, plan by card) of every rewritten site of one model."""
    found: list[dict[str, list[Site]]] = []
    lower = pipeline.lower

    def for_every_card(gm: Any, calls: Any, options: Any, arch: Any, race: Any = None) -> None:
        plans = {}
        for card in CARDS:
            sites = [Site(site.pattern, site.op, site.module, "") for site, _ in calls]
            plan(gm, [(s, call) for s, (_, call) in zip(sites, calls, strict=True)], _options(), by_name(card))
            plans[card] = sites
        found.append(plans)
        lower(gm, calls, options, arch, race)

    layers = 4 if name == "qwen3_next" else 2
    model = build(name, layers=layers, dtype=torch.bfloat16, **_MODELS[name, phase])
    job = Workload(model, family(name), phase, seq=64, steps=1)
    pipeline.lower = for_every_card
    try:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": "eager", "verify": False})
        job.run(compiled)
    finally:
        pipeline.lower = lower
    for plans in found:
        for number, site in enumerate(plans["cpu"]):
            yield (
                f"{site.op} in {site.module}",
                {card: (str(s[number].kernel), _known(s[number].refused)) for card, s in plans.items()},
            )


SAMPLES = "Sample calls, 8B-sized"
SECTIONS = {SAMPLES: sample_plans, **{f"{n}, {phase}": partial(model_plans, n, phase) for n, phase in _MODELS}}


def section(name: str) -> list[str]:
    """One part of the golden file, its title first."""
    return [name, *"\n".join(_folded(SECTIONS[name]())).splitlines()]


def _folded(plans: Iterator[tuple[str, dict[str, Plan]]]) -> list[str]:
    """Sites that are planned alike stand together, and so do cards."""
    alike: dict[str, list[str]] = {}
    for where, by_card in plans:
        cards: dict[str, list[str]] = {}
        for card, (kernel, refused) in by_card.items():
            reasons: dict[str, list[str]] = {}
            for name, why in refused:
                reasons.setdefault(why, []).append(name)
            body = [f"        not {', '.join(names)}: {why}" for why, names in reasons.items()]
            cards.setdefault("\n".join([kernel, *body]), []).append(card)
        shown = "\n".join(f"    {', '.join(names)}: {planned}" for planned, names in cards.items())
        alike.setdefault(shown, []).append(where)
    return [f"{chr(10).join(where)}\n{shown}" for shown, where in alike.items()]


if __name__ == "__main__":
    print("# Generated: python tests/golden/plans.py > tests/golden/plans.txt")
    for title in SECTIONS:
        print("\n## " + "\n".join(section(title)))
