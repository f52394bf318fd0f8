"""What happens before and while Dynamo traces a frame for our backend, and for no other.

    scope            is a backend, as Dynamo holds it, ours, and with which options?

Known reference functions become one node of the graph:

    pure_code        which code has no effect but its result
    fingerprint      what a Python function means: its shape without names, and what its control flow asks
    library          the families whose functions are known, and the experiment that tells whether one belongs
    install          find such functions, substitute them while we compile, undo it

Python whose course depends on tensor values is traced in another form:

    wrap             a function that breaks the graph is traced in a form that does not
    python_rewrite   source -> syntax tree -> rewritten code object
    rewrites/        the syntax: branches, loops, assignments, noise
    runtime/         what rewritten code calls: selected rows, conditions, numbers that only the device knows
    breaks           what the report says of it
    counters         Python ints that a frame counts up are symbols from the first trace on
    recompiles       a loud word before Dynamo gives up
"""
