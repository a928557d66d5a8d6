"""A process that imports one package once, and forks for each row: python -m benchmarks.field.server MODULE.

It reads requests, one JSON object a line: case, precision, path, time_limit_s. The forked process appends to the file at `path`
what it is doing and at last its record; this one answers, in a line, how that process ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.field import stubs
from benchmarks.field.case import Case, load
from benchmarks.field.check import check, failure
from benchmarks.field.outcome import Outcome

POLL_S = 0.02


def serve(home: str) -> None:
    """Answer until the requests end."""
    answers = os.fdopen(os.dup(1), "w")  # what models print goes elsewhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    stubs.install()
    cases, built = load((home,)), set[str]()
    for line in sys.stdin:
        request = json.loads(line)
        case = cases[request["case"]]
        if case.name not in built:
            built.add(case.name)
            with contextlib.suppress(Exception):  # the forked process meets it again, and reports it
                case.build()
        answer(answers, _forked(case, request))


def answer(answers: TextIO, text: str) -> None:
    """One line, at once."""
    answers.write(text + "\n")
    answers.flush()


def _forked(case: Case, request: dict[str, Any]) -> str:
    """Run a row in a forked process; how that ended."""
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            _work(case, request["precision"], request["path"])
        finally:
            os._exit(0)
    end = time.monotonic() + request["time_limit_s"]
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return f"the process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
            time.sleep(POLL_S)
        return f"no end within {request['time_limit_s']:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what it started
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _work(case: Case, precision: str, path: str) -> None:
    """Append what is being done, and at last the record, to the file."""

    def stage(doing: str) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": doing}) + "\n")

    errors = os.open(f"{path}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    faulthandler.enable()
    try:
        outcome = check(case, precision, stage)
    except Exception as error:  # the case's own: its package is missing, its builder fails
        outcome = Outcome(case.name, precision, "broken", failure(error), torch=torch.__version__)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
