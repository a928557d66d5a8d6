"""Which submodule of a model is running."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from planner.graph.source import NOWHERE, Source


class ModuleStack:
    """The qualified name of the submodule whose forward is running, kept by hooks on the model's modules.

    Attributes:
        drew: the innermost submodule that drew from a generator of the host's; None if none did.
        failed: the innermost submodule whose forward raised, with its class as the note; NOWHERE if none did.
        fails_alone: the model's forward raises the same without the planner, too.
        last_kernel: the source of the kernel that was traced last; NOWHERE before the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._states: list[Any] = []
        self.drew: str | None = None
        self.failed = NOWHERE
        self.fails_alone = False
        self.last_kernel = NOWHERE

    def __str__(self) -> str:
        return self._running[-1] if self._running else ""

    def drawn(self, now: Any) -> None:
        """Do not count what an opaque module or operator has drawn so far as a draw of the modules around it.

        Args:
            now: states of the host's generators.
        """
        self._states = [now] * len(self._states)

    @contextlib.contextmanager
    def following(self, states: Callable[[], Any] = random.getstate, opaque: Collection[str] = ()) -> Iterator[None]:
        """While entered, forwards of the model's submodules are followed.

        Args:
            states: of the host's random generators.
            opaque: names of opaque modules, which may draw.
        """

        def enter(module: nn.Module, _args: Any) -> None:
            if module in self._names:
                self._running.append(self._names[module])
                self._states.append(states())

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if module in self._names and self._running:
                name, state = self._running.pop(), self._states.pop()
                if not self.failed and sys.exc_info()[1] is not None:
                    self.failed = Source(name, note=type(module).__name__)
                now = states()
                if now != state:
                    inside = any(name == one or name.startswith(f"{one}.") for one in opaque)
                    if self.drew is None and not inside:
                        self.drew = name
                    self._states = [now] * len(self._states)

        hooks = nn.modules.module
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()
            self._states.clear()
