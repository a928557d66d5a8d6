"""Which models of the zoo have equal blocks that are captured once, whether the graph is that of whole capture, CPU seconds.

    python -m benchmarks.units --out benchmarks/results/units.jsonl [--seconds 240] [--models gpt2 llama]

Goes on where the file ends, and stops after so many seconds. `--table` prints what is in the file.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.errors import PlannerError
from planner.log import TRACER
from planner.tracer.capture import capture
from planner.tracer.joint import Joint
from tests.support.joints import difference, units_off
from tests.support.zoo.check import MODELS, PRECISIONS, build, cast


class _Heard(logging.Handler):
    """The lines that the tracer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def compared(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Capture a step with and without units; CPU seconds, units by kind, and where the graphs differ."""
    with units_off():
        one, one_s = _timed(model, args, kwargs)
    heard = _Heard()
    TRACER.addHandler(heard)
    try:
        other, other_s = _timed(model, args, kwargs)
    finally:
        TRACER.removeHandler(heard)
    found: dict[str, Any] = {"whole_s": round(one_s, 2), "units_s": round(other_s, 2), "log": heard.lines[:4]}
    if isinstance(one, str) or isinstance(other, str):
        return {
            **found,
            "verdict": "same error" if one == other else "other error",
            "error": [str(one)[:200], str(other)[:200]],
        }
    found["units"] = {kind: len(names) for kind, names in other.repeats.items()}
    return {**found, "verdict": "same" if not (differs := difference(one, other)) else "DIFFERENT", "difference": differs[:600]}


def _timed(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Joint | str, float]:
    begun = time.process_time()
    try:
        captured: Joint | str = capture(model, args, kwargs)
    except PlannerError as error:
        captured = f"{type(error).__name__}: {error}"
    return captured, time.process_time() - begun


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row a capture, after a line of counts."""
    used = [record for record in records if record.get("units")]
    wrong = [record for record in records if record["verdict"] in ("DIFFERENT", "other error")]
    lines = [
        f"{len(records)} captures: {len(used)} with equal blocks captured once, {len(wrong)} with another graph.",
        "",
        "| model | precision | verdict | CPU s, whole | with units | units | why not |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        units = ", ".join(f"{count} {kind}" for kind, count in record.get("units", {}).items())
        why = "" if units or not record["log"] else record["log"][0].partition(": ")[2]
        cells = (record["name"], record["precision"], record["verdict"], record["whole_s"], record["units_s"], units, why[:160])
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(argv)
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    TRACER.setLevel(logging.INFO)
    done = {json.loads(line)["name"] for line in options.out.read_text().splitlines()} if options.out.exists() else set()
    begun = time.monotonic()
    for i, name in enumerate(options.models):
        if name in done or time.monotonic() - begun > options.seconds:
            continue
        precision = PRECISIONS[i % len(PRECISIONS)]
        model, args, kwargs = build(name)
        with warnings.catch_warnings(), cast(precision):
            warnings.simplefilter("ignore")
            record = {"name": name, "precision": precision, **compared(model, args, kwargs)}
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(name, precision, record["verdict"], record.get("units", ""), record.get("difference", ""), flush=True)


if __name__ == "__main__":
    main()
