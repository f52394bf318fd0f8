"""From a function's syntax tree to one whose meaning is the same and whose tensors all have fixed shapes.

    function      the whole: names, returns, statements in order
    expressions   calls and subscripts that may select rows or read numbers
    conditions    what stands behind ``if``
    liveness      which names are still read
    noise         prints, loggers and timers
"""

from .function import rewrite_function

__all__ = ["rewrite_function"]
