"""The documents keep their word: code runs, commands are those of CI, pasted output is real, links exist."""

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
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# What a reader has at hand: the imports, a model, its input.
GIVEN = """
import torch, sm12x_compile
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
input_ids = torch.randint(0, 64, (1, 12))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def words(text: str) -> str:
    return " ".join(text.split())


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PYTHON = blocks("python")


def test_readme_has_code_to_run() -> None:
    assert len(PYTHON) >= 4
    assert len(blocks("console")) >= 1


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    path = tmp_path / f"block_{number}.py"
    path.write_text(GIVEN + PYTHON[number])
    run(sys.executable, str(path))


@pytest.mark.parametrize("block", blocks("console"))
def test_output_in_the_readme_is_what_is_printed(block: str) -> None:
    command, _, pasted = block.partition("\n")
    module = command.removeprefix("$ python ").split()
    assert words(run(sys.executable, *module)) == words(pasted)


def test_the_two_commands() -> None:
    """Command 1 sets up and runs the demo, command 2 sets up and runs the tests; `.ci/run` is command 2."""
    demo, tests = (words(block) for block in blocks("bash")[:2])
    set_up = "python3 -m venv .venv && . .venv/bin/activate && "
    set_up += "pip install -q -c constraints-cpu.txt -e '.[test]' && "
    assert demo == set_up + "python -m sm12x_compile demo"
    assert tests.startswith(set_up + "pytest tests/soundness/test_traps*.py && pytest -n 2 ")
    script = (ROOT / ".ci" / "run").read_text()
    lines = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert words(" && ".join(lines)).replace('"', "'") == tests


def test_every_option_is_in_the_readme() -> None:
    for name in Options.__dataclass_fields__:
        assert f"`{name}`" in README


def test_every_public_function_is_in_the_readme() -> None:
    for name in ("explain", "collect", "assert_rewritten", "register_pattern", "register_kernel", "uninstall"):
        assert name in sm12x_compile.__all__
        assert name in README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    folders = "sm12x_compile|patterns|lowering|tests|examples|benchmarks|[.]ci"
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert not [path for path in [*links, *quoted] if path and not (ROOT / path).exists()]


def test_a_wheel_would_hold_every_module() -> None:
    """setuptools is given a list of packages; a new folder that is not in it works in a checkout only."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {"sm12x_compile": "sm12x_compile", "sm12x_compile.patterns": "patterns",
              "sm12x_compile.lowering": "lowering"}  # fmt: skip
    found = {}
    for package, folder in places.items():
        for path in (ROOT / folder).rglob("*.py"):  # does not follow the symlinks in the package
            inside = path.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *inside])] = "/".join([folder, *inside])
    assert set(found) == set(setuptools["packages"])
    mapped = setuptools["package-dir"]
    assert {package: mapped.get(package, package.replace(".", "/")) for package in found} == found


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
