"""Runs functions under Triton's interpreter, in a process of its own.

`TRITON_INTERPRET=1` must be set before Triton is imported and then holds for the whole process, so the tests start
this file as a worker (fixture `interpreter` in conftest.py). It reads pickled calls from stdin and writes pickled
answers to stdout: ``(module, function, args, kwargs)`` to ``("ok", value)`` or ``("error", traceback)``.

The interpreter of Triton 3.6 to 3.9 keeps bf16 as uint16 and multiplies the bit patterns in `tl.dot`, without an
error; the worker repairs that. Other arithmetic on bf16 stays wrong, and our kernels do none.
Memory that nobody writes comes out as NaN.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from typing import Any


def repair_bf16_dot() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    wrong_dot = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return wrong_dot(self, widened(a), widened(b), accumulator, *rest)

    InterpreterBuilder.create_dot = dot


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    repair_bf16_dot()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a kernel prints must not end up among the answers
    while True:
        try:
            module, function, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = ("ok", getattr(importlib.import_module(module), function)(*args, **kwargs))
        except Exception:
            answer = ("error", traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
