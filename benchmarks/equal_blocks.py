"""Whether a capture that traces equal blocks once gives the graph of whole capture, node for node; for how many models.

    python -m benchmarks.equal_blocks [--corpus zoo field] [--only NAME ...] [--precision fp32] --out FILE.jsonl
    python -m benchmarks.equal_blocks --table FILE.jsonl

The field needs its packages, see benchmarks/field. Records are appended to FILE.jsonl, and its table is written beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner import PlannerError
from planner.tracer.capture import capture
from tests.support.joints import difference, units_off
from tests.support.zoo.check import MODELS, PRECISIONS, build

Built = tuple[nn.Module, Sequence[Any], Mapping[str, Any]]


def of_zoo() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Models of the zoo, by name."""
    for name in MODELS:
        yield name, lambda name=name: build(name)


def of_field() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Models of public packages, by name, with their first batch."""
    from benchmarks.field import stubs
    from benchmarks.field.case import load
    from benchmarks.field.models import HOMES

    stubs.install()

    def built(case: Any) -> Built:
        setup = case.build()
        return setup.model, setup.batches[0].args, setup.batches[0].kwargs

    for name, case in load(HOMES).items():
        yield name, lambda case=case: built(case)


def compare(make: Callable[[], Built], precision: str) -> dict[str, Any]:
    """The outcome for one model: "same" or "different" where blocks were traced once, "none" where none were, "refused".

    With the CPU seconds of the whole capture, and of the other one, which runs second.
    """
    found, seconds = [], []
    for whole in (True, False):
        model, args, kwargs = make()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            units_off() if whole else nullcontext(),
        ):
            begun = time.process_time()
            try:
                found.append(capture(model, args, kwargs))
            except PlannerError as error:
                return {"outcome": "refused", "reason": " ".join(str(error).split())[:200]}
            seconds.append(round(time.process_time() - begun, 2))
    whole_joint, once = found
    blocks = {kind: len(names) for kind, names in once.repeats.items()}
    if not blocks:
        return {"outcome": "none", "blocks": {}}
    reason = difference(whole_joint, once)
    return {"outcome": "different" if reason else "same", "blocks": blocks, "seconds": seconds, "reason": reason[:400]}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Counts by corpus and precision, then every difference and crash, then the models with equal blocks."""
    lines = ["| corpus | precision | blocks traced once, same graph | different | no equal blocks | refused | crashed |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for corpus, precision in sorted({(r["corpus"], r["precision"]) for r in records}):
        n = Counter(r["outcome"] for r in records if (r["corpus"], r["precision"]) == (corpus, precision))
        counts = (n[key] for key in ("same", "different", "none", "refused", "crashed"))
        lines.append(f"| {corpus} | {precision} | " + " | ".join(map(str, counts)) + " |")
    bad = [r for r in records if r["outcome"] in ("different", "crashed")]
    lines += ["", *(f"- {r['corpus']}/{r['name']} {r['precision']}: {r['outcome']}: {r['reason']}" for r in bad)]
    lines += ["", "| model | blocks | CPU s, whole, then with blocks traced once |", "| --- | --- | --- |"]
    for r in records:
        if r["outcome"] == "same" and r["precision"] == PRECISIONS[0]:
            blocks = ", ".join(f"{count} {kind}" for kind, count in r["blocks"].items())
            lines.append(f"| {r['name']} | {blocks} | {', '.join(map(str, r['seconds']))} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, the last one of each model and precision."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({(r["corpus"], r["name"], r["precision"]): r for r in map(json.loads, lines)}.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equal_blocks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    corpora = {"zoo": of_zoo, "field": of_field}
    parser.add_argument("--corpus", nargs="+", default=["zoo"], choices=corpora)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models, or the start of their names")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of the records that are there")
    arguments = parser.parse_args(argv)
    path = arguments.table or arguments.out
    if path is None:
        parser.error("give --out FILE.jsonl or --table FILE.jsonl")
    done = {(r["corpus"], r["name"], r["precision"]) for r in read(path)}
    for corpus in arguments.corpus if arguments.table is None else ():
        for name, make in corpora[corpus]():
            for precision in arguments.precision:
                if (corpus, name, precision) in done or not name.startswith(tuple(arguments.only) or ""):
                    continue
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        found = compare(make, precision)
                except Exception as error:
                    found = {"outcome": "crashed", "reason": f"{type(error).__name__}: {error}"[:300]}
                record = {"corpus": corpus, "name": name, "precision": precision, "torch": torch.__version__, **found}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    f"{corpus}/{name} {precision}: {found['outcome']} {found.get('blocks') or found.get('reason', '')}",
                    flush=True,
                )
                gc.collect()
    path.with_suffix(".md").write_text(table(read(path)), encoding="utf-8")


if __name__ == "__main__":
    main()
