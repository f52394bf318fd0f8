"""Every option: its values, what is refused, and what the message says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from sm12x_compile.arch import known_names
from sm12x_compile.options import OptionError, Options

VALUES: dict[str, list[Any]] = {
    "arch": ["auto", *known_names()],
    "codegen": ["inductor", "eager"],
    "cuda_graphs": ["auto", True, False],
    "capture": [True, False],
    "select": ["auto", "race", "static"],
    "race_seconds": [3.0, 0.5, 10],
    "verify": ["auto", True, False],
    "patterns": [None, ("attention",), ("-attention",), ()],
    "kernels": [None, ("torch.sdpa", "reference"), ("-torch.sdpa",)],
    "moe_weights": ["keep", "mxfp4", "mxfp4_only"],
}


def test_the_table_is_complete_and_begins_with_the_defaults() -> None:
    assert [f.name for f in fields(Options)] == list(VALUES)
    for name, values in VALUES.items():
        assert getattr(Options(), name) == values[0]


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in VALUES.items() for v in values])
def test_every_value_is_taken(key: str, value: Any) -> None:
    options = Options.parse({key: value})
    assert getattr(options, key) == value
    for other in set(VALUES) - {key}:
        assert getattr(options, other) == VALUES[other][0]


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_given(nothing: Any) -> None:
    assert Options.parse(nothing) == Options()


def test_an_unknown_key_gets_a_hint_and_the_list() -> None:
    known = ", ".join(sorted(VALUES))
    for key, hint in (("code_gen", " (did you mean 'codegen'?)"), ("pattern", " (did you mean 'patterns'?)")):
        with pytest.raises(OptionError) as error:
            Options.parse({key: 1})
        assert str(error.value) == f"unknown option {key!r}{hint}; known options: {known}"
    with pytest.raises(OptionError) as error:
        Options.parse({"zzz": 1})
    assert str(error.value) == f"unknown option 'zzz'; known options: {known}"
    with pytest.raises(OptionError, match="unknown option 3"):
        Options.parse({3: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("codegen", "triton", "'inductor', 'eager'"),
        ("codegen", None, "'inductor', 'eager'"),
        ("cuda_graphs", "True", "'auto', True, False"),
        ("cuda_graphs", 1, "'auto', True, False"),  # 1 == True, but is not meant
        ("capture", 0, "True, False"),
        ("capture", "auto", "True, False"),
        ("select", "best", "'auto', 'race', 'static'"),
        ("verify", "yes", "'auto', True, False"),
        ("verify", 1, "'auto', True, False"),
        ("moe_weights", "fp8", "'keep', 'mxfp4', 'mxfp4_only'"),
        ("moe_weights", ["keep"], "'keep', 'mxfp4', 'mxfp4_only'"),
    ],
)
def test_a_value_outside_the_table(key: str, value: Any, choices: str) -> None:
    with pytest.raises(OptionError) as error:
        Options.parse({key: value})
    assert str(error.value) == f"option {key}={value!r}: choose one of {choices}"


@pytest.mark.parametrize("value", [0, -1.0, True, "3", None, float("nan")])
def test_seconds_of_a_race(value: Any) -> None:
    with pytest.raises(OptionError, match="option 'race_seconds' takes a positive number of seconds, got"):
        Options.parse({"race_seconds": value})


def test_arch_names() -> None:
    with pytest.raises(OptionError, match=r"option 'arch': unknown arch 'rtx4090'; known: auto, rtx5090"):
        Options.parse({"arch": "rtx4090"})
    with pytest.raises(OptionError, match=r"option 'arch' takes a name, got \(12, 0\)"):
        Options.parse({"arch": (12, 0)})


def test_eager_has_no_cuda_graphs() -> None:
    with pytest.raises(OptionError, match="cuda_graphs=True needs codegen='inductor'"):
        Options.parse({"codegen": "eager", "cuda_graphs": True})
    for value in ("auto", False):
        assert Options.parse({"codegen": "eager", "cuda_graphs": value}).cuda_graphs == value


@pytest.mark.parametrize("key", ["patterns", "kernels"])
def test_names_to_allow_or_deny(key: str) -> None:
    def wants(given: Any, name: str) -> bool:
        options = Options.parse({key: given})
        return options.wants_pattern(name) if key == "patterns" else options.wants_kernel(name)

    for allowed in (["a", "b"], ("a", "b"), {"a", "b"}, "a,b", " a , b "):
        assert wants(allowed, "a") and wants(allowed, "b") and not wants(allowed, "c")
    for denied in (["-a", "-b"], "-a,-b"):
        assert not wants(denied, "a") and not wants(denied, "b") and wants(denied, "c")
    assert wants(None, "a")
    assert not wants([], "a") and not wants("", "a")  # an empty list allows nothing
    # The other option is not touched.
    options = Options.parse({key: ["-a"]})
    assert options.wants_kernel("a") if key == "patterns" else options.wants_pattern("a")


@pytest.mark.parametrize("key", ["patterns", "kernels"])
def test_malformed_names(key: str) -> None:
    with pytest.raises(OptionError) as error:
        Options.parse({key: ["a", "-b"]})
    assert str(error.value) == f"option {key!r}: either allow ('a') or deny ('-name'), not both"
    for bad in (3, True, [1], ["-"], [""], [None], b"a"):
        with pytest.raises(OptionError, match=f"option {key!r} takes names such as"):
            Options.parse({key: bad})


def test_the_users_mapping_is_left_alone_and_options_are_frozen() -> None:
    given = {"patterns": ["attention"], "codegen": "eager"}
    options = Options.parse(given)
    assert given == {"patterns": ["attention"], "codegen": "eager"}
    assert hash(options) == hash(Options.parse(given))  # a key for what is compiled
    with pytest.raises(FrozenInstanceError):
        options.codegen = "inductor"  # type: ignore[misc]


def test_an_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)
