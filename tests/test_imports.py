"""What importing the package costs: the modules that come with it, not the time."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch._dynamo", "torch._inductor", "triton", "sympy", "rich", "typer", "transformers", "flashinfer")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Beyond what torch has loaded by itself."""
    code = "import sys, torch; before = set(sys.modules); import sm12x_compile; print(*(set(sys.modules) - before))"
    loaded = run(code).split()
    assert "sm12x_compile" in loaded
    assert not [m for m in loaded if m.startswith(HEAVY)]
    assert not [m for m in loaded if m.startswith(("sm12x_compile.patterns", "sm12x_compile.lowering"))]


def test_the_backend_does_not_load_what_only_compiling_needs() -> None:
    """Inductor's compiler, FlashInfer, the command line and the models of the demo come when they are used."""
    code = (
        "import sys, torch, torch._dynamo; before = set(sys.modules); import sm12x_compile.backend; "
        "print(*(set(sys.modules) - before))"
    )
    loaded = run(code).split()
    assert "sm12x_compile.lowering.attention" in loaded
    unwanted = ("torch._inductor.compile_fx", "flashinfer", "typer", "rich", "transformers", "sm12x_compile.cli")
    assert not [m for m in loaded if m.startswith(unwanted)]


def test_the_first_use_of_a_name_loads_the_whole() -> None:
    code = (
        "import sm12x_compile as s, sys; s.collect, s.explain, s.Options; assert 'torch._dynamo' not in sys.modules; "
        "from sm12x_compile import register_pattern, Element; from sm12x_compile.registry import kernels, patterns; "
        "assert s.sm12x.__name__ == 'sm12x' and s.pipeline.transform; "
        "assert callable(s.collect) and callable(s.uninstall); "
        "assert set(s.__all__) <= set(dir(s)); print(len(patterns()) > 4, len(kernels('attention')) > 2)"
    )
    assert run(code) == "True True"


def test_what_is_registered_before_the_backend_is_loaded_stays() -> None:
    code = (
        "from sm12x_compile.registry import register_pattern, patterns\n"
        "import torch\n"
        "@register_pattern('attention', anchors=[torch.ops.aten.softmax.int])\n"
        "def own(anchor, graph): return None\n"
        "import sm12x_compile.backend\n"
        "print([p.recognise is own for p in patterns() if p.name == 'attention'], len(patterns()) > 4)"
    )
    assert run(code) == "[True] True"


def test_a_name_that_is_not_there() -> None:
    code = "import sm12x_compile\ntry: sm12x_compile.nothing\nexcept AttributeError as e: print(e)"
    assert run(code) == "module 'sm12x_compile' has no attribute 'nothing'"
