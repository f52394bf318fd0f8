"""The command line: ``python -m sm12x_compile demo | explain | doctor | bench | prove``, or ``sm12x-compile ...``.

Exit codes: 0 fine; 1 something disagrees or is broken; 2 the command cannot be carried out as it was given.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from .model_zoo import FAMILIES, ZooError, workload
from .options import OptionError, Options

app = typer.Typer(
    name="sm12x-compile",
    help='torch.compile(model, backend="sm12x"): look at what it does to a model.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Codegen(str, Enum):
    eager = "eager"
    inductor = "inductor"


class PhaseName(str, Enum):
    prefill = "prefill"
    decode = "decode"
    static = "static"


class Attention(str, Enum):
    eager = "eager"
    sdpa = "sdpa"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CodegenOption = Annotated[Codegen, typer.Option(help="Inductor, or eager: interpreted, quick to compile.")]
ArchOption = Annotated[str, typer.Option(help="Card to plan for, e.g. rtx5090; auto is the device at hand.")]


class TargetError(RuntimeError):
    """What `explain` was asked to look at cannot be had; the message says why."""


def _fail(message: object) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Half of the models.")] = False,
    codegen: Annotated[Codegen | None, typer.Option(help="Inductor (default, if there is a C++ compiler or a "
                                                         "GPU), or eager: interpreted, quick to compile.")] = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Compile several models on this machine and compare each with its own eager run.

    Needs no GPU and downloads nothing. Exits with 1 if any model disagrees with its eager run.
    """
    from . import demo as the_demo
    from .doctor import check_compiler

    if codegen is None:
        codegen = Codegen.eager if check_compiler().level == "broken" else Codegen.inductor

    progress = Console(stderr=True)
    try:
        rows, missing = the_demo.run(quick=quick, codegen=codegen.value, console=progress)
    except ZooError as error:
        raise _fail(error) from None
    wrong = [row for row in rows if not row.agrees]
    if as_json:
        print(json.dumps({"rows": [the_demo.to_dict(r) for r in rows], "missing": missing}, indent=2))
    else:
        out = _console()
        out.print(the_demo.table(rows, codegen.value))
        for row in rows:
            if row.note:
                out.print(f"{row.model}, {row.phase}: {row.note}", markup=False, highlight=False)
        for sentence in missing:
            out.print(sentence, markup=False, highlight=False)
        rewritten, sites = sum(row.rewritten for row in rows), sum(row.sites for row in rows)
        agreeing = len(rows) - len(wrong)
        out.print(f"{rewritten} of {sites} sites rewritten; {agreeing} of {len(rows)} runs agree with eager.")
        out.print("The models are tiny: the times show that nothing breaks, not how fast a kernel is.")
    if wrong:
        raise typer.Exit(1)


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help=f"One of {', '.join(FAMILIES)}; or module:function, which "
                                               "returns (model, inputs).")],
    phase: Annotated[PhaseName, typer.Option(help="prefill: the prompt, no cache; decode: one token, "
                                                  "DynamicCache; static: one token, StaticCache.")
                     ] = PhaseName.prefill,
    attn: Annotated[Attention | None, typer.Option(help="Attention implementation of transformers.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 2,
    seq: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 16,
    precision: Annotated[Precision, typer.Option(help="Dtype of the weights.")] = Precision.fp32,
    arch: ArchOption = "auto",
    codegen: CodegenOption = Codegen.eager,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Compile one model and print what was rewritten, what nearly was and why not, and which kernel runs it.

    A Hugging Face name is built from its config: tiny, with random weights. `module:function` is imported
    from the current folder or the installed packages.
    """
    from . import explain as explain_model

    options = {"arch": arch, "codegen": codegen.value}
    try:
        Options.parse(options)
        if ":" in target:
            model, args, kwargs = load_target(target)
        else:
            job = workload(target, phase.value, attn=attn and attn.value, layers=layers, seq=seq,
                           dtype=_DTYPES[precision])  # fmt: skip
            model, args, kwargs = job.model, (), job.one_call()
        report = explain_model(model, *args, options=options, **kwargs)
    except (ZooError, TargetError, OptionError) as error:
        raise _fail(error) from None
    print(report.to_json() if as_json else report, end="\n" if as_json else "")


@app.command()
def doctor(arch: ArchOption = "auto", as_json: JsonFlag = False) -> None:
    """Look at this machine: versions, what is missing and how to install it, which kernels would run.

    Exits with 1 if something that is needed is missing or broken.
    """
    from . import doctor as the_doctor

    try:
        found, ops = the_doctor.checks(arch), the_doctor.choices(arch)
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        print(json.dumps(the_doctor.to_dict(found, ops), indent=2))
    else:
        _console().print(the_doctor.render(found, ops))
    if not the_doctor.healthy(found):
        raise typer.Exit(1)


@app.command()
def prove(
    arch: Annotated[list[str] | None, typer.Option(help="Card or family; may be given several times. "
                                                        "Default: sm120 and sm121.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; may be given several times.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many configurations, the same each time.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: as many as cores.")] = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Compile every Triton kernel in every configuration that a card would get, with no such card at hand.

    Reads back registers, spills, shared memory and matrix instructions. Exits with 1 on any violation.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import prove as the_proof
    from .proof_table import render

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("proving", total=None)
            proofs = the_proof.prove(
                arch or ("sm120", "sm121"), kernel or (), sample, jobs,
                lambda done, total, proof: bar.update(task, completed=done, total=total, description=proof.kernel),
            )  # fmt: skip
    except the_proof.ProofError as error:
        raise _fail(error) from None
    if as_json:
        print(json.dumps([asdict(proof) for proof in proofs], indent=2))
    else:
        _console().print(render(proofs))
    if any(proof.violations for proof in proofs):
        raise typer.Exit(1)


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Race every kernel that takes a sample call on this device: right or wrong, its time, and the least possible.

    Exits with 1 if a kernel gives wrong numbers or does not run.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from . import bench as the_bench
    from .arch import resolve

    arch, _ = resolve("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("racing", total=None)
            rows = the_bench.bench(
                op or (), progress=lambda done, total, what: bar.update(
                    task, completed=done, total=total, description=what),
            )  # fmt: skip
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        print(json.dumps(the_bench.to_dict(rows, arch), indent=1))
    else:
        _console().print(the_bench.render(rows, arch))
    if any(row.status == "out" for row in rows):
        raise typer.Exit(1)


def load_target(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model and inputs that ``module:function`` returns, as (model, args, kwargs).

    Raises:
        TargetError: the module cannot be imported, has no such function, the function fails, or it returns
            something other than (model, inputs) with inputs a tensor, a tuple or a dict.
    """
    module_name, _, function_name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise TargetError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        has = ", ".join(names) or "none"
        raise TargetError(f"{module_name} has no function {function_name!r}; it has: {has}")
    try:
        returned = function()
    except Exception as error:
        raise TargetError(f"{target} failed: {type(error).__name__}: {error}") from error
    if not (isinstance(returned, tuple) and len(returned) == 2 and callable(returned[0])):
        raise TargetError(f"{target} must return (model, inputs), but returned {_describe(returned)}")
    model, inputs = returned
    if isinstance(inputs, Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, dict):
        return model, (), inputs
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    raise TargetError(f"{target}: inputs must be a tensor, a tuple or a dict, not {_describe(inputs)}")


def _describe(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: ({', '.join(type(v).__name__ for v in value)})"
    return f"a {type(value).__name__}"


def _console() -> Console:
    # A pipe has no width; 80 columns would fold the tables beyond reading.
    return Console() if sys.stdout.isatty() else Console(width=160)


def main() -> None:
    """Entry point of ``sm12x-compile`` and ``python -m sm12x_compile``."""
    app()


if __name__ == "__main__":
    main()
