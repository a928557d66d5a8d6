"""Measured costs on disk: one JSON file for each machine, torch release and setting that times depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from planner.errors import first_line
from planner.graph.fields import parse, read_all
from planner.log import PROFILER
from planner.profiler.profile import KernelCost

DEFAULT_CACHE_DIR = Path("~/.cache/checkpoint-planner")
"""Where measured costs are kept, unless the environment variable CHECKPOINT_PLANNER_CACHE names another folder."""

_RULE = 4  # raise it when kernels are timed in another way: old files are then no longer read


_MOST = 2**50
"""No kernel takes so many nanoseconds (13 days) or bytes (a PiB)."""


class KernelCache:
    """Costs by kernel key, for one description of everything else that times depend on.

    A file that is missing, unreadable or corrupt counts as empty, and a folder that cannot be written to is left
    alone: a cache may cost time but never an error.

    Attributes:
        path: the JSON file, or None where nothing is kept.
    """

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any]) -> None:
        self.conditions = {"rule": _RULE, **conditions}
        self.path: Path | None = None
        if folder is not None:
            if folder == DEFAULT_CACHE_DIR:
                folder = Path(os.environ.get("CHECKPOINT_PLANNER_CACHE") or DEFAULT_CACHE_DIR)
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
            PROFILER.info("%s cannot be read, and kernels are measured anew: %s", self.path, first_line(error))
            return {}

    def add(self, costs: Mapping[str, KernelCost]) -> None:
        """Merge `costs` into the file: readers see the old file or the new one, never half of one."""
        if self.path is None or not costs:
            return
        merged = {**self.load(), **costs}
        content = {
            "conditions": self.conditions,
            "kernels": {key: [cost.time_ns, cost.workspace_bytes, *cost.hidden_bytes] for key, cost in sorted(merged.items())},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.stem}-", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=0)
                os.replace(scratch, self.path)
            except BaseException:
                os.unlink(scratch)
                raise
        except OSError as error:
            PROFILER.info("%s cannot be written, and kernels are measured again next time: %s", self.path, first_line(error))


def _cost(row: Any) -> KernelCost:
    time_ns, workspace_bytes, *hidden_bytes = row
    if any(type(figure) is not int or not 0 <= figure <= _MOST for figure in row):
        raise ValueError("not a cost")
    return KernelCost(time_ns, workspace_bytes, tuple(hidden_bytes))
