"""Every picture in docs/, in one command, on an idle machine.

    python -m benchmarks.pictures [--only gpt2 llama-7b] [--out docs] [--costs estimate] [--rounds 9]

gpt2-sweep.png (five plans measured) and gpt2-timeline.png are the package's own pictures; report-*.png are screenshots of HTML
reports, for which headless Chromium is needed (tests/support/browser.py). Prints what was made, and the load of the machine
before each model: a time that was measured beside other work is no result. `--costs estimate` makes drafts in a few minutes,
without measuring.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planner
from examples import gpt2, llama_7b, resnet50
from planner.report.picture import of_few_colors
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from tests.support.browser import chromium, open_report, screenshot

MOST_BYTES = 300_000
"""No picture in docs/ is larger."""


@dataclass(frozen=True)
class Subject:
    """A model that is drawn: how it is built, its budget, the options of `profile`, how many plans are measured."""

    build: Callable[[], Any]
    budget: float | str
    options: dict[str, Any]
    verify: int = 0
    pictures: bool = False


SUBJECTS = {
    "gpt2": Subject(gpt2.build, 0.6, {}, verify=5, pictures=True),
    "resnet50": Subject(resnet50.build, 0.65, {}, verify=3),
    "llama-7b": Subject(llama_7b.build, "79GiB", {"device": "H100-80GB", "optimizer": "adamw"}),
}


def made(subject: Subject, costs: str, rounds: int) -> tuple[Plan, Sweep]:
    """The plan for the subject's budget, and a sweep of its graph."""
    model, args, kwargs = subject.build()
    options = subject.options if "device" in subject.options else {"costs": costs}
    step = planner.profile(model, args, kwargs, **options)
    swept = step.sweep(points=20 if subject.pictures else 12)
    if subject.verify and costs == "measure":
        swept = swept.verify(subject.verify, rounds=rounds)
    return step.plan(subject.budget).plan, swept


def written(path: Path, content: bytes) -> None:
    """Write a picture; one that is too large is an error."""
    path.write_bytes(content)
    size = path.stat().st_size
    print(f"  {path}: {size} bytes", flush=True)
    assert size < MOST_BYTES, f"{path} has {size} bytes, more than {MOST_BYTES}"


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--costs", choices=("measure", "estimate"), default="measure")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps that are timed for a measured point (default 9)")
    arguments = parser.parse_args()
    with chromium() as driver, tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            subject, start = SUBJECTS[name], time.monotonic()
            print(f"{name}: load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores", flush=True)
            plan, swept = made(subject, arguments.costs, arguments.rounds)
            if subject.pictures:
                for what, drawn in (("sweep", swept), ("timeline", plan)):
                    path = arguments.out / f"{name}-{what}.png"
                    drawn.plot(path)
                    written(path, path.read_bytes())
            report = Path(folder) / f"{name}.html"
            plan.html(report, swept)
            open_report(driver, report)
            written(arguments.out / f"report-{name}.png", of_few_colors(screenshot(driver)))
            print(f"  {time.monotonic() - start:.0f} s; the report has {report.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
