"""What happens before and while Dynamo traces a frame for our backend, and for no other.

    scope            is a backend, as Dynamo holds it, ours, and with which options?
    wrap             a function that breaks the graph is traced in another form
    python_rewrite   source -> syntax tree -> rewritten code object
    rewrites/        the syntax: branches, loops, assignments, noise
    runtime/         what rewritten code calls: selected rows, conditions, numbers that only the device knows
    breaks           what the report says of it
    recompiles       a loud word before Dynamo gives up
"""
