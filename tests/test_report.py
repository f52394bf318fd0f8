"""The report: counting, JSON, and a table that folds the layers that repeat."""

from __future__ import annotations

import json
from dataclasses import fields
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sm12x_compile.report import Floor, Report, Site

FIELDS = [
    "sites", "captures", "code_rewrites", "graphs", "graph_breaks", "recompiles", "syncs", "cuda_graphs",
    "weights", "races", "verified", "warnings", "planned", "arch", "seconds",
]  # fmt: skip


def site(layer: int = 0, **kwargs: Any) -> Site:
    given: dict[str, Any] = dict(
        pattern="attention", op="sm12x::attention", module=f"model.layers.{layer}.self_attn",
        source="llama.py:250", tags={"mask": "causal", "groups": 4}, kernel="torch.sdpa",
    )  # fmt: skip
    return Site(**given | kwargs)


def near_miss(layer: int = 0, **kwargs: Any) -> Site:
    reason = "the scores are read elsewhere"
    return site(layer, op=None, status="near-miss", kernel=None, reason=reason, **kwargs)


def rows(report: Report) -> list[list[str]]:
    """The cells of the printed table, continued lines joined."""
    out: list[list[str]] = []
    for line in str(report).splitlines():
        if line.startswith("│"):
            cells = [c.strip() for c in line.strip("│").split("│")]
            if cells[1]:
                out.append(cells)
            else:
                out[-1] = [f"{a} {b}".strip() for a, b in zip(out[-1], cells, strict=True)]
    return out


def test_the_fields_of_the_contract() -> None:
    assert [f.name for f in fields(Report)] == FIELDS
    assert [f.name for f in fields(Site)] == [
        "pattern", "op", "module", "source", "tags", "kernel", "refused", "status", "floor", "reason",
        "graph",
    ]  # fmt: skip


def test_counting() -> None:
    report = Report([site(0), site(1), near_miss(2), site(3, status="left"), site(4, pattern="mla")])
    assert [s.module for s in report.rewritten] == [f"model.layers.{n}.self_attn" for n in (0, 1, 4)]
    assert [s.module for s in report.near_misses] == ["model.layers.2.self_attn"]
    assert (report.count("attention"), report.count("mla"), report.count("moe")) == (2, 1, 0)


def test_seconds_add_up_and_warnings_are_said_once() -> None:
    report = Report()
    report.add_seconds("match", 1.5)
    report.add_seconds("match", 0.5)
    report.add_seconds("lower", 1.0)
    assert report.seconds == {"match": 2.0, "lower": 1.0}
    for message in ("a", "b", "a"):
        report.warn(message)
    assert report.warnings == ["a", "b"]


def test_reports_share_nothing() -> None:
    first, second = Report(), Report()
    first.warn("x")
    first.sites.append(site())
    first.sites[0].tags["new"] = 1
    assert second == Report() and site().tags == {"mask": "causal", "groups": 4}


def full() -> Report:
    return Report(
        sites=[site(floor=Floor(1e6, 2e6, 12.34), refused=[("triton", "needs CUDA")]), near_miss(1, graph=1)],
        captures=["chunk_gated_delta_rule"],
        code_rewrites=["moe.py:3"],
        graphs=2,
        graph_breaks=["print at a.py:1"],
        recompiles=["L['x'].size()[0] == 7"],
        syncs=["aten::item"],
        cuda_graphs=[(True, None), (False, "cuda_graphs=False")],
        weights=[{"name": "w", "format": "mxfp4", "before": 4, "after": 1}],
        races=[{"op": "attention", "winner": "triton", "why": "no race: it rained"}],
        warnings=["no gradients"],
        planned=True,
        arch="gb10",
        seconds={"match": 0.25},
    )


def test_json_round_trip() -> None:
    report = full()
    back = json.loads(report.to_json())
    assert list(back) == [*FIELDS, "cuda_graph"]
    assert back.pop("cuda_graph") == [False, "cuda_graphs=False"]
    assert {**back, "cuda_graph": [False, "cuda_graphs=False"]} == json.loads(json.dumps(report.to_dict()))
    sites = [
        Site(**s | {"refused": [tuple(r) for r in s["refused"]], "floor": s["floor"] and Floor(**s["floor"])})
        for s in back["sites"]
    ]
    assert Report(**back | {"sites": sites, "cuda_graphs": [*map(tuple, back["cuda_graphs"])]}) == report
    assert "\n" not in report.to_json(indent=None)


def test_json_of_tags_that_json_does_not_know() -> None:
    import sympy

    text = Report([site(tags={"scale": sympy.Rational(1, 8), "kinds": {1}})]).to_json()
    assert json.loads(text)["sites"][0]["tags"] == {"scale": "1/8", "kinds": "{1}"}


def test_the_table_folds_equal_layers() -> None:
    report = Report([site(n) for n in range(30)] + [site(30, tags={"mask": "window"}), near_miss(31)])
    table = rows(report)
    assert [r[:4] for r in table] == [
        [
            "model.layers.0.self_attn (and 29 more like it)",
            "rewritten",
            "attention[mask=causal, groups=4]",
            "torch.sdpa",
        ],
        ["model.layers.30.self_attn", "rewritten", "attention[mask=window]", "torch.sdpa"],
        ["model.layers.31.self_attn", "near-miss", "attention[mask=causal, groups=4]", "-"],
    ]
    assert table[2][4] == "the scores are read elsewhere at llama.py:250"


@pytest.mark.parametrize(
    "difference",
    [
        dict(tags={"mask": "none"}), dict(kernel="aten"), dict(status="left"),
        dict(refused=[("triton", "no")]), dict(reason="other"), dict(graph=1), dict(pattern="mla"),
    ],
)  # fmt: skip
def test_layers_that_differ_are_not_folded(difference: dict[str, Any]) -> None:
    assert len(rows(Report([site(0), site(1, **difference)]))) == 2


def test_what_the_table_says() -> None:
    text = str(full())
    title, cells = text.splitlines()[0], rows(full())
    assert title.strip() == "sm12x: 1 of 2 sites rewritten, 2 graph(s), 1 break(s), planned for gb10"
    assert cells[0][4:] == ["triton: needs CUDA", "12.3 us"]
    for line in (
        "graph break: print at a.py:1", "recompile: L['x'].size()[0] == 7", "host sync: aten::item",
        "captured: chunk_gated_delta_rule", "code rewritten: moe.py:3", "warning: no gradients",
        "CUDA graph (graph 0): yes", "CUDA graph (graph 1): no, cuda_graphs=False",
    ):  # fmt: skip
        assert line in text.splitlines()
    here = str(Report(arch="h200", cuda_graphs=[(True, None), (True, None)]))
    assert here.splitlines()[0].strip().endswith("on h200")
    assert "CUDA graph: yes" in here.splitlines()
    assert "CUDA graph" not in str(Report())


def test_whether_all_of_it_is_recorded() -> None:
    """The first reason not stands for the whole; a note on a recording is kept."""
    assert Report().cuda_graph == (False, None)
    assert Report(cuda_graphs=[(True, None), (True, None)]).cuda_graph == (True, None)
    assert Report(cuda_graphs=[(True, None), (True, "2 CUDA graphs")]).cuda_graph == (True, "2 CUDA graphs")
    assert Report(cuda_graphs=[(True, "note"), (False, "one"), (False, "two")]).cuda_graph == (False, "one")


def test_a_site_without_a_module_shows_its_source() -> None:
    assert rows(Report([site(module="")]))[0][0] == "llama.py:250"
    assert rows(Report([site(module="", source="")]))[0][0] == "-"


def test_brackets_are_not_taken_for_markup() -> None:
    out = StringIO()
    report = Report([site(tags={"bold": "red"}, refused=[("triton", "[bold]no[/bold]")])])
    Console(file=out, width=150).print(report.table())  # a user's console interprets markup
    assert "attention[bold=red]" in out.getvalue() and "[bold]no[/bold]" in out.getvalue()
