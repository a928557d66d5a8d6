"""Measured costs on disk: one JSON file for each machine, torch release and setting that times depend on. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from filelock import FileLock
from platformdirs import user_cache_path

from planner.errors import first_line
from planner.graph.fields import parse, read_all
from planner.log import PROFILER
from planner.profiler.profile import KernelCost, spread_of

_RULE = 5  # raise it when kernels are timed in another way: old files are then no longer read
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

    Costs that a process has used stay what they are in it (`settled`), whatever others write, and whether the file can be read
    and written or not: the same call gives the same plan.

    Attributes:
        path: the JSON file, or None where nothing is kept.
        settled: costs that this process has used; empty, and not kept, where `path` is None.
    """

    _settled: ClassVar[dict[Path | None, dict[str, KernelCost]]] = {}

    def __init__(self, folder: Path | Literal["default"] | None, conditions: Mapping[str, Any]) -> None:
        """`folder`: "default" is `default_cache_dir()`; None keeps nothing."""
        self.conditions = {"rule": _RULE, **conditions}
        self.path: Path | None = None
        if folder is not None:
            folder = default_cache_dir() if folder == "default" else folder
            digest = hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()[:16]
            with suppress(RuntimeError):  # expanduser raises it where there is no home
                self.path = folder.expanduser() / f"kernels-{digest}.json"
        self.settled = {} if self.path is None else self._settled.setdefault(self.path.absolute(), {})

    def load(self) -> dict[str, KernelCost]:
        """Every cost on file."""
        if self.path is None:
            return {}
        try:
            conditions, costs = _read(self.path)
            return dict(costs) if conditions == self.conditions else {}
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
        rows = {key: cost.to_row() for key, cost in sorted(costs.items())}
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"conditions": self.conditions, "kernels": rows}), encoding="utf-8")
        os.replace(scratch, self.path)


def _read(path: Path) -> tuple[Any, Mapping[str, KernelCost]]:
    """The conditions and the costs that a file holds; a file that nobody has written since is not parsed again.

    Raises:
        OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError: it cannot be read.
    """
    about = path.stat()
    return _parsed(path.absolute(), (about.st_ino, about.st_mtime_ns, about.st_size))


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, version: tuple[int, ...]) -> tuple[Any, Mapping[str, KernelCost]]:
    """`_read`; `version` tells what was written at different times apart: a writer puts a new file in the place of the old."""
    with open(path, "rb") as file:
        content = parse(read_all(file).decode("utf-8"))
    return content["conditions"], {str(key): _cost(row) for key, row in content["kernels"].items()}


def _cost(row: Any) -> KernelCost:
    if any(type(figure) is not int or not 0 <= figure <= _MOST for figure in row):
        raise ValueError("not a cost")
    return KernelCost.of_row(row)


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A file of measured costs.

    Attributes:
        path: where it is.
        nbytes: its size.
        modified_s: when it was written last, in seconds since 1970.
        conditions: what its times hold for: device, torch, threads, ...; None where it cannot be read.
        num_kernels: how many kernels it holds.
        spread: sum of their spreads as a fraction of the sum of their times.
    """

    path: Path
    nbytes: int
    modified_s: float
    conditions: Mapping[str, Any] | None
    num_kernels: int = 0
    spread: float = 0.0

    @property
    def is_current(self) -> bool:
        """It was written by this release's rule of timing."""
        return self.conditions is not None and self.conditions.get("rule") == _RULE


def cache_files(folder: Path) -> list[CacheFile]:
    """The files of measured costs in a folder, the one written last first; empty where there is no such folder."""
    found = []
    for path in folder.glob("kernels-*.json"):
        with suppress(OSError):  # another process has removed it
            about = path.stat()
            conditions, costs = _tried(path)
            found.append(CacheFile(path, about.st_size, about.st_mtime, conditions, len(costs), spread_of(costs.values())))
    return sorted(found, key=lambda file: -file.modified_s)


def _tried(path: Path) -> tuple[Mapping[str, Any] | None, Mapping[str, KernelCost]]:
    try:
        conditions, costs = _read(path)
        return dict(conditions), costs
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError):
        return None, {}


def clear(folder: Path) -> list[Path]:
    """Remove the files of measured costs in a folder, and return them. Lock files stay: another process may wait for one.

    Raises:
        OSError: one cannot be removed.
    """
    removed = []
    for path in sorted(folder.glob("kernels-*.json")):
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
            path.unlink(missing_ok=True)
            path.with_suffix(".tmp").unlink(missing_ok=True)
        removed.append(path)
    return removed
