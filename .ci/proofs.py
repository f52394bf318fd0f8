"""Add what `prove --json` printed to the results and to the table in ARCHITECTURE.md: proofs.py PROOFS.json ..."""

import json
import re
import sys
from pathlib import Path

from sm12x_compile.proof_table import summary
from sm12x_compile.prove import Proof

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks/results/proofs.json", ROOT / "ARCHITECTURE.md"
MARKS = ("<!-- proofs -->\n", "<!-- /proofs -->\n")


def table(known: dict[str, list[dict[str, object]]]) -> str:
    """A line for a kernel on a card with a release."""
    lines = ["| Triton | kernel | target | launches | compiled | registers | shared memory, B | spilling | verdict |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for release, rows in known.items():
        for row in rows:
            verdict = f"{row['violations']} violations" if row["violations"] else "holds"
            cells = (release, row["kernel"], row["target"], row["launches"], row["compiled"], row["registers"],
                     row["shared_bytes"], row["spilling"], verdict)  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for path in sys.argv[1:]:
        proofs = [Proof(**proof) for proof in json.loads(Path(path).read_text())]
        known[proofs[0].triton] = summary(proofs)
    known = dict(sorted(known.items()))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    begin, end = map(re.escape, MARKS)
    text = re.sub(f"({begin}).*({end})", lambda m: m[1] + table(known) + m[2], DOCUMENT.read_text(), flags=re.DOTALL)
    DOCUMENT.write_text(text)
    for release, rows in known.items():
        print(f"Triton {release}: {sum(r['compiled'] for r in rows)} configurations, "
              f"{sum(r['violations'] for r in rows)} violations")  # fmt: skip


if __name__ == "__main__":
    main()
