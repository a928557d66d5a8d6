"""Measured costs on disk: one JSON file for each machine, torch release and setting that times depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from platformdirs import user_cache_path

from planner.errors import first_line
from planner.graph.fields import parse, read_all
from planner.log import PROFILER
from planner.profiler.profile import KernelCost

_RULE = 4  # raise it when kernels are timed in another way: old files are then no longer read
_LOCK_TIMEOUT_S = 10.0
"""How long to wait for another process that writes the same file; writing takes milliseconds."""

_MOST = 2**50
"""No kernel takes this many nanoseconds (13 days) or bytes (a PiB)."""


def default_cache_dir() -> Path:
    """The folder in CHECKPOINT_PLANNER_CACHE; else this user's cache folder, on Linux below XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("CHECKPOINT_PLANNER_CACHE")
    return Path(named) if named else user_cache_path("checkpoint-planner", appauthor=False)


class KernelCache:
    """Costs by kernel key, for one description of everything else that times depend on.

    A file that is missing, unreadable or corrupt counts as empty, and a folder that cannot be written to is left
    alone: a cache may cost time but never an error. Processes that write one file at once take turns.

    Attributes:
        path: the JSON file, or None where nothing is kept.
    """

    def __init__(self, folder: Path | Literal["default"] | None, conditions: Mapping[str, Any]) -> None:
        """`folder`: "default" is `default_cache_dir()`; None keeps nothing."""
        self.conditions = {"rule": _RULE, **conditions}
        self.path: Path | None = None
        if folder is not None:
            folder = default_cache_dir() if folder == "default" else folder
            digest = hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()[:16]
            with suppress(RuntimeError):  # expanduser raises it where there is no home
                self.path = folder.expanduser() / f"kernels-{digest}.json"

    def load(self) -> dict[str, KernelCost]:
        """Every cost on file."""
        if self.path is None:
            return {}
        try:
            with open(self.path, "rb") as file:
                content = parse(read_all(file).decode("utf-8"))
            if content["conditions"] != self.conditions:
                return {}
            return {str(key): _cost(row) for key, row in content["kernels"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
            PROFILER.info("%s cannot be read, and kernels are measured again: %s", self.path, first_line(error))
            return {}

    def add(self, costs: Mapping[str, KernelCost]) -> None:
        """Merge `costs` into the file: readers see the old file or the new one, never half of one."""
        if self.path is None or not costs:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
                self._write({**self.load(), **costs})
        except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
            PROFILER.info("%s cannot be written, and kernels are measured again next time: %s", self.path, first_line(error))

    def _write(self, costs: Mapping[str, KernelCost]) -> None:
        assert self.path is not None
        rows = {key: [cost.time_ns, cost.workspace_bytes, *cost.hidden_bytes] for key, cost in sorted(costs.items())}
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"conditions": self.conditions, "kernels": rows}, indent=0), encoding="utf-8")
        os.replace(scratch, self.path)


def _cost(row: Any) -> KernelCost:
    time_ns, workspace_bytes, *hidden_bytes = row
    if any(type(figure) is not int or not 0 <= figure <= _MOST for figure in row):
        raise ValueError("not a cost")
    return KernelCost(time_ns, workspace_bytes, tuple(hidden_bytes))
