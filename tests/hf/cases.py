"""What the report must say, site by site, for every Hugging Face model of the coverage table.

A case is a model x phase x attention implementation x precision. Its expectation is a list of graphs, in
the order in which Dynamo hands them to the backend, each a list of sites in the order of execution. It is put
together from three facts: which layers a model has, what its attention has besides a mask, and which mask
each kind of layer gets in each role (a prompt, a prompt with a cache, a token with either cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers

from sm12x_compile.model_zoo import FAMILIES, PHASES, WINDOW, Phase, attention_implementations
from sm12x_compile.report import Site

Attn = Literal["eager", "sdpa"]
Precision = Literal["fp32", "bf16"]
Layer = Literal["full", "sliding", "encoder", "encoder-sliding", "cross"]
Role = Literal["prompt", "token", "static token"]

CHECKED = ("mask", "window", "groups", "sinks", "softcap", "bias", "form")
OLD = tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 23)

# The layers, in order of execution. Where there are two sides: the encoder's, then self and cross by turns.
DECODER_SIDE: list[Layer] = ["full", "cross", "full", "cross"]
LAYERS: dict[str, list[Layer]] = {
    "llama": ["full", "full"],
    "qwen3": ["full", "full"],
    "mistral": ["sliding", "sliding"],
    "gemma2": ["sliding", "full"],
    "gemma3": ["sliding", "full"],
    "phi3": ["full", "full"],
    "gpt2": ["full", "full"],
    "gpt_oss": ["sliding", "full"],
    "qwen3_moe": ["full", "full"],
    "bert": ["encoder", "encoder"],
    "modernbert": ["encoder", "encoder-sliding"],
    "t5": ["encoder", "encoder", *DECODER_SIDE],
    "whisper": ["encoder", "encoder", *DECODER_SIDE],
    "vit": ["encoder", "encoder"],
}
# 4 heads, 2 of keys and values.
GROUPED = {"llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss", "qwen3_moe"}


@dataclass(frozen=True)
class Case:
    """One row of the coverage table."""

    model: str
    phase: Phase
    attn: Attn
    precision: Precision
    graphs: list[list[dict[str, Any]]] = field(hash=False)

    @property
    def id(self) -> str:
        return f"{self.model}-{self.phase}-{self.attn}-{self.precision}"


def checked_tags(site: Site) -> dict[str, Any]:
    """Of a site's tags, those that a case states."""
    return {key: site.tags[key] for key in CHECKED if key in site.tags}


def mask_of(layer: Layer, role: Role) -> str:
    """The tag `mask` that a layer must get when the caller passes no padding."""
    if layer in ("encoder", "cross"):
        return "none"
    if layer == "encoder-sliding":
        return "window"
    if role == "prompt":
        return "causal" if layer == "full" else "window"
    if layer == "full":
        # A token sees all that a DynamicCache holds, and a StaticCache as far as it is filled.
        return "none" if role == "token" else "length"
    # The cache of a sliding layer holds one window, whose place among the positions is a symbolic int.
    return "window"


def site(model: str, layer: Layer, role: Role, attn: Attn) -> dict[str, Any]:
    """The tags that one site must carry; a key that is absent must be absent from the report as well."""
    tags: dict[str, Any] = {"mask": mask_of(layer, role), "form": "sdpa" if attn == "sdpa" else "softmax"}
    if tags["mask"] == "window":
        # `local_attention` of a bidirectional layer counts both sides: half of it on the left, and the token.
        tags["window"] = WINDOW if layer == "sliding" else WINDOW // 2 + 1
    if model in GROUPED:
        tags["groups"] = 2
    if model == "gpt_oss":
        tags["sinks"] = True
    # transformers 5.17 drops the softcap of gemma2 under sdpa, in eager mode as well: there is none to find.
    if model == "gemma2" and attn == "eager":
        tags["softcap"] = 2.0
    if model == "t5" and layer != "cross":
        tags["bias"] = True
    return tags


def roles_of(phase: Phase) -> list[Role]:
    """The role of each graph: a DynamicCache costs two graphs for tokens, the second with a symbolic length,
    a StaticCache one."""
    if phase == "prefill":
        return ["prompt"]
    if phase == "decode":
        return ["prompt", "token", "token"]
    return ["static token"]


def graph(model: str, role: Role, attn: Attn) -> list[dict[str, Any]]:
    layers = LAYERS[model]
    if "token" in role:  # the encoder ran with the prompt
        layers = [layer for layer in layers if not (layer == "encoder" and "cross" in layers)]
    return [site(model, layer, role, attn) for layer in layers]


def cases() -> Iterator[Case]:
    """Every case that the installed transformers has."""
    for model in LAYERS:
        for attn in attention_implementations(model):
            for phase in PHASES:
                if phase in FAMILIES[model].phases:
                    graphs = [graph(model, role, attn) for role in roles_of(phase)]
                    for precision in ("fp32", "bf16"):
                        yield Case(model, phase, attn, precision, graphs)


def pairwise(every: list[Case]) -> set[str]:
    """Ids of a small subset with every pair of values (model, phase, attn, precision) in `every`."""
    def pairs(case: Case) -> set[tuple[str, str]]:
        values = [case.model, case.phase, f"attn={case.attn}", case.precision]
        return {(a, b) for i, a in enumerate(values) for b in values[i + 1 :]}

    wanted = set().union(*(pairs(case) for case in every))
    chosen: set[str] = set()
    while wanted:
        best = max(every, key=lambda case: len(pairs(case) & wanted))
        chosen.add(best.id)
        wanted -= pairs(best)
    return chosen


CI = pairwise(list(cases()))
