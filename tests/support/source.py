"""Programs as text: a model, its inputs and what the training loop changes, as one Python module that can be loaded twice."""

from __future__ import annotations

import itertools
import linecache
import sys
import textwrap
import types
from dataclasses import dataclass, field, replace
from typing import Any

IMPORTS = """\
import collections, contextlib, contextvars, copy, dataclasses, enum, functools, itertools, os, random, types
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
"""
_loaded = itertools.count()


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the training loop.

    Attributes:
        kind: name of a function in `tests.support.loops`.
        before: statements run before it; `m` is the model, `part` the module that the program is about.
        under: expression of a context manager that the forward runs in.
        between: statements like those of `before`, run by the kind "changed" between the forward and its backward.
    """

    kind: str = "train"
    before: str = ""
    under: str = ""
    between: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """A model and a training loop.

    Attributes:
        head: statements at module level.
        init, forward: statements of the part's `__init__` and `forward`; in `forward`, `h` is the activation, [rows, 8].
        out: what `forward` returns.
        layers: what `__init__` creates besides.
        inside: the part is a submodule of the model, which feeds what it returns to another layer.
        losses: expression of a list of tensors left on the `part`, which the loop adds to the loss.
        body: the part's `forward` up to the statements of `forward`, and after them.
        given: expression of the call's arguments.
        rows: of the default arguments.
        plan_under: expression of a context manager to plan in.
        warm: how many of the steps run before planning.
        ignored: pattern of what may differ.
    """

    name: str
    forward: str = ""
    init: str = ""
    head: str = ""
    out: str = "self.c(torch.tanh(self.b(torch.sigmoid(h) * 2)))"
    layers: str = "self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)"
    first: str = "h = self.a(x)"
    signature: str = "self, x"
    inside: bool = False
    losses: str = "[]"
    given: str = ""
    rows: int = 16
    classes: str = ""
    build: str = ""
    steps: tuple[Step, ...] = field(default=(Step(), Step(), Step()))
    plan_under: str = ""
    warm: int = 0
    ignored: str = ""

    @property
    def source(self) -> str:
        """The program's module, as Python."""
        part = "m.body" if self.inside else "m"
        return "\n".join(
            [
                IMPORTS + textwrap.dedent(self.head),
                self.classes or self._part(),
                _OUTER if self.inside else "",
                f"def build():\n    return {self.build or ('Outer(Part())' if self.inside else 'Part()')}\n",
                f"def inputs():\n    return {self.given or f'(torch.randn({self.rows}, 8, dtype=torch.float32),)'}\n",
                f"def part_of(m):\n    return {part}\n",
                f"def losses(part):\n    return {self.losses}\n",
                *(self._change(f"before_{i}", step.before) for i, step in enumerate(self.steps)),
                *(self._change(f"between_{i}", step.between) for i, step in enumerate(self.steps)),
                *(f"def under_{i}():\n    return {step.under}\n" for i, step in enumerate(self.steps) if step.under),
                f"def plan_under():\n    return {self.plan_under or 'contextlib.nullcontext()'}\n",
            ]
        )

    def _part(self) -> str:
        init = _indented(f"super().__init__()\n{self.layers}\n{textwrap.dedent(self.init)}", 8)
        forward = _indented(f"{self.first}\n{textwrap.dedent(self.forward)}\nreturn {self.out}", 8)
        return f"class Part(nn.Module):\n    def __init__(self):\n{init}\n    def forward({self.signature}):\n{forward}\n"

    def _change(self, name: str, text: str) -> str:
        lines = textwrap.dedent(text).strip()
        return f"def {name}(m, part):\n{_indented(lines or 'pass', 4)}\n"

    def within(self, **changes: Any) -> Program:
        """The same with other fields."""
        return replace(self, **changes)

    def load(self) -> types.ModuleType:
        """A new Python module of this source, with globals and classes of its own; tracebacks show its lines."""
        name = f"program_{next(_loaded)}"
        path = f"/programs/{name}.py"
        home = types.ModuleType(name)
        home.__file__ = path
        linecache.cache[path] = (len(self.source), None, self.source.splitlines(keepends=True), path)
        sys.modules[name] = home  # dataclasses and pickle look a class's module up
        exec(compile(self.source, path, "exec"), vars(home))
        return home


def forget(home: types.ModuleType) -> None:
    """Undo `Program.load`, so that thousands of programs leave nothing."""
    sys.modules.pop(home.__name__, None)
    linecache.cache.pop(str(home.__file__), None)


_OUTER = """\
class Outer(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.before, self.body, self.after = nn.Linear(8, 8), body, nn.Linear(8, 8)
    def forward(self, x, *rest):
        out = self.body(torch.tanh(self.before(x)), *rest)
        first, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        return (self.after(torch.tanh(first)), *others) if others else self.after(torch.tanh(first))
"""


def _indented(text: str, width: int) -> str:
    return textwrap.indent("\n".join(line for line in text.splitlines() if line.strip()), " " * width)
