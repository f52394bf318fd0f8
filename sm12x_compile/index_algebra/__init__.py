"""The index algebra: *which element of which tensor does this element come from?*

Ask about an element of a node by symbolic indices, and go back one step at a time::

    b, h, t, d = Var("b", 2), Var("h", 8), Var("t", 64), Var("d", 16)
    look(Element(key, (b, h, t, d)))          # -> Element(cache, (b, h // 4, t, d)): repeat_kv is gone
    step(Element(scores, (b, h, s, t)))       # -> sum over d of q[b, h, s, d] * k[b, h // 4, t, d]

Layout ops (view, permute, expand, slice, cat, ...) only rewrite indices, exactly and with known bounds;
contractions (linear, matmul, einsum, multiply-then-sum) are sums over an index; `arange`, comparisons, `where`
give positions and predicates. So a family of subgraphs is stated as one equation instead of a list of spellings.

* `index`: integer expressions over index variables: affine, with floor-divisions and remainders that bounds
  could not resolve. Sizes may be symbolic (sympy, from `torch.SymInt`).
* `expr`: elements of tensors and what they are made of.
* `layout`, `pointwise`, `contraction`: the rules, one table each: aten overload -> rule.
"""

from . import contraction, pointwise  # noqa: F401  (registers the rules)
from .expr import Apply, Cases, Element, Expr, Number, Position, Reduce, step
from .index import Datum, FloorDiv, Index, Mod, Size, Var, known_nonnegative, same_size, size_of
from .layout import look

__all__ = [
    "Apply",
    "Cases",
    "Datum",
    "Element",
    "Expr",
    "FloorDiv",
    "Index",
    "Mod",
    "Number",
    "Position",
    "Reduce",
    "Size",
    "Var",
    "known_nonnegative",
    "look",
    "same_size",
    "size_of",
    "step",
]
