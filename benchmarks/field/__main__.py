"""The command line: run, go on, print.

    python -m benchmarks.field [--only NAME ...] [--precision fp32] [--again] [--out FILE.jsonl]
    python -m benchmarks.field --table [--out FILE.jsonl]

Records are appended to FILE.jsonl, and the table is written beside it as .md.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from benchmarks.field.case import PRECISIONS, Case, load
from benchmarks.field.models import HOMES
from benchmarks.field.outcome import Outcome
from benchmarks.field.runner import TIME_LIMIT_S, append, read, run
from benchmarks.field.table import table

RESULTS = Path(__file__).parent.parent / "results"


def selected(cases: dict[str, Case], only: Sequence[str]) -> dict[str, Case]:
    """Cases whose name, or package, is one of these, or starts with one."""
    if not only:
        return cases
    return {name: case for name, case in cases.items() if any(name.startswith(start) for start in only)}


def write_table(path: Path, cases: dict[str, Case]) -> str:
    """The table of the records in a file, written beside it; in the order of the cases."""
    order = {name: i for i, name in enumerate(cases)}
    outcomes = sorted((o for o in read(path).values() if o.case in order), key=lambda o: order[o.case])
    date = path.stem.removeprefix("field-")
    text = table(outcomes, date, "python -m benchmarks.field")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Run the command line; returns what was run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.field", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="packages, models, or the start of a name")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--again", action="store_true", help="run what has a record, too")
    today = RESULTS / f"field-{datetime.date.today()}.jsonl"
    parser.add_argument("--out", type=Path, default=today, help="JSON lines; by default, today's in benchmarks/results")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help="seconds for one row")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--table", action="store_true", help="write and print the table of the records that are there")
    arguments = parser.parse_args(argv)
    every = load(HOMES)
    cases = selected(every, arguments.only)
    if not cases:
        parser.error(f"no model is called {' or '.join(arguments.only)}; --list prints the names")
    if arguments.list:
        print("\n".join(cases))
        return []
    if arguments.table:
        print(write_table(arguments.out, every))
        return []
    done = {key for key, outcome in read(arguments.out).items() if outcome.outcome != "broken" and not arguments.again}
    rows = [(case, p) for case in cases.values() for p in case.precisions if p in arguments.precision]
    outcomes = []
    for outcome in run([(case, p) for case, p in rows if (case.name, p) not in done], arguments.time_limit):
        outcomes.append(outcome)
        append(arguments.out, outcome)
        print(f"{outcome.case} {outcome.precision}: {outcome.outcome} {outcome.reason[:200]}", flush=True)
    write_table(arguments.out, every)
    return outcomes


if __name__ == "__main__":
    main()
