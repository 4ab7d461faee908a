"""Publish benchmarks: their figures as JSON, and the tables of docs/performance.md made from them, never typed.

    fedloom bench lora-step --size base --out runs/bench/lora-step-base.json
    python benchmarks/publish_bench.py runs/bench/*.json

Copies each file to benchmarks/results/bench and writes anew what stands between the two marks of docs/performance.md:
a table for each call, with its command, commit and machine. The prose around it stays. What `fedloom bench attention`
found on the base model becomes the table by which `auto` chooses ([backbone] attention).
"""

import argparse
import json
from pathlib import Path

from fedloom.bench.lines import HEAD, Measured

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "bench", ROOT / "docs" / "performance.md"
ATTENTION = ROOT / "src" / "fedloom" / "assets" / "attention.json"
LEAST = 0.95  # of the time of sdpa: what is nearer is noise
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="what `fedloom bench --out` wrote")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for path in parser.parse_args().files:
        (RESULTS / path.name).write_text(Measured.of(path.read_text("utf-8")).json(), "utf-8")
    text = PAGE.read_text("utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    tables = [_table(Measured.of(path.read_text("utf-8"))) for path in sorted(RESULTS.glob("*.json"))]
    ATTENTION.write_text(json.dumps(quicker(RESULTS / "attention-base.json"), indent=1) + "\n")
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}", "utf-8")


def quicker(path: Path) -> dict[str, str]:
    """By dtype, the attention whose step took less; where eager gains hardly anything sdpa, which takes less memory."""
    lines = Measured.of(path.read_text("utf-8")).lines
    return {line.what.split(", ")[-3]: "eager" if line.peer < LEAST * line.own else "sdpa" for line in lines}


def _table(measured: Measured) -> str:
    """The lines of one call in Markdown, and what made them."""
    rows = [list(HEAD), ["---"] * len(HEAD), *(line.row() for line in measured.lines)]
    made = measured.lineage
    lineage = f"`{measured.command}`, commit {made['commit'][:10]}, {made['machine']}, {made['versions']}."
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", lineage, *measured.left_out])


if __name__ == "__main__":
    main()
