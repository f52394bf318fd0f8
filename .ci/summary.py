"""Add one test run to a summary: python .ci/summary.py REPORT.xml SUMMARY.json NAME, where the run took place."""

import json
import pathlib
import sys
import xml.etree.ElementTree as tree

import torch
import transformers

report, summary, name = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
known = json.loads(summary.read_text()) if summary.exists() else {}
suite = tree.parse(report).getroot().find("testsuite")
counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
known[name] = {
    "date": suite.get("timestamp", "")[:10],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    **counts,
    "seconds": round(float(suite.get("time"))),
    "failed": [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ],
}
summary.parent.mkdir(parents=True, exist_ok=True)
summary.write_text(json.dumps(known, indent=2) + "\n")
print(f"{name}: {counts}")
