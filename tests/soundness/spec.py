"""What a random attention-like graph is made of: a plain record that prints as the code that rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

PARTS: dict[str, tuple[object, ...]] = {
    "B": (1, 2),
    "Hkv": (1, 2),
    "G": (1, 1, 2),
    "S": (1, 3, 4, 7),
    "T": (1, 4, 7, 9),
    "D": (4, 8),
    "Dv": (4, 5, 8),
    "dtype": ("float64", "float32"),
    "layout": ("heads_first", "tokens_first", "fused", "no_batch"),
    "qk": ("matmul", "einsum", "bmm", "broadcast", "baddbmm", "transposed", "sdpa"),
    "pv": ("matmul", "einsum", "bmm", "broadcast"),
    "grouping": ("repeat_interleave", "expand", "query_view"),
    "scale": ("none", "q", "k", "both", "multiply", "divide", "after_mask"),
    "masks": (
        (), (), ("causal_tril",), ("causal_triu",), ("causal_arange",), ("causal_top_left",), ("window",),
        ("band",), ("window_both",), ("chunk",), ("padding",), ("padding_int",), ("dense",),
        ("dense_rows",), ("length",), ("lengths",), ("offset",), ("packed",), ("prefix",),
        ("causal_tril", "padding"), ("causal_arange", "packed"), ("causal_arange", "chunk"),
        ("offset", "window_at_offset"), ("window", "padding"), ("causal_triu", "dense"),
        ("padding", "padding_int"), ("causal_tril", "causal_top_left"),
    ),
    "combine": ("and", "one_by_one"),
    "fill": (
        "inf", "inf", "finfo", "1e9", "where_inf", "where_finfo", "add_inf", "add_finfo", "add_1e9",
        "add_1e4",
    ),
    "softmax": (
        "method", "method", "functional", "float", "dtype", "subtract_max", "by_hand", "by_hand_unshifted",
        "after_values", "logsumexp", "log_softmax", "module",
    ),
    "softcap": (0.0, 0.0, 0.0, 3.0),
    "sinks": ("none", "none", "none", "column", "denominator"),
    "bias": ("none", "none", "none", "alibi", "heads", "whole"),
    "bias_after_mask": (False, True),
    "cache": ("none", "none", "cat", "slice", "index_copy", "setitem", "ring", "fused"),
    "output": ("heads_first", "tokens"),
}  # fmt: skip

MUTATIONS = (
    "keys_reversed_batch", "keys_rolled", "values_other_heads", "repeat_whole", "repeat_values_only",
    "values_transposed", "value_is_key", "value_is_key_written", "key_view_written", "value_written",
    "query_written_after", "scores_written", "scores_diagonal_written", "weights_written",
    "mask_written_before", "mask_written_after", "return_scores", "return_weights", "return_keys",
    "return_maximum", "softmax_queries", "softmax_heads", "scaled_after", "rows_scaled_after",
    "mask_after", "bias_after", "scores_abs", "scores_round", "scores_rolled", "weights_squared",
    "weights_clamped", "weights_cumsum", "weights_bf16", "mask_inverted", "mask_transposed", "anticausal",
    "off_by_one", "softcap_after_mask", "negative_scale", "dropout", "random_mask", "max_of_queries",
    "sum_of_queries", "sum_before_mask", "epsilon", "exp2", "temperature", "nan_to_num", "softmax_twice",
    "mask_multiplies", "fill_zero", "fill_twenty", "fill_plus_inf", "fill_tensor", "half_scale",
    "keys_of_half", "last_key_twice", "mean_added", "mask_rows_shifted", "score_gathered",
    "everything_masked", "large_scores",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One graph. Parts that don't fit together are adjusted by `fitted`, not rejected."""

    B: int = 2
    Hkv: int = 2
    G: int = 1
    S: int = 4
    T: int = 4
    D: int = 4
    Dv: int = 4
    dtype: str = "float64"
    layout: str = "heads_first"
    qk: str = "matmul"
    pv: str = "matmul"
    grouping: str = "repeat_interleave"
    scale: str = "multiply"
    masks: tuple[str, ...] = ()
    combine: str = "and"
    fill: str = "inf"
    softmax: str = "method"
    softcap: float = 0.0
    sinks: str = "none"
    bias: str = "none"
    bias_after_mask: bool = False
    cache: str = "none"
    output: str = "heads_first"
    mutations: tuple[str, ...] = ()
    seed: int = 0

    def has(self, mutation: str) -> bool:
        return mutation in self.mutations

    @property
    def Hq(self) -> int:
        return self.Hkv * self.G


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Random graphs, half of them with one or two mutations.

    Hypothesis draws one seed and the parts follow from it evenly: drawn one by one, it would repeat most of an
    earlier example, and each graph costs a compile.
    """
    random = draw(st.randoms(use_true_random=True))
    parts = {name: random.choice(values) for name, values in PARTS.items()}
    mutations = random.sample(MUTATIONS, random.choice((0, 0, 1, 2)))
    return fitted(Spec(**parts, mutations=tuple(mutations), seed=random.randrange(1000)))  # type: ignore[arg-type]


def fitted(spec: Spec) -> Spec:
    """The nearest graph whose parts fit together."""
    if spec.layout == "no_batch":
        batched = {"padding", "padding_int", "dense", "lengths", "packed"}
        spec = replace(spec, B=1, masks=tuple(m for m in spec.masks if m not in batched), cache="none")
    if spec.layout == "fused" and spec.cache == "none":
        spec = replace(spec, T=spec.S)
    if spec.layout == "fused" or {"value_is_key", "value_is_key_written"} & set(spec.mutations):
        spec = replace(spec, Dv=spec.D)
    if spec.cache in ("slice", "index_copy", "setitem", "ring", "fused"):
        # The step's own tokens are written into a buffer of T slots.
        spec = replace(spec, S=min(spec.S, spec.T), Dv=spec.D if spec.cache == "fused" else spec.Dv)
    if spec.cache == "cat":
        spec = replace(spec, T=max(spec.T, spec.S + 1))
    if spec.has("values_transposed"):
        # v[t, d] read as v[d, t] has a meaning only where it is square.
        spec = replace(spec, Dv=spec.T) if spec.layout != "fused" and spec.cache == "none" else spec
    if spec.qk == "sdpa":
        spec = replace(spec, sinks="none", softcap=0.0, softmax="method")
    if spec.sinks == "denominator" and spec.softmax not in ("by_hand", "after_values"):
        spec = replace(spec, softmax="by_hand")
    if spec.sinks == "column" and spec.softmax in ("after_values",):
        spec = replace(spec, softmax="method")
    other_rows = {"sum_of_queries", "softmax_queries", "softmax_heads"}
    if spec.sinks == "denominator":
        other_rows.add("max_of_queries")  # the sink is then one number a key, and no longer divides the values
    if other_rows & set(spec.mutations) and spec.softmax == "after_values":
        spec = replace(spec, softmax="by_hand")
    if spec.has("large_scores") and spec.softmax == "by_hand_unshifted":
        # Eager's exp overflows there; a NaN that is avoided is no wrong answer.
        spec = replace(spec, softmax="by_hand")
    return spec
