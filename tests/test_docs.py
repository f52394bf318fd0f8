"""The documents keep their word: code blocks run, commands are those of CI, links and names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sm12x_compile
from sm12x_compile.options import Options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def words(command: str) -> str:
    return " ".join(command.split())


PYTHON = blocks("python")


def test_readme_has_code_to_run() -> None:
    assert len(PYTHON) >= 3


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_of_the_readme_runs(number: int) -> None:
    """Each block runs by itself, after the imports and tensors that a reader would have at hand."""
    given = (
        "import torch, sm12x_compile\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "torch.manual_seed(0)\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64,"
        " num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()\n"
        "input_ids = torch.randint(0, 64, (1, 12))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", given + PYTHON[number]],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{PYTHON[number]}\n{done.stderr}"


def test_the_two_commands() -> None:
    """Command 1 sets up and runs the demo, command 2 sets up and runs the tests; `.ci/run` is command 2."""
    demo, tests = blocks("bash")[:2]
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints-cpu.txt -e '.[test]' && "
    assert words(demo) == set_up + "python -m sm12x_compile demo"
    assert words(tests).startswith(set_up + "pytest tests/soundness/test_traps.py && pytest -n 2 ")
    script = (ROOT / ".ci" / "run").read_text()
    lines = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert words(" && ".join(lines)).replace('"', "'") == words(tests)


def test_every_option_is_in_the_readme() -> None:
    for name in Options.__dataclass_fields__:
        assert f"`{name}`" in README


def test_every_public_name_is_in_the_readme() -> None:
    public = {"explain", "collect", "assert_rewritten", "register_pattern", "register_kernel", "uninstall"}
    assert public <= set(sm12x_compile.__all__)
    for name in public:
        assert name in README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    quoted = re.findall(r"`((?:sm12x_compile|patterns|lowering|tests|examples|benchmarks|\.ci)/[\w./-]*)`", text)
    missing = [path for path in [*links, *quoted] if path and not (ROOT / path).exists()]
    assert not missing


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS" in text
