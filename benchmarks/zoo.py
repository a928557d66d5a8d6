"""Plan, train and compare every model of the zoo; one JSON line each, and a Markdown table of all.

    python -m benchmarks.zoo --out benchmarks/results/zoo.jsonl [--models gpt2 unet]
    python -m benchmarks.zoo --table benchmarks/results/zoo.jsonl

The second form writes the table of records that are there.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from planner.units import format_bytes
from tests.support.zoo.check import MODELS, PRECISIONS, Outcome, check
from tests.support.zoo.hand_written import MODELS as HAND_WRITTEN


def table(outcomes: Iterable[Outcome]) -> str:
    """A row for each model, both precisions side by side, after a line of counts."""
    by_name: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.name, {})[outcome.precision] = outcome
    num_exact = sum(_all_exact(row.values()) for row in by_name.values())
    num_refused = sum(any(o.verdict == "refused" for o in row.values()) for row in by_name.values())
    lines = [
        f"{len(by_name)} architectures: {num_exact} exact and under budget, {num_refused} refused (they train as before), "
        f"{len(by_name) - num_exact - num_refused} else.",
        "",
        "| model | from | "
        + " | ".join(f"{precision}: outcome, plain -> peak (budget)" for precision in PRECISIONS)
        + " | why not |",
        "| --- | --- | " + "--- | " * (len(PRECISIONS) + 1),
    ]
    for name, row in by_name.items():
        origin = "hand-written" if name in HAND_WRITTEN else "transformers"
        cells = [_cell(row[precision]) if precision in row else "" for precision in PRECISIONS]
        reason = next((o.reason for o in row.values() if o.verdict == "refused"), "")
        reason = reason or next((o.reason for o in row.values() if o.verdict != "exact"), "")
        lines.append(f"| {name} | {origin} | {' | '.join(cells)} | {reason.replace('|', '/')[:200]} |")
    return "\n".join(lines) + "\n"


def _all_exact(outcomes: Iterable[Outcome]) -> bool:
    verdicts = [outcome.verdict for outcome in outcomes]
    return "exact" in verdicts and set(verdicts) <= {"exact", "no eager step"}


def _cell(outcome: Outcome) -> str:
    if outcome.verdict != "exact":
        return outcome.verdict
    plain, peak, budget = (format_bytes(n) for n in (outcome.plain_bytes, outcome.peak_bytes, outcome.budget_bytes))
    return f"exact, {plain} -> {peak} ({budget}), +{100 * outcome.overhead:.1f} %"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; appended")
    parser.add_argument("--table", type=Path, nargs="+", help="records to make the table of, written beside the first as .md")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    arguments = parser.parse_args(argv)
    if arguments.table:
        records = [json.loads(line) for path in arguments.table for line in path.read_text(encoding="utf-8").splitlines()]
        latest = {(r["name"], r["precision"]): Outcome(**{k: v for k, v in r.items() if k != "torch"}) for r in records}
        ordered = sorted(latest.values(), key=lambda o: list(MODELS).index(o.name))
        arguments.table[0].with_suffix(".md").write_text(table(ordered), encoding="utf-8")
        return
    torch.set_num_threads(1)
    for name in arguments.models:
        for precision in PRECISIONS:
            outcome = check(name, precision)
            print(f"{name} {precision}: {outcome.verdict} {outcome.reason[:160]}", flush=True)
            if arguments.out is not None:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(outcome), "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
