"""Which index variable is batch, head, group, query, key, feature: read off from who depends on it.

    in k or v (and not in v alone)  shared: batch, or KV head
    in q alone                      query position, or one of the G query heads of a KV head
    in v alone                      feature of the result

Which shared variable is called batch and which head changes nothing in the result; masks and sinks decide, since
padding is given for a batch and sinks for a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from sm12x_compile.index_algebra import Element, Index, Size, Var
from sm12x_compile.index_algebra.index import mul
from sm12x_compile.index_algebra.predicate import predicate_vars, substitute
from sm12x_compile.masks import MaskTerm, data_vars
from sm12x_compile.match import Refusal, refine, source


@dataclass(frozen=True)
class Problem:
    """One attention as it was read: elements over the variables of `out`, `key` and `summed`."""

    node: Node
    out: tuple[Index, ...]
    key: Var
    q: Element
    k: Element
    value: Element
    summed: tuple[Var, ...]
    scale: float
    softcap: float
    masks: tuple[MaskTerm, ...]
    biases: tuple[tuple[Element, float], ...]
    sink: Element | None
    rows: Index | None
    form: str
    stable: bool

    def subs(self, mapping: dict[Var, Index]) -> Problem:
        """The same problem over other variables; `key` and `summed` stay."""
        return replace(
            self,
            out=tuple(ix.subs(mapping) for ix in self.out),
            q=self.q.subs(mapping), k=self.k.subs(mapping), value=self.value.subs(mapping),
            biases=tuple((e.subs(mapping), f) for e, f in self.biases),
            sink=self.sink.subs(mapping) if self.sink is not None else None,
            rows=self.rows.subs(mapping) if self.rows is not None else None,
            masks=tuple(replace(m, keep=substitute(m.keep, mapping), source=m.source.subs(mapping))
                        for m in self.masks),
        )  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """The variables by role; `problem` is the problem in terms of them."""

    problem: Problem
    batch: tuple[Var, ...]
    kv_head: tuple[Var, ...]
    group: tuple[Var, ...]
    query: Var | None
    feature: tuple[Var, ...]

    @property
    def heads(self) -> tuple[Var, ...]:
        return (*self.kv_head, *self.group)

    @property
    def queries(self) -> tuple[Var, ...]:
        return (self.query,) if self.query is not None else ()

    @property
    def groups(self) -> Size:
        size: Size = 1
        for v in self.group:
            size = mul(size, v.extent)
        return size


def assign_roles(problem: Problem) -> Roles | Refusal:
    """Refine the variables until q, k and v are affine in them, and give each its role."""
    # v behind layout only: its dtype is the dtype that the values are summed in.
    problem = replace(problem, value=source(problem.value, (problem.key,)))
    mapping = refine([problem.q, problem.k, problem.value])
    low = _low_halves(mapping)
    problem = problem.subs(mapping)
    q, k, v = problem.q.vars(), problem.k.vars(), problem.value.vars()
    inner = {problem.key, *problem.summed}
    if problem.key not in v:
        return Refusal("the values do not run along the keys", problem.node)
    if v & set(problem.summed) or problem.key in q:
        return Refusal("an index of the product runs through the values", problem.node)
    if not set(problem.summed) <= q | k:
        return Refusal("q and k share no feature dimension", problem.node)
    outer = [var for ix in problem.out for var in _in_order(ix) if var not in inner]
    if len(set(outer)) != len(outer):
        return Refusal("an index of the result is used twice", problem.node)
    if not (q | k | v) <= set(outer) | inner:
        return Refusal("an operand has an index that the result does not have", problem.node)
    scored = q | k | _score_vars(problem)
    feature = tuple(x for x in outer if x in v and x not in scored)
    rows = [x for x in outer if x in q and x not in k and x not in v]
    shared = [x for x in outer if x not in feature and x not in rows]
    query = _query(problem, rows, low)
    group = tuple(x for x in rows if x is not query)
    batch, kv_head = _batch_and_heads(problem, shared, group, query)
    return Roles(problem, batch, kv_head, group, query, feature)


def _score_vars(problem: Problem) -> set[Var]:
    """Variables that the scores depend on beside q and k."""
    found = problem.sink.vars() if problem.sink is not None else set()
    for element, _ in problem.biases:
        found = found | element.vars()
    for term in problem.masks:
        found = found | predicate_vars(term.keep) | term.source.vars()
    return found


def _in_order(ix: Index) -> list[Var]:
    """The variables of a mixed-radix index, the slowest first."""
    terms = [(a, c) for a, c in ix.terms.items() if isinstance(a, Var)]
    if all(isinstance(c, int) for _, c in terms):
        terms.sort(key=lambda term: term[1], reverse=True)
    return [a for a, _ in terms]


def _low_halves(mapping: dict[Var, Index]) -> set[Var]:
    """Variables that came from splitting another: the group index of a head, as a rule."""
    return {a for ix in mapping.values() for a, c in ix.terms.items() if c == 1 and isinstance(a, Var)}


def _query(problem: Problem, rows: list[Var], low: set[Var]) -> Var | None:
    """The row variable that is the query position: the one masks relate to the key, else the scores' row."""
    if not rows:
        return None
    masked: set[Var] = set()
    for term in problem.masks:
        masked |= predicate_vars(term.keep)
    related = [x for x in rows if x in masked]
    candidate = problem.rows.var if problem.rows is not None else None
    if candidate in rows and (candidate in related or not related):
        return candidate
    if related:
        return related[-1]
    if problem.rows is not None and problem.rows.is_const:
        return None
    own = [x for x in rows if x not in low]
    return own[-1] if own else None


def _batch_and_heads(
    problem: Problem, shared: list[Var], group: tuple[Var, ...], query: Var | None
) -> tuple[tuple[Var, ...], tuple[Var, ...]]:
    of_data = data_vars(problem.masks) - {problem.key} - ({query} if query else set())
    of_sink = problem.sink.vars() if problem.sink is not None else set()
    heads = [x for x in shared if x in of_sink]
    if not heads:
        free = [x for x in shared if x not in of_data]
        if len(shared) > 1 or group or not of_data:
            heads = free[-1:]
    return tuple(x for x in shared if x not in heads), tuple(heads)
