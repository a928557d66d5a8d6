"""Run a list of small jobs in a forked child, so that the parent's heap stays as it was (see child.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import first_line
from planner.profiler.child import Child
from planner.profiler.profile import KernelCost


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that has no result, and why: "MemoryError: ...", "its process was killed by signal 11"."""

    reason: str


_MAX_DEATHS = 8
"""Number of children that may die before the remaining jobs fail."""


def run_forked(
    jobs: Sequence[Callable[[], Any]],
    patience_s: Sequence[float],
    encode: Callable[[Any], Any] = KernelCost.to_row,
    decode: Callable[[Any], Any] = KernelCost.of_row,
) -> Iterator[tuple[int, Any]]:
    """Run every job in a child process, in order; yield (index, result), or (index, Failed) for a job that failed.

    Results travel as JSON: `encode` makes JSON data of one, `decode` the reverse. By default they are KernelCosts.

    A job that raises fails alone. One that kills its child fails, and a new child runs the following ones. One that takes
    longer than its `patience_s` fails, and so does the rest: most likely forking is not safe here.
    """
    start, deaths = 0, 0
    while start < len(jobs):
        rest = jobs[start:]
        child = Child(lambda rest=rest: (_answer(job, encode) for job in rest))  # type: ignore[misc]
        try:
            for index in range(start, len(jobs)):
                answer = child.read(patience_s[index])
                if answer is None:
                    break
                start = index + 1
                is_done, row = json.loads(answer)
                yield index, decode(row) if is_done else Failed(row)
        finally:
            child.end()
        if start < len(jobs):
            deaths += 1
            yield start, Failed(f"its process {child.fate}")
            start += 1
            if child.hung or deaths >= _MAX_DEATHS:
                reason = "one before it did not answer" if child.hung else f"{deaths} processes ended before it"
                yield from ((index, Failed(f"not run: {reason}")) for index in range(start, len(jobs)))
                return


def _answer(job: Callable[[], Any], encode: Callable[[Any], Any]) -> Any:
    try:
        return [True, encode(job())]
    except Exception as error:
        return [False, first_line(error)]
