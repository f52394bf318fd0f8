from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call ``interpreter(module, function, *args, **kwargs)`` in a process where Triton kernels are interpreted."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "interpreter_bf16.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    requests, answers = worker.stdin, worker.stdout

    def call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
        pickle.dump((module, function, args, kwargs), requests)
        requests.flush()
        status, value = pickle.load(answers)
        if status == "error":
            raise AssertionError(f"in the interpreter:\n{value}")
        return value

    yield call
    requests.close()
    worker.wait(timeout=30)
