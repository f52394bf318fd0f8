"""What rewritten code calls. Dynamo traces into all of it; only tensor operations of fixed shape remain.

    predicates   conditions that the data decide
    selection    the positions that a mask selects, without their number
    rows         a value for each selected position, computed for all
    rowwise      which operations treat each row by itself
    writes       writes of selected rows, and writes under a condition
    indexing     subscripts
    number       Python numbers that only the device knows
    control      loops over hits, names after a branch
    provenance   what the graph traced so far knows about two tensors
    memory       who shares whose memory: a copy that stands for a view must not be written
    failing      operations that raise an error for some values
    trace        nothing happens under a condition that would not show
    refusal      giving up, cleanly
"""

import operator as operators

from .calls import any_test, bincount, call_method, changed_item, matmul, sum_test
from .control import UNBOUND, certain, escaping, length, loop, mark_loop, select, tolist
from .indexing import getitem, masked_select, setitem, view_item
from .number import item, to_bool, to_float, to_int
from .predicates import and_, any_of, certainly, is_data, may, may_not, not_, or_, test, under
from .rows import nonzero
from .selection import unique
from .trace import check, mark
from .writes import augmented, augmented_tensor, method

slice = slice

__all__ = [
    "UNBOUND",
    "and_",
    "any_of",
    "any_test",
    "augmented",
    "augmented_tensor",
    "bincount",
    "call_method",
    "certain",
    "certainly",
    "changed_item",
    "check",
    "escaping",
    "getitem",
    "is_data",
    "item",
    "length",
    "loop",
    "mark",
    "mark_loop",
    "masked_select",
    "matmul",
    "may",
    "may_not",
    "method",
    "nonzero",
    "not_",
    "operators",
    "or_",
    "select",
    "setitem",
    "slice",
    "sum_test",
    "test",
    "to_bool",
    "to_float",
    "to_int",
    "tolist",
    "under",
    "unique",
    "view_item",
]  # fmt: skip
