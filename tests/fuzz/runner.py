"""Running cases: one with its outcome checked, a failing one made smaller, many in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tests.fuzz.generate import Case, case_of
from tests.support.harness import Different, Outcome, outcome
from tests.support.itself import by_units

LIMIT_S = 60
CHUNK = 200


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case: an Outcome's verdict, or a Different's kind; `features` are those of the smallest failing case."""

    seed: int
    verdict: str
    failed: bool = False
    detail: str = ""
    features: tuple[str, ...] = ()
    first_planned: bool = False
    benign: bool = False


def run_case(case: Case, *, in_units: bool = False) -> Outcome:
    """Train it both ways.

    Args:
        in_units: plan every unit of the model on its own (`plan_units`), instead of the whole model.

    Raises:
        Different: the outcome is not allowed; or a case made of what a plan must hold was refused, or ran unplanned.
    """
    program = case.program()
    if in_units:
        return outcome(program, budget=case.budget, make=by_units)
    found = outcome(program, budget=case.budget, measure=case.measured)
    if case.benign and (found.verdict != "same" or not all(found.planned)):
        reason = found.messages[0] if found.messages else f"planned: {found.planned}"
        if "more than the budget" in reason:  # a gradient in another layout may need a copy, which the budget has no room for
            return found
        raise Different("not planned", f"all of it is supported, and it was: {found.verdict}, {reason[:200]}", program)
    return found


def smallest(case: Case, error: Different, *, in_units: bool = False) -> tuple[Case, Different]:
    """Leave out piece after piece while the same kind of failure stays."""
    progress = True
    while progress:
        progress = False
        for smaller in case.smaller():
            try:
                run_case(smaller, in_units=in_units)
            except Different as again:
                if again.kind == error.kind:
                    case, error, progress = smaller, again, True
                    break
            except Exception:  # what is left is no program any more
                continue
    return case, error


def result_of(seed: int, *, shrink: bool = False, in_units: bool = False) -> Result:
    """Run the case of a seed."""
    case = case_of(seed)

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_S)
    try:
        found = run_case(case, in_units=in_units)
        planned = bool(found.planned) and found.planned[0]
        return Result(seed, found.verdict, False, "; ".join(found.messages)[:200], tuple(case.features), planned, case.benign)
    except Different as error:
        if shrink:
            signal.alarm(LIMIT_S * 5)
            case, error = smallest(case, error, in_units=in_units)
        return Result(seed, error.kind, True, error.detail[:400], tuple(case.features), benign=case.benign)
    except Exception as error:
        return Result(seed, "the test itself", True, f"{type(error).__name__}: {error}"[:400], tuple(case.features))
    finally:
        signal.alarm(0)


def run_many(first: int, count: int, *, shrink: bool = False, in_units: bool = False) -> Iterator[Result]:
    """Results of consecutive seeds. Each process runs a few; one that dies is a result, too."""
    last = first + count
    while first < last:
        size = min(CHUNK, last - first)
        command = [sys.executable, "-m", "tests.fuzz", "--lines", "--start", str(first), "--cases", str(size)]
        child = subprocess.Popen(
            [*command, *["--shrink"] * shrink, *["--units"] * in_units],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        done = 0
        for line in child.stdout or ():
            if line.startswith('{"seed"'):
                read = json.loads(line)
                yield Result(**{**read, "features": tuple(read["features"])})
                done += 1
        code = child.wait()
        if done < size:
            yield Result(first + done, "process died", True, f"exit code {code}", tuple(case_of(first + done).features))
            done += 1
        first += done


def print_lines(seeds: Iterable[int], *, shrink: bool, in_units: bool = False) -> None:
    """One line of JSON per case, for `run_many`."""
    for seed in seeds:
        print(json.dumps(asdict(result_of(seed, shrink=shrink, in_units=in_units))), flush=True)


def summary(results: list[Result]) -> str:
    """Counts per outcome and per feature, and failures by their features."""
    outcomes = Counter(result.verdict for result in results)
    failed = [result for result in results if result.failed]
    benign = [result for result in results if result.benign]
    lines = [
        f"{len(results)} cases: " + ", ".join(f"{number} {name}" for name, number in outcomes.most_common()),
        f"the first step ran planned in {sum(r.first_planned for r in results)}; {len(benign)} were of supported features",
        "",
        "feature: cases, failed, refused",
    ]
    every = Counter(name for result in results for name in {*result.features})
    bad = Counter(name for result in failed for name in {*result.features})
    refused = Counter(name for result in results if result.verdict == "refused" for name in {*result.features})
    lines += [f"  {name}: {number}, {bad[name]}, {refused[name]}" for name, number in sorted(every.items())]
    lines += ["", f"{len(failed)} failed:"]
    lines += [f"  seed {r.seed}: {r.verdict}: {' + '.join(r.features)}\n      {r.detail}" for r in sorted(failed, key=_group)]
    return "\n".join(lines)


def _group(result: Result) -> tuple[str, tuple[str, ...]]:
    return result.verdict, result.features
