"""Run a list of small jobs in a forked child, so that the parent's heap stays as it was.

Why fork and not spawn: a spawned interpreter imports torch again (2-4 s, more than most profiles take) and cannot
see functions defined in the user's script. Why a new thread in the child: OpenMP worker threads do not survive a
fork, and libgomp waits for them forever, set_num_threads or not (tried: 1 thread runs, 2 hang). Its pools belong to
the thread that opened them, so a thread born after the fork opens its own; LLVM's runtime resets itself on fork.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TextIO

import torch

from planner.profiler.profile import KernelCost

_MAX_DEATHS = 8
"""Children that may die before the rest of the jobs is given up."""


def _row_of_cost(cost: KernelCost) -> Any:
    return [cost.time_ns, cost.workspace_bytes, *cost.hidden_bytes]


def _cost_of_row(row: Any) -> KernelCost:
    return KernelCost(row[0], row[1], tuple(row[2:]))


def run_forked(
    jobs: Sequence[Callable[[], Any]],
    patience_s: Sequence[float],
    encode: Callable[[Any], Any] = _row_of_cost,
    decode: Callable[[Any], Any] = _cost_of_row,
) -> Iterator[tuple[int, Any]]:
    """Run every job in a child process, in order; yield (index, result), or (index, None) for a job that failed.

    Results travel as JSON: `encode` makes something of them that JSON holds, `decode` makes them of it. By default KernelCosts.

    A job that raises fails alone. One that kills its child fails, and a new child goes on behind it. One that takes
    longer than its `patience_s` fails and takes the rest with it: most likely forking is not safe here.
    """
    start, deaths = 0, 0
    while start < len(jobs):
        child = _Child(jobs, start, encode)
        try:
            for index in range(start, len(jobs)):
                answer = child.read(patience_s[index])
                if answer is None:
                    break
                start = index + 1
                row = json.loads(answer)
                yield index, None if row is None else decode(row)
        finally:
            child.end()
        if start < len(jobs):
            deaths += 1
            lost = len(jobs) if child.hung or deaths >= _MAX_DEATHS else start + 1
            yield from ((index, None) for index in range(start, lost))
            start = lost


class _Child:
    """A forked process that runs jobs[start:] and writes a line of JSON for each."""

    def __init__(self, jobs: Sequence[Callable[[], Any]], start: int, encode: Callable[[Any], Any]) -> None:
        num_threads = torch.get_num_threads()
        self.hung = False
        self.pending = b""
        self.source, sink = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads; the child runs nothing that waits for them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self.source)
                _live_as_child()
                worker = threading.Thread(target=_work, args=(jobs, start, encode, sink, num_threads), daemon=True)
                worker.start()
                worker.join()
                code = 0
            finally:
                os._exit(code)  # no atexit handlers, no flushing of the parent's buffers
        os.close(sink)

    def read(self, patience_s: float) -> bytes | None:
        """The next line, or None when the child has died or hangs."""
        deadline = time.monotonic() + patience_s
        while b"\n" not in self.pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self.source], [], [], left_s)[0]:
                self.hung = True
                return None
            chunk = os.read(self.source, 65536)
            if not chunk:
                return None
            self.pending += chunk
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def end(self) -> None:
        os.close(self.source)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # where the user ignores SIGCHLD, the system has collected it
            os.waitpid(self.pid, 0)


def _live_as_child() -> None:
    """Be quiet, be the first to go when memory runs out, touch nothing that belongs to the parent."""
    gc.disable()  # a collection would run finalizers of the parent's objects
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # torch's profiler writes log lines there
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(jobs: Sequence[Callable[[], Any]], start: int, encode: Callable[[Any], Any], sink: int, num_threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(num_threads)
    with os.fdopen(sink, "w", encoding="ascii") as pipe:
        for job in jobs[start:]:
            try:
                _send(pipe, encode(job()))
            except BrokenPipeError:
                return  # the parent is gone
            except Exception:
                _send(pipe, None)


def _send(pipe: TextIO, row: Any) -> None:
    pipe.write(json.dumps(row) + "\n")
    pipe.flush()
