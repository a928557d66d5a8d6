"""Each row in a process of its own, with a time limit: a crash or a hang costs one row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.field.case import Case
from benchmarks.field.outcome import Outcome

TIME_LIMIT_S = 240.0
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}
_EAGER_STAGES = ("", "eager")


def run(rows: Iterable[tuple[Case, str]], time_limit_s: float = TIME_LIMIT_S) -> Iterator[Outcome]:
    """Outcomes of (case, precision), one after the other; rows of one package share what it takes to import it."""
    server: Server | None = None
    try:
        for case, precision in rows:
            if server is None or server.serves != (case.home, case.requirement):
                if server is not None:
                    server.close()
                server = Server(case)
            yield server.outcome(case, precision, time_limit_s)
            if server.ended:
                server = None
    finally:
        if server is not None:
            server.close()


class Server:
    """A `server.py` at work for one package."""

    def __init__(self, case: Case) -> None:
        self.serves, self.ended = (case.home, case.requirement), False
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.field.server", case.home],
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def outcome(self, case: Case, precision: str, time_limit_s: float) -> Outcome:
        """The outcome of a row; what became of its process, where it wrote none."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records.jsonl"
            how = self._ask({"case": case.name, "precision": precision, "path": str(path), "time_limit_s": time_limit_s})
            records = _records(path)
            if records and "outcome" in records[-1]:
                return Outcome(**records[-1])
            stage = records[-1]["stage"] if records else ""
            outcome = "broken" if stage in _EAGER_STAGES else "crashed"
            reason = f"{how}, while {stage or 'starting'}. {_last_words(Path(f'{path}.stderr'))}".strip()
            return Outcome(case.name, precision, outcome, reason, seconds=time.perf_counter() - start)

    def close(self) -> None:
        """No more rows."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:  # importing or building the model ended the process
            self.ended = True
            self.close()
        return answer or f"the package's process ended with code {self._process.returncode}"


def _last_words(path: Path) -> str:
    """The lines of a file that say where a process was when it ended."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    frames = [line.strip() for line in lines if line.strip().startswith("File ")]
    return " ".join(frames[:2] or lines[-1:])


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """Outcomes in a file of records by (case, precision); the last of each counts."""
    return {(record["case"], record["precision"]): Outcome(**record) for record in _records(path)}


def append(path: Path, outcome: Outcome) -> None:
    """Write one record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")
