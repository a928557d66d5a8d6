"""What keeps the trace equal to eager: host reads recorded and replayed, the user's lines, a model left as it was."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.fx.traceback
from torch import nn

from planner._compat.dispatch import TorchDispatchMode, keep_layout, written
from planner.errors import CaptureError
from planner.graph.source import NOWHERE, Source
from planner.tracer.casts import Casts
from planner.tracer.constants import Constants
from planner.tracer.host.kernels import HOST_READS

SOURCE = "planner_source"
"""Key of a node's Source in its `meta["custom"]`: torch copies what is there from a forward node to its backward nodes."""
_OWN_HOOKS = ("torch.nn.utils", "transformers.")

_PACKAGE = str(Path(__file__).parent.parent)
_CALLER = str(Path(__file__).with_name("capture.py"))  # who calls the model: frames beyond are not the model's
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTIONS = str(Path(torch.__file__).parent / "distributions")
_STDLIB = str(Path(functools.__file__).parent)


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor value that Python read while the model was traced.

    Attributes:
        value: what it read.
        source: where.
        is_validation: torch.distributions read it, whose argument checks can be switched off.
    """

    value: Any
    source: Source
    is_validation: bool


class ModuleStack:
    """The qualified name of the submodule whose forward is running, kept by hooks on the model's modules.

    Attributes:
        drew: the innermost submodule that drew from a generator of the host's; None if none did.
        failed: the innermost submodule whose forward raised, its class as the note; NOWHERE if none did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._states: list[Any] = []
        self.drew: str | None = None
        self.failed = NOWHERE

    def __str__(self) -> str:
        return self._running[-1] if self._running else ""

    def drawn(self, now: Any) -> None:
        """What an opaque submodule or operator has drawn so far is no draw of the modules around it."""
        self._states = [now] * len(self._states)

    @contextlib.contextmanager
    def following(self, states: Callable[[], Any] = random.getstate, apart: Collection[str] = ()) -> Iterator[None]:
        """While entered, forwards of the model's submodules are followed.

        Args:
            states: of the host's random generators.
            apart: opaque submodules, which may draw.
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
                    inside = any(name == part or name.startswith(f"{part}.") for part in apart)
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


def is_foreign(hook: Any) -> bool:
    """The hook is the user's. Those by which libraries compute (weight_norm, spectral_norm, recorded outputs) are traced."""
    return not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS)


def source_here(module: str) -> tuple[Source, bool]:
    """The innermost running frame of the model's own code, and whether it runs torch.distributions.

    Frames of torch, of the standard library and of this package are no place that a user can go to: where only these run, the
    class of the innermost module of torch's is the note.

    Args:
        module: qualified name of the submodule that runs.
    """
    frame: FrameType | None = sys._getframe(1)
    inside_torch, is_distribution = "", False
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file = frame.f_code.co_filename
        if is_users(file):
            return Source(module, Path(file).name, frame.f_lineno), is_distribution
        is_distribution = is_distribution or file.startswith(_DISTRIBUTIONS)
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" and not inside_torch else None
        if isinstance(owner, nn.Module) and file.startswith(_TORCH):
            inside_torch = type(owner).__name__
        frame = frame.f_back
    return Source(module, note=inside_torch), is_distribution


def is_users(file: str) -> bool:
    """A source file of the user's, or of a library other than torch, the standard library and this package."""
    if file.startswith((_TORCH, _PACKAGE, "<")):
        return file.startswith("<ipython")
    return not file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file


_APART = "put it into a submodule of its own, which then runs as it is"
_WHERE = "use torch.where(mask, value, x)"
_BACKWARDS_OF_VARYING_SHAPES = {
    torch.ops.aten.masked_fill.Tensor: (2, _WHERE),
    torch.ops.aten.masked_fill_.Tensor: (2, _WHERE),
    torch.ops.aten.prod.default: (0, _APART),
    torch.ops.aten.prod.dim_int: (0, _APART),
}
"""Operators with the position of an argument whose gradient eager computes by masked_select or nonzero, and what to do.

Under a trace torch takes other kernels (areAnyTensorSubclassLike in its FunctionsManual.cpp), which add in another order.
"""


class Tracing(TorchDispatchMode):
    """Inside the traced forward: notes where each kernel was called and answers host reads from a recording.

    Attributes:
        read: per host read, in order: the tensor, which is traced, and what was read.
        where: source of the kernel called last, for errors.
    """

    def __init__(
        self,
        modules: ModuleStack,
        recorded: Sequence[tuple[str, Any]] | None,
        casts: Casts,
        constants: Constants | None = None,
    ) -> None:
        """`constants`: collects them, and answers reads of them; without it, only the recording does."""
        super().__init__()
        self._constants = constants
        self._casts = casts
        self._modules = modules
        self._recorded = recorded
        self.read: list[tuple[torch.Tensor, Read]] = []
        self.where = NOWHERE
        self._in_distributions = False
        self._bases_of_changed_views: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.where, self._in_distributions = source_here(str(self._modules))
        if func in HOST_READS:
            return self._answer(func, _read(func, args))
        self._check_derivative(func, args)
        with torch.fx.traceback.annotate({SOURCE: self.where, **self._casts.mark(func, args, kwargs)}):
            out = func(*args, **(kwargs or {}))
            self._follow_writes(func, written(func, args, kwargs or {}))
        if self._constants is not None:
            self._constants.note(func, args, kwargs or {}, out)
        return out

    def _check_derivative(self, func: Any, args: Sequence[Any]) -> None:
        """Raise CaptureError for a kernel whose derivative is traced as other kernels than eager runs."""
        position, cure = _BACKWARDS_OF_VARYING_SHAPES.get(func, (0, ""))
        if cure and args[position].requires_grad:
            raise CaptureError(
                f"the backward of {func} at {self.where} makes tensors whose shapes depend on the data, and a plan needs fixed "
                f"shapes: {cure}",
                module=str(self._modules),
            )

    def _follow_writes(self, func: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Keep the layouts of what a kernel has written.

        Raises:
            CaptureError: a view that `t_()` and the like have changed is written into, or what it is a view of. Torch's
                functionalization gets the gradient of such a write wrong (2.13: by 100 %).
        """
        for tensor in tensors:
            base = tensor._base if tensor._is_view() else tensor
            if torch.Tag.inplace_view in func.tags:
                if tensor._is_view():
                    self._bases_of_changed_views.append(base)
                continue
            if any(base is changed for changed in self._bases_of_changed_views):
                raise CaptureError(
                    f"the forward at {self.where} writes into memory that a view shares whose shape was changed in place "
                    "(t_(), transpose_(), squeeze_(), ...): use t(), transpose(), squeeze() instead",
                    module=str(self._modules),
                )
            keep_layout(tensor)

    def _answer(self, func: Any, tensor: torch.Tensor) -> Any:
        constant = None if self._constants is None else self._constants.value(tensor)
        if constant is not None:
            return constant
        if self._recorded is None:  # no forward was run
            raise CaptureError(
                f"the model reads tensor values in its forward ({self.where}), which a model or an input without storage does "
                "not have; plan with real tensors",
                module=str(self._modules),
            )
        position = len(self.read)
        if position >= len(self._recorded) or self._recorded[position][0] != str(func):
            raise CaptureError(
                f"the model read other tensor values while traced than in a real forward ({func} at {self.where}); "
                "its control flow depends on something a trace cannot hold",
                module=str(self._modules),
            )
        value = self._recorded[position][1]
        self.read.append((tensor, Read(value, self.where, self._in_distributions)))
        return value


def _read(func: Any, args: Sequence[torch.Tensor]) -> torch.Tensor:
    """The traced tensor whose one value a host read returns."""
    if func is not torch.ops.aten.equal.default:
        return args[0]
    one, other = args
    return (one == other).all() if one.shape == other.shape else torch.zeros((), dtype=torch.bool, device=one.device)
