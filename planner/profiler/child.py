"""A forked child process that answers in lines of JSON, so that the parent's heap and state stay as they were.

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
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch

CAN_FORK = hasattr(os, "fork")
"""Whether this system has children of this kind at all."""


class Child:
    """A forked process that runs `work()` and sends each item that it yields, which JSON must be able to hold.

    Output, gradients, buffers, hooks, generators and open files of the parent are not touched.

    Raises:
        OSError: the system has no memory or no process left for it.

    Attributes:
        hung: it did not answer in time.
    """

    def __init__(self, work: Callable[[], Iterable[object]]) -> None:
        num_threads = torch.get_num_threads()
        self.hung = False
        self._pending = b""
        self._status: int | None = None
        self._source, sink = os.pipe()
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of forking with threads; the child runs nothing that waits for them.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
        except OSError:
            os.close(self._source)
            os.close(sink)
            raise
        if self._pid == 0:
            code = 1
            try:
                os.close(self._source)
                _live_as_child(sink)
                worker = threading.Thread(target=_send_all, args=(work, sink, num_threads), daemon=True)
                worker.start()
                worker.join()
                code = 0
            finally:
                os._exit(code)  # no atexit handlers, no flushing of the parent's buffers
        os.close(sink)

    def read(self, patience_s: float) -> bytes | None:
        """The next line, or None when the child has ended or hangs."""
        deadline = time.monotonic() + patience_s
        while b"\n" not in self._pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._source], [], [], left_s)[0]:
                self.hung = True
                return None
            chunk = os.read(self._source, 65536)
            if not chunk:
                self._reap()
                return None
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    @property
    def fate(self) -> str:
        """What became of a child that did not answer, for a message."""
        if self.hung:
            return "did not answer in time"
        if self._status is not None and os.WIFSIGNALED(self._status):
            return f"was killed by signal {os.WTERMSIG(self._status)}"
        return "ended without an answer"

    def end(self) -> None:
        """Kill it, where it still runs."""
        os.close(self._source)
        if self._status is not None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # where the user ignores SIGCHLD, the system has collected it
            os.waitpid(self._pid, 0)

    def _reap(self) -> None:
        """Collect a child that has closed its pipe, and so is about to end, with what ended it."""
        deadline = time.monotonic() + 1
        with suppress(ChildProcessError):
            while time.monotonic() < deadline:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    self._status = status
                    return
                time.sleep(0.001)


def _live_as_child(sink: int) -> None:
    """Silence output, raise the OOM score, disable inherited finalizers."""
    gc.disable()  # a collection would run finalizers of the parent's objects
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # torch's profiler writes log lines there
    with suppress(OSError):
        for name in os.listdir("/dev/fd"):
            if int(name) not in (0, 1, 2, sink, silence):
                _mute(int(name), silence)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _mute(number: int, silence: int) -> None:
    """Let what is written to an inherited file, pipe, socket or terminal vanish: it is shared with the parent."""
    import fcntl  # which only systems that fork have

    with suppress(OSError):
        kind = os.fstat(number).st_mode
        is_shared = stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(number)
        if is_shared and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.dup2(silence, number)


def _send_all(work: Callable[[], Iterable[object]], sink: int, num_threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(num_threads)
    with suppress(BrokenPipeError), os.fdopen(sink, "w", encoding="ascii") as pipe:  # broken: the parent is gone
        for answer in work():
            pipe.write(json.dumps(answer) + "\n")
            pipe.flush()
