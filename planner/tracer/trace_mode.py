"""While the model is traced: note where each kernel is called, and answer host reads from the recorded values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback

from planner._compat.dispatch import TorchDispatchMode, keep_layout, written
from planner.errors import CaptureError
from planner.graph.source import NOWHERE, Source
from planner.tracer.casts import AutocastCasts
from planner.tracer.constants import Constants
from planner.tracer.host.kernels import HOST_READS, RecordedRead
from planner.tracer.module_stack import ModuleStack
from planner.tracer.node_marks import marks
from planner.tracer.user_code import source_here


@dataclass(frozen=True, slots=True)
class TracedRead:
    """A tensor value that Python read while the model was traced.

    Attributes:
        value: what it read.
        source: where.
        is_validation: torch.distributions read it, whose argument checks can be switched off.
    """

    value: Any
    source: Source
    is_validation: bool


_OWN_SUBMODULE = "put it into a submodule of its own, which then runs as it is"
_WHERE = "use torch.where(mask, value, x)"
_BACKWARDS_OF_VARYING_SHAPES = {
    torch.ops.aten.masked_fill.Tensor: (2, _WHERE),
    torch.ops.aten.masked_fill_.Tensor: (2, _WHERE),
    torch.ops.aten.prod.default: (0, _OWN_SUBMODULE),
    torch.ops.aten.prod.dim_int: (0, _OWN_SUBMODULE),
}
"""Operators with the position of an argument whose gradient eager computes by masked_select or nonzero, and what to do.

Under a trace torch takes other kernels (areAnyTensorSubclassLike in its FunctionsManual.cpp), which add in another order.
"""


class TraceMode(TorchDispatchMode):
    """Entered around the traced forward.

    Attributes:
        read: per host read, in order: the tensor, which is traced, and what was read.
    """

    def __init__(
        self,
        modules: ModuleStack,
        recorded: Sequence[RecordedRead] | None,
        casts: AutocastCasts,
        constants: Constants | None = None,
    ) -> None:
        """Answer host reads from `recorded`; with `constants`, also those of tensors that depend on shapes alone."""
        super().__init__()
        self._constants = constants
        self._casts = casts
        self._modules = modules
        modules.last_kernel = NOWHERE
        self._recorded = recorded
        self.read: list[tuple[torch.Tensor, TracedRead]] = []
        self._in_distributions = False
        self._bases_of_changed_views: list[Any] = []

    @property
    def where(self) -> Source:
        """The source of the kernel that is being called."""
        return self._modules.last_kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._modules.last_kernel, self._in_distributions = source_here(str(self._modules))
        if func in HOST_READS:
            return self._answer(func, _value_read(func, args))
        self._check_derivative(func, args)
        with torch.fx.traceback.annotate(marks(self.where, self._casts.context_of(func, args, kwargs))):
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
        self.read.append((tensor, TracedRead(value, self.where, self._in_distributions)))
        return value


def _value_read(func: Any, args: Sequence[torch.Tensor]) -> torch.Tensor:
    """The traced tensor whose one value a host read returns."""
    if func is not torch.ops.aten.equal.default:
        return args[0]
    one, other = args
    return (one == other).all() if one.shape == other.shape else torch.zeros((), dtype=torch.bool, device=one.device)
