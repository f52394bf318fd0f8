from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def release(package: ModuleType) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call ``interpreter(module, function, *args, **kwargs)`` in a process where Triton kernels are interpreted."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 makes an index of an array of one element, which NumPy 2.4 forbids")
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
