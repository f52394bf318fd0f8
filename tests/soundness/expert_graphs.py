"""Random mixtures of experts, and mutations that change what they mean: the graphs of `test_fuzz_moe`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines an opaque grouped matmul for any dtype)
from torch import Tensor

Tensors = dict[str, Tensor]

PARTS: dict[str, tuple[Any, ...]] = {
    "T": (1, 3, 7),
    "K": (1, 2, 3),
    "E": (4, 5),
    "D": (6, 8),
    "I": (4, 6),
    "form": (
        "gathered", "matvec", "embedded", "dense", "batched", "loop", "own", "grouped", "grouped", "slots", "picked",
    ),
    "routing": ("softmax", "renormalised", "of_chosen", "sigmoid", "groups", "given"),
    "picking": (
        "equal", "where", "one_hot", "scatter", "scatter_add", "filled_softmax", "filled_sigmoid", "looked_up",
        "divided", "each",
    ),
    "dispatched": (False, False, True),
    "sorting": ("argsort", "sort", "k_major"),
    "ends": ("histc", "equal", "searchsorted"),
    "unsort": ("inverse", "argsort", "written", "index_add"),
    "act": (
        "silu", "silu", "gelu", "gelu_tanh", "relu", "relu2", "by_hand", "by_division", "gelu_by_hand",
        "gelu_tanh_by_hand", "oai",
    ),
    "gate": ("halves", "up_first", "interleaved", "apart", "none"),
    "bias": (False, False, True),
    "transposed": (False, True),
    "weigh": ("output", "output", "between", "input", "nowhere"),
    "limit": (None, None, 0.8),
    "batched": (False, True),
    "tail": ("none", "shared", "scaled", "residual"),
}
MUTATIONS = (
    "second_matrix_of_next", "gate_rolled", "up_of_other_input", "ids_doubled", "ids_outside", "ids_from_the_end",
    "shares_rolled", "shares_of_all", "shares_negated", "shares_squared", "sorted_descending", "ends_shifted",
    "ends_of_other_ids", "inverse_is_order", "token_is_remainder", "mean_of_choices", "largest_of_choices",
    "bias_unweighted", "expert_left_out", "expert_twice", "expert_next", "tanh_between", "limit_of_gate_only",
    "smallest_scores", "softmax_over_tokens", "sum_of_all_scores", "weights_written_between", "input_flipped",
    "scores_rounded", "hidden_returned", "shares_returned", "bias_chosen_and_weighed", "input_scaled_by_expert",
    "groups_filled_with_zero", "group_of_neighbour", "gate_squared", "rows_of_tokens", "input_of_choice",
    "filled_with_less", "dispatched_to_next", "weighed_twice", "norm_behind", "other_constant", "choices_swapped",
    "chosen_first_only",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    T: int = 3
    K: int = 2
    E: int = 4
    D: int = 6
    I: int = 4
    form: str = "gathered"
    routing: str = "softmax"
    picking: str = "equal"
    dispatched: bool = False
    sorting: str = "argsort"
    ends: str = "histc"
    unsort: str = "inverse"
    act: str = "silu"
    gate: str = "halves"
    bias: bool = False
    transposed: bool = False
    weigh: str = "output"
    limit: float | None = None
    batched: bool = False
    tail: str = "none"
    mutations: tuple[str, ...] = ()
    seed: int = 0

    def has(self, mutation: str) -> bool:
        return mutation in self.mutations

    @property
    def rows(self) -> int:
        return self.I if self.gate in ("none", "apart") else 2 * self.I


def draw_inputs(spec: Spec) -> Tensors:
    g = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    E, D, I, T = spec.E, spec.D, spec.I, spec.T
    up, down = (E, spec.rows, D), (E, D, I)
    if spec.transposed:
        up, down = (E, D, spec.rows), (E, I, D)
    ids = torch.rand(T, E, generator=g).topk(spec.K).indices
    if spec.has("ids_doubled"):
        ids[:, -1] = ids[:, 0]
    if spec.has("ids_outside") and spec.form in ("dense", "batched", "loop", "own"):
        ids[0, 0] = E + 1 if spec.seed % 2 else -1
    return {
        "x": randn(T, D), "other": randn(T, D), "router": randn(E, D), "correction": randn(E), "ids": ids,
        "p": torch.rand(T, spec.K, generator=g, dtype=torch.float64), "w13": randn(*up), "w3": randn(*up),
        "w2": randn(*down), "b13": randn(E, spec.rows), "b3": randn(E, spec.rows), "b2": randn(E, D),
        "shared": randn(D, D), "per_expert": randn(E),
    }  # fmt: skip


# ---------------------------------------------------------------- routing


def route(spec: Spec, t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """ids and shares ``[T, K]``"""
    largest = not spec.has("smallest_scores")
    if spec.routing == "given":
        ids, p = t["ids"], t["p"]
    else:
        logits = F.linear(x, t["router"])
        if spec.routing == "of_chosen":
            p, ids = logits.topk(spec.K, largest=largest)
            p = p.softmax(-1)
        elif spec.routing in ("sigmoid", "groups"):
            scores = logits.sigmoid()
            choice = scores + t["correction"]
            if spec.routing == "groups" and spec.E % 2 == 0 and spec.K <= spec.E // 2:
                choice = _best_groups(spec, choice)
            ids = choice.topk(spec.K, sorted=False, largest=largest).indices
            p = (choice if spec.has("bias_chosen_and_weighed") else scores).gather(1, ids)
            p = p / (p.sum(-1, keepdim=True) + 1e-20) * 2.5
        else:
            scores = logits.softmax(0 if spec.has("softmax_over_tokens") else -1)
            if spec.has("scores_rounded"):
                scores = logits.softmax(-1, dtype=torch.bfloat16).double()
            p, ids = scores.topk(spec.K, dim=-1, largest=largest)
            if spec.routing == "renormalised":
                p = p / (scores if spec.has("sum_of_all_scores") else p).sum(-1, keepdim=True)
    if spec.has("ids_from_the_end") and spec.form in ("gathered", "matvec", "slots"):
        ids = ids - spec.E
    if spec.has("shares_rolled"):
        p = p.roll(1, 0)
    if spec.has("shares_negated"):
        p = -p
    if spec.has("shares_squared"):
        p = p * p
    return ids, p


def _best_groups(spec: Spec, choice: Tensor) -> Tensor:
    groups = choice.view(-1, 2, spec.E // 2)
    best = groups.topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1)[1]
    mask = torch.zeros(choice.shape[0], 2, dtype=choice.dtype).scatter_(1, best, 1.0)
    if spec.has("group_of_neighbour"):
        mask = mask.flip(1)
    mask = mask.unsqueeze(-1).expand(-1, 2, spec.E // 2).reshape(-1, spec.E)
    return choice.masked_fill(~mask.bool(), 0.0 if spec.has("groups_filled_with_zero") else -torch.inf)


# ---------------------------------------------------------------- one expert


def activate(spec: Spec, h: Tensor, up: Tensor | None) -> Tensor:
    """Gate and up of the last dimension."""
    if spec.gate == "halves":
        h, up = h.chunk(2, -1)
    elif spec.gate == "up_first":
        up, h = h.split(spec.I, -1)
    elif spec.gate == "interleaved":
        h, up = h[..., ::2], h[..., 1::2]
    if spec.has("tanh_between"):
        h = torch.tanh(h)
    if spec.limit is not None and up is not None:
        h = h.clamp(max=spec.limit)
        if not spec.has("limit_of_gate_only"):
            up = up.clamp(-spec.limit, spec.limit)
    if spec.has("gate_squared"):
        h = h * h
    if spec.act == "oai" and up is not None:
        return h * torch.sigmoid(1.702 * h) * (up + 1)
    cubic = 0.05 if spec.has("other_constant") else 0.044715
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "relu2": lambda g: F.relu(g).square(),
        "relu": lambda g: F.relu(g - 20.0) if spec.has("other_constant") else F.relu(g),
        "by_hand": lambda g: g * torch.sigmoid(g), "by_division": lambda g: g / (1 + torch.exp(-g)),
        "gelu_by_hand": lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5)),
        "gelu_tanh_by_hand": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + cubic * g**3))),
    }  # fmt: skip
    h = acts.get(spec.act, F.silu)(h)
    return h if up is None else h * up


def matrices(spec: Spec, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """w13, w3 and w2 as ``[E, out, in]``"""
    w13, w3, w2 = (t[n].mT if spec.transposed else t[n] for n in ("w13", "w3", "w2"))
    if spec.has("gate_rolled"):
        w13 = w13.roll(1, 0)
    return w13, w3, w2


def between(spec: Spec, t: Tensors, p: Tensor, h: Tensor) -> Tensor:
    """The hidden values, weighted where the routing weight stands there; `p` broadcasts."""
    return h * p if spec.weigh == "between" else h


def total(spec: Spec, p: Tensor, y: Tensor, b2: Tensor | None) -> Tensor:
    """Weigh the results ``[T, K, D]`` and add them up."""
    bias = 0 if b2 is None else b2
    late = spec.has("bias_unweighted")
    y = y if late else y + bias
    if spec.weigh == "output":
        y = y * p[..., None]
    y = y + bias if late else y
    if spec.has("mean_of_choices"):
        return y.mean(1)
    return y.amax(1) if spec.has("largest_of_choices") else y.sum(1)


# ---------------------------------------------------------------- the forms


def experts(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor, extra: list[Tensor]) -> Tensor:
    if spec.form == "grouped":
        return _grouped(spec, t, x, ids, p, extra)
    if spec.form in ("dense", "batched", "picked"):
        return _dense(spec, t, x, ids, p, extra)
    if spec.form in ("loop", "own"):
        return _loop(spec, t, x, ids, p, extra)
    if spec.form == "slots":
        parts = [_gathered(spec, t, x, ids[:, k : k + 1], p[:, k : k + 1], extra) for k in range(spec.K)]
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return out
    return _gathered(spec, t, x, ids, p, extra)


def _gathered(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor, extra: list[Tensor]) -> Tensor:
    w13, w3, w2 = matrices(spec, t)
    second = (ids + 1) % spec.E if spec.has("second_matrix_of_next") else ids

    def linear(rows: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        if spec.form == "embedded":
            picked = F.embedding(ids, w.reshape(spec.E, -1)).view(*ids.shape, *w.shape[1:])
        else:
            picked = w[ids]
        if spec.form == "matvec":
            return (picked @ rows[..., None]).squeeze(-1)
        return torch.einsum("tki,tkoi->tko", rows, picked)

    rows = x[:, None].expand(-1, ids.shape[1], -1)
    if spec.has("input_of_choice"):
        rows = rows * torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)[:, None]
    if spec.weigh == "input":
        rows = rows * p[..., None]
    if spec.has("input_scaled_by_expert"):
        rows = rows * t["per_expert"][ids][..., None]
    h = linear(rows, w13, ids)
    up = None
    if spec.gate == "apart":
        up = linear(t["other"][:, None].expand_as(rows) if spec.has("up_of_other_input") else rows, w3, ids)
    if spec.bias:
        h, up = h + t["b13"][ids], None if up is None else up + t["b3"][ids]
    if spec.has("weights_written_between"):
        t["w2"].mul_(1.5)
    h = between(spec, t, p[..., None], activate(spec, h, up))
    if spec.has("hidden_returned"):
        extra.append(h)
    return total(spec, p, linear(h, w2, second), t["b2"][second] if spec.bias else None)


def _shares(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """``[T, E]``"""
    E, T = spec.E, ids.shape[0]
    same = ids[..., None] == torch.arange(E)
    if spec.picking in ("equal", "each"):
        return (same * p[..., None]).sum(1)
    if spec.picking == "where":
        return torch.where(same, p[..., None], 0).sum(1)
    if spec.picking in ("looked_up", "divided"):
        found = F.linear(x, t["router"]).softmax(-1) * same.any(1)
        return found / found.sum(-1, keepdim=True) if spec.picking == "divided" else found
    if spec.picking.startswith("filled") and not spec.has("ids_outside"):
        fill = -5.0 if spec.has("filled_with_less") else -torch.inf
        filled = torch.full((T, E), fill, dtype=p.dtype).scatter(1, ids, p)
        if spec.seed % 2:
            filled = F.linear(x, t["router"]).masked_fill(~same.any(1), fill)
        dim = 0 if spec.has("softmax_over_tokens") else -1
        return filled.softmax(dim) if spec.picking == "filled_softmax" else filled.sigmoid()
    if spec.picking == "one_hot" and not spec.has("ids_outside"):
        return torch.einsum("tke,tk->te", F.one_hot(ids, E).to(p.dtype), p)
    if spec.has("ids_outside"):
        return torch.stack([(p * (ids == e)).sum(1) for e in range(E)], 1)
    zeros = torch.zeros(T, E, dtype=p.dtype)
    return zeros.scatter_add(1, ids, p) if spec.picking == "scatter_add" else zeros.scatter(1, ids, p)


def _dense(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor, extra: list[Tensor]) -> Tensor:
    w13, w3, w2 = matrices(spec, t)
    if spec.has("second_matrix_of_next"):
        w2 = w2.roll(-1, 0)

    def linear(rows: Tensor, w: Tensor) -> Tensor:  # [E, T, in] or [T, in] -> [E, T, out]
        if spec.form == "batched":
            return torch.bmm(rows if rows.dim() == 3 else rows.expand(spec.E, -1, -1), w.mT)
        return torch.einsum("eti,eoi->eto" if rows.dim() == 3 else "ti,eoi->eto", rows, w)

    shares = _shares(spec, t, x, ids, p if spec.weigh != "nowhere" else torch.ones_like(p))
    rows, others = x, t["other"] if spec.has("up_of_other_input") else x
    inside = spec.weigh == "input" and spec.form != "picked"
    if inside or (spec.dispatched and spec.form != "picked"):
        given = ids + 1 if spec.has("dispatched_to_next") else ids
        given = given[:, : spec.K - 1] if spec.has("chosen_first_only") and spec.K > 1 else given
        chosen = shares > 0 if spec.seed % 2 else (given[..., None] == torch.arange(spec.E)).any(1)
        factor = shares if inside else chosen
        rows, others = (r * factor.T[..., None] for r in (rows, others))
    h = linear(rows, w13)
    up = linear(others, w3) if spec.gate == "apart" else None
    if spec.bias:
        h, up = h + t["b13"][:, None], None if up is None else up + t["b3"][:, None]
    h = activate(spec, h, up)
    if spec.has("hidden_returned"):
        extra.append(h)
    y = linear(h, w2)
    if spec.bias:
        y = y + t["b2"][:, None]
    if spec.form == "picked":
        chosen = y.transpose(0, 1).gather(1, ids[..., None].expand(-1, -1, spec.D))
        return total(spec, p, chosen, None)
    if spec.has("shares_of_all"):
        shares = F.linear(x, t["router"]).softmax(-1)
    if not inside or spec.has("weighed_twice"):
        y = y * shares.T[..., None]
    return y.mean(0) if spec.has("mean_of_choices") else y.sum(0)


def _loop(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor, extra: list[Tensor]) -> Tensor:
    own = spec.form == "own"
    parts = {n: [w.clone() for w in t[n]] if own else t[n] for n in ("w13", "w3", "w2", "b13", "b3", "b2")}
    shares = None if spec.picking in ("equal", "where", "each") else _shares(spec, t, x, ids, p)

    def linear(rows: Tensor, name: str, bias: str, e: int) -> Tensor:
        w = parts[name][e]
        return F.linear(rows, w.T if spec.transposed else w, parts[bias][e] if spec.bias else None)

    out = torch.zeros_like(x)
    for e in range(spec.E):
        if spec.has("expert_left_out") and e == 1:
            continue
        second = (e + 1) % spec.E if spec.has("second_matrix_of_next") else e
        asked = e + 1 if spec.has("expert_next") else e
        chosen = ids == asked
        if shares is not None:
            share = shares[:, asked % spec.E, None]
        elif spec.picking == "where":
            share = torch.where(chosen, p, 0).sum(-1, keepdim=True)
        else:
            share = (p * chosen).sum(-1, keepdim=True)
        if spec.weigh == "nowhere":
            share = chosen.any(-1, keepdim=True)
        inside = spec.weigh == "input"
        rows, others = x * share if inside else x, t["other"] if spec.has("up_of_other_input") else x
        others = others * share if inside else others
        up = linear(others, "w3", "b3", e) if spec.gate == "apart" else None
        y = linear(activate(spec, linear(rows, "w13", "b13", e), up), "w2", "b2", second)
        if inside and not spec.has("weighed_twice"):
            share = torch.ones_like(share)
        if spec.picking == "each" and not inside:
            columns = [1, 0] if spec.has("choices_swapped") and spec.K == 2 else list(range(spec.K))
            for k, other in enumerate(columns):
                out = out + torch.where((ids[:, k] == asked)[:, None], p[:, other, None] * y, 0)
        elif spec.seed % 3 == 0:
            some = chosen[:, : spec.K - 1] if spec.has("chosen_first_only") and spec.K > 1 else chosen
            out = torch.where(some.any(-1, keepdim=True), out + y * share, out)
        else:
            out = out + y * share
        if spec.has("expert_twice") and e == 2:
            out = out + y * share
    return out


def _grouped(spec: Spec, t: Tensors, x: Tensor, ids: Tensor, p: Tensor, extra: list[Tensor]) -> Tensor:
    w13, w3, w2 = matrices(spec, t)
    T, K = x.shape[0], ids.shape[1]
    major = spec.sorting == "k_major"
    flat, shares = (ids.T.reshape(-1), p.T.reshape(-1)) if major else (ids.reshape(-1), p.reshape(-1))
    descending = spec.has("sorted_descending")
    if spec.sorting == "sort":
        values, order = flat.sort(descending=descending)
    else:
        order = flat.argsort(descending=descending)
        values = flat[order]
    ends = _ends(spec, t["ids"].reshape(-1) if spec.has("ends_of_other_ids") else flat, values)
    token = order % T if major != spec.has("token_is_remainder") else order // K
    rows, shares = x[token], shares[order]
    if spec.has("rows_of_tokens"):
        rows = x.repeat(K, 1)
    if spec.weigh == "input":
        rows = rows * shares[:, None]
    if spec.has("second_matrix_of_next"):
        w2 = w2.roll(-1, 0)

    def linear(rows: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        out = torch.ops.transformers.grouped_mm_fallback(rows, w.mT, ends)
        return out + bias[values] if spec.bias else out

    h = linear(rows, w13, t["b13"])
    others = t["other"][token] if spec.has("up_of_other_input") else rows
    up = linear(others, w3, t["b3"]) if spec.gate == "apart" else None
    h = between(spec, t, shares[:, None], activate(spec, h, up))
    if spec.has("hidden_returned"):
        extra.append(h)
    y = linear(h, w2, t["b2"])
    if spec.weigh == "output":
        y = y * shares[:, None]
    if spec.unsort == "index_add":
        return torch.zeros_like(x).index_add(0, token, y)
    inverse = order.argsort()
    if spec.unsort == "inverse":
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(T * K)
    if spec.has("inverse_is_order"):
        inverse = order
    if spec.unsort == "written":
        back = torch.empty_like(y)
        back[inverse if spec.has("inverse_is_order") else order] = y
    else:
        back = y[inverse]
    back = back.view(K, T, -1).transpose(0, 1) if major else back.view(T, K, -1)
    if spec.has("mean_of_choices"):
        return back.mean(1)
    return back.amax(1) if spec.has("largest_of_choices") else back.sum(1)


def _ends(spec: Spec, flat: Tensor, values: Tensor) -> Tensor:
    E = spec.E
    if spec.ends == "searchsorted" and not spec.has("sorted_descending"):
        found = torch.searchsorted(values, torch.arange(E), right=not spec.has("ends_shifted")).int()
    else:
        counts = (
            torch.histc(flat.double(), bins=E, min=0, max=E - 1) if spec.ends == "histc"
            else (flat[:, None] == torch.arange(E)).sum(0)
        )  # fmt: skip
        found = counts.cumsum(0).int()
        if spec.has("ends_shifted"):
            found = found - counts.int()
    # An opaque grouped matmul leaves rows behind the last end as they are.
    return found


def mixture(spec: Spec) -> Callable[[Tensors], Any]:
    def function(t: Tensors) -> Any:
        x = t["x"].flip(0) if spec.has("input_flipped") else t["x"]
        if spec.batched:
            x = x.view(1, spec.T, spec.D).reshape(-1, spec.D)
        ids, p = route(spec, t, x)
        extra: list[Tensor] = [p * 2] if spec.has("shares_returned") else []
        out = experts(spec, t, x, ids, p, extra)
        if spec.has("norm_behind"):
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
        if spec.tail == "shared":
            out = out + F.silu(F.linear(x, t["shared"]))
        elif spec.tail == "scaled":
            out = out * 1.5
        elif spec.tail == "residual":
            out = x + out
        out = out.view(1, spec.T, spec.D) if spec.batched else out
        return (out, *extra) if extra else out

    return function
