"""A real training step of a model: its forward and backward, what it holds before it, and its measured peak."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.tensors import dense_parts
from planner.profiler.memory import logical_peak
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.restorers import restorer
from planner.tracer.loss import Loss, loss_leaves
from planner.tracer.opaque.resample import resampled


@dataclass(frozen=True, slots=True)
class Autocast:
    """Whether autocast is on, and what it casts to."""

    is_on: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> Autocast:
        """As it is now."""
        return cls(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """A context in which it is so."""
        return torch.autocast(device.type, self.dtype, enabled=self.is_on)


class TrainingStep:
    """Forward and backward of a model for one call.

    Attributes:
        model: whose forward runs.
        args, kwargs: of the call, with at least one tensor.
        inputs: the call's tensors.
        device: theirs.
        accumulates: gradients are accumulated over several steps; else each begins without any.
        random_state: what sets the state of the random generators that each step begins with; empty: it goes on from the last.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Loss, *, accumulates: bool = False
    ) -> None:
        """`loss`: the outputs that backward starts from."""
        self.accumulates = accumulates
        self.model, self.args, self.kwargs, self._loss = model, tuple(args), dict(kwargs), loss
        self.inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.device = self.inputs[0].device
        self._inside = contextvars.copy_context().run  # context variables that a forward sets stay in there
        self.random_state: Sequence[Callable[[], Any]] = ()

    def fix_random_state(self, own: Sequence[Any] = ()) -> None:
        """From now on, each step begins with the random state as it is now: the steps are alike.

        Args:
            own: generators that the model's code holds itself.
        """
        held = [restore for generator in own if (restore := restorer(generator, None)) is not None]
        self.random_state = [*Generators(self.device).restorers(), *held]

    def draw_inputs(self, draw: int) -> None:
        """Write into the call's dense tensors what `resampled` draws from them; 0 leaves them as they are."""
        if draw:
            dense = [tensor for tensor in self.inputs if tensor.layout is torch.strided]
            with torch.no_grad():
                for tensor, drawn in zip(dense, resampled(dense, draw), strict=True):
                    tensor.copy_(drawn)

    def restore_random_state(self) -> None:
        """Set the random generators to the fixed state; nothing where none is fixed."""
        for restore in self.random_state:
            restore()

    def clear_gradients(self) -> None:
        """Drop the gradients of the parameters and of the call's tensors."""
        self.model.zero_grad(set_to_none=True)
        for tensor in self.inputs:
            tensor.grad = None

    def forward(self) -> Any:
        """Run the model's forward. Of guarded iterators it reads copies."""
        return self._inside(self._forward)

    def _forward(self) -> Any:
        with iterators_copied():
            return self.model(*self.args, **self.kwargs)

    def run(self, autocast: Autocast | None = None, *, is_first: bool = True) -> list[Any]:
        """Run the step as if it were the first in its autocast region; returns the leaves of the output.

        Args:
            autocast: of the forward; None: as it is now.
            is_first: clear gradients before; else they are added to those that are there.
        """
        if is_first:
            self.clear_gradients()
        for tensor in self.inputs:
            tensor.grad = None
        torch.clear_autocast_cache()
        self.restore_random_state()
        with bound_and_restored(self.args, self.kwargs):
            with contextlib.nullcontext() if autocast is None else autocast.on(self.device):
                out = self.forward()
            leaves = pytree.tree_leaves(out)
            starts = loss_leaves(out, leaves, self._loss)
            with torch.autocast(self.device.type, enabled=False):
                torch.autograd.backward(starts, [torch.ones_like(start) for start in starts])
        return leaves

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters, buffers and inputs, each storage once."""
        tensors = (*self.model.parameters(), *self.model.buffers(), *self.inputs)
        storages = [part.untyped_storage() for tensor in tensors for part in dense_parts(tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the parameters' gradients that are there."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return sum(gradient.nbytes for gradient in gradients if gradient is not None)

    def peak(self, autocast: Autocast | None = None) -> int:
        """The measured peak of the step, everything resident included; where it accumulates, of its first two micro-steps."""
        self.clear_gradients()
        peak = self.resident_bytes + logical_peak(lambda: self.run(autocast), self.device)
        if self.accumulates:
            held = self.resident_bytes + self.gradient_bytes
            for tensor in self.inputs:
                tensor.grad = None
            peak = max(peak, held + logical_peak(lambda: self.run(autocast, is_first=False), self.device))
        return peak
