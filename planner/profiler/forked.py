"""Run a list of small jobs in a forked child, so that the parent's heap stays as it was (see child.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from planner.profiler.child import Child
from planner.profiler.profile import KernelCost

_MAX_DEATHS = 8
"""Children that may die before the rest of the jobs is given up."""


def run_forked(
    jobs: Sequence[Callable[[], KernelCost]], patience_s: Sequence[float]
) -> Iterator[tuple[int, KernelCost | None]]:
    """Run every job in a child process, in order; yield (index, result), or (index, None) for a job that failed.

    A job that raises fails alone. One that kills its child fails, and a new child goes on behind it. One that takes
    longer than its `patience_s` fails and takes the rest with it: most likely forking is not safe here.
    """
    start, deaths = 0, 0
    while start < len(jobs):
        rest = jobs[start:]
        child = Child(lambda rest=rest: map(_answer, rest))  # type: ignore[misc]
        try:
            for index in range(start, len(jobs)):
                answer = child.read(patience_s[index])
                if answer is None:
                    break
                start = index + 1
                yield index, _decode(answer)
        finally:
            child.end()
        if start < len(jobs):
            deaths += 1
            lost = len(jobs) if child.hung or deaths >= _MAX_DEATHS else start + 1
            yield from ((index, None) for index in range(start, lost))
            start = lost


def _answer(job: Callable[[], KernelCost]) -> list[int] | None:
    try:
        cost = job()
    except Exception:
        return None
    return [cost.time_ns, cost.workspace_bytes, *cost.hidden_bytes]


def _decode(line: bytes) -> KernelCost | None:
    answer = json.loads(line)
    return KernelCost(answer[0], answer[1], tuple(answer[2:])) if answer else None
