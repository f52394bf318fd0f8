"""Ways to choose experts: what becomes `moe_route` and with which tags, and what stays as it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sm12x_compile

E, K, D, H = 8, 2, 6, 4
Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_of_all(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = logits.softmax(-1).topk(K)
    return p, ids


def renormalised_and_scaled(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = torch.topk(F.softmax(logits.float(), dim=1), K, dim=1)
    return 2.5 * (p / p.sum(dim=-1, keepdim=True)).to(logits.dtype), ids


def softmax_of_chosen(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    top, ids = torch.topk(logits, K, dim=-1)
    return torch.softmax(top, dim=-1), ids


def softmax_of_gathered(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = logits.topk(K).indices
    return logits.gather(-1, ids).softmax(-1), ids


def sigmoid_with_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = torch.topk(scores + bias, K, dim=-1, sorted=False)[1]
    p = scores.gather(1, ids)
    return p / (p.sum(-1, keepdim=True) + 1e-20), ids


def sqrt_softplus(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softplus(logits).sqrt()
    p, ids = scores.topk(K)
    return p / p.sum(-1, keepdim=True), ids


def grouped(groups: int, best: str) -> Router:
    def router(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid() if best == "two" else logits.softmax(-1)
        choice = scores + bias if best == "two" else scores
        members = choice.view(-1, groups, E // groups)
        value = members.topk(2, dim=-1)[0].sum(-1) if best == "two" else members.max(-1).values
        chosen = value.topk(max(1, groups // 2), dim=-1, sorted=False)[1]
        mask = torch.zeros_like(value).scatter_(1, chosen, 1).unsqueeze(-1).expand(-1, groups, E // groups)
        choice = choice.masked_fill(~mask.reshape(-1, E).bool(), float("-inf") if best == "two" else 0.0)
        ids = choice.topk(K, dim=-1, sorted=False)[1]
        return scores.gather(1, ids), ids

    return router


KNOWN: dict[str, tuple[Router, dict[str, Any]]] = {
    "softmax": (softmax_of_all, {"score": "softmax"}),
    "renormalised": (renormalised_and_scaled, {"score": "softmax", "renormalise": True, "scaling": 2.5}),
    "of_chosen": (softmax_of_chosen, {"score": "softmax", "renormalise": True}),
    "of_gathered": (softmax_of_gathered, {"score": "softmax", "renormalise": True}),
    "sigmoid": (sigmoid_with_bias, {"score": "sigmoid", "renormalise": True, "correction_bias": True}),
    "sqrt_softplus": (sqrt_softplus, {"score": "sqrt_softplus", "renormalise": True}),
    "two_best": (grouped(4, "two"), {"score": "sigmoid", "groups": 4, "topk_group": 2, "correction_bias": True}),
    "best": (grouped(2, "one"), {"score": "softmax", "groups": 2, "topk_group": 1}),
    "one_group": (grouped(1, "two"), {"score": "sigmoid", "correction_bias": True}),
}


def run(router: Router, tokens: int) -> sm12x_compile.Report:
    """Compile a small mixture with this router, compare with eager, and give the report."""
    torch.manual_seed(0)
    w = torch.randn(E, D), torch.randn(E), torch.randn(E, 2 * H, D), torch.randn(E, D, H)

    def feed(x: Tensor, gate: Tensor, bias: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        p, ids = router(F.linear(x, gate), bias)
        g, u = torch.einsum("td,tkhd->tkh", x, w13[ids]).chunk(2, -1)
        return torch.einsum("tkh,tkdh,tk->td", F.silu(g) * u, w2[ids], p)

    torch._dynamo.reset()
    compiled = torch.compile(feed, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    with torch.no_grad(), sm12x_compile.collect() as report:
        for _ in range(3):
            x = torch.randn(tokens, D)
            torch.testing.assert_close(compiled(x, *w), feed(x, *w), rtol=1e-4, atol=1e-5)
    assert report.count("moe") == 1, f"{report}"
    return report


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", KNOWN)
def test_becomes_one_op(name: str, tokens: int) -> None:
    router, tags = KNOWN[name]
    (site,) = [s for s in run(router, tokens).sites if s.pattern == "moe_route"]
    assert site.status == "rewritten", site.reason
    assert site.tags == {"top_k": K, "experts": E, **tags}


def rounded_before_the_choice(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = logits.softmax(-1, dtype=torch.bfloat16).topk(K)
    return p.float(), ids


def weights_with_the_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (logits.sigmoid() + bias).topk(K)  # type: ignore[return-value]


def sigmoid_of_chosen_logits(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = logits.topk(K)
    return p.sigmoid(), ids


def divided_by_all(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    p, ids = scores.topk(K)
    return p / scores.sum(-1, keepdim=True), ids


def scores_of_others(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.softmax(-1)
    ids = p.topk(K).indices
    return p.flip(-1).gather(1, ids), ids


def smallest(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = logits.softmax(-1).topk(K, largest=False)
    return p, ids


def first_of_chosen(renormalised: str) -> Router:
    def router(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = logits.softmax(-1).topk(K + 1)
        if renormalised == "all":
            p = p / p.sum(-1, keepdim=True)
        used = 1 if renormalised == "one" else K
        p, ids = p[:, :used], ids[:, :used]
        return p / p.sum(-1, keepdim=True) if renormalised != "all" else p, ids

    return router


def first_of_the_best_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    members = (scores + bias).view(-1, 4, E // 4)
    chosen = members.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1][:, :1]
    mask = torch.zeros(logits.shape[0], 4).scatter_(1, chosen, 1).unsqueeze(-1).expand(-1, 4, E // 4)
    ids = (scores + bias).masked_fill(~mask.reshape(-1, E).bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


@pytest.mark.parametrize(
    "router",
    [
        *(first_of_chosen(how) for how in ("used", "one", "all")), first_of_the_best_groups,
        rounded_before_the_choice, weights_with_the_bias, sigmoid_of_chosen_logits, divided_by_all, scores_of_others,
        smallest,
    ],
)  # fmt: skip
def test_is_left_with_a_reason(router: Router) -> None:
    (site,) = [s for s in run(router, 5).sites if s.pattern == "moe_route"]
    assert site.status == "near-miss" and site.reason and len(site.reason.split()) >= 4
