"""One recorded call of an opaque module: plain data, which travels with the captured step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner.kernels import custom
from planner.kernels.facts import is_random
from planner.profiler.profile import KernelCost
from planner.tracer.call import CallSpec

_UNMEASURED = KernelCost(0, 0)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A dense tensor's shape, strides and dtype; for a result also whether it requires grad."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor of this spec, which does not require grad."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        grad = ", requires_grad" if self.requires_grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} strides {self.stride}{grad}"


@dataclass(frozen=True, slots=True)
class OpaqueCall:
    """One call of an opaque module, as a real run of the model found it.

    Attributes:
        key: "module.path#number of the call".
        module: qualified name of the submodule.
        call: how its arguments and its output map onto flat tensors.
        places: per tensor leaf of the call, its position in `arguments`.
        arguments: the distinct tensor arguments; `requires_grad` as in the run.
        weights: (name in the submodule, requires grad) of its parameters.
        buffers: names of its buffers in the submodule.
        outputs: per leaf of the output: a TensorSpec, the position of the argument that is returned, or (constant,).
        grad: gradients were enabled.
        autocast: (enabled, dtype) on the device.
        reads: positions of the (arguments, results) that autograd saves.
        gradients: per argument, then per parameter: the gradient's TensorSpec, or None where there is none.
        saved_bytes: what the autograd graph holds besides arguments, results and parameters.
        saved_tensor_bytes: those of the tensors that autograd saved, as `SavedHandle` counts them; None before it was measured.
        forward, backward: measured costs of the two kernels.
        draws: it draws random numbers from the device's generator (forward, backward).
        mutates: names in the submodule of the parameters and buffers that it writes into.
        repeatable: with the generator in the same state, a second run gives the same bits and changes nothing else.
        several_uses: positions, among arguments and parameters, of those that it uses several times: their gradients are sums.
        switches: torch's switches in the forward, also where the backward runs it again; see `forward_switches`.
        own_leaves: number of tensors that the module itself creates with requires_grad, for a backward inside of its forward.
    """

    key: str
    module: str
    call: CallSpec
    places: tuple[int, ...]
    arguments: tuple[TensorSpec, ...]
    weights: tuple[tuple[str, bool], ...]
    buffers: tuple[str, ...]
    outputs: tuple[TensorSpec | int | tuple[object], ...]
    grad: bool
    autocast: tuple[bool, torch.dtype]
    reads: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    gradients: tuple[TensorSpec | None, ...] = ()
    saved_bytes: int = 0
    saved_tensor_bytes: int | None = None
    forward: KernelCost = _UNMEASURED
    backward: KernelCost = _UNMEASURED
    draws: tuple[bool, bool] = (False, False)
    mutates: tuple[str, ...] = ()
    repeatable: bool = True
    several_uses: frozenset[int] = frozenset()
    own_leaves: int = 0
    switches: tuple[Any, ...] = ()

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The output leaves that are tensors of their own."""
        return tuple(out for out in self.outputs if isinstance(out, TensorSpec))

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions, among arguments and parameters, of those that get a gradient."""
        return tuple(i for i, spec in enumerate(self.gradients) if spec is not None)


def opaque_call_of(node: fx.Node, calls: Mapping[str, OpaqueCall]) -> OpaqueCall | None:
    """The call that a node of a joint graph in normal form runs, forward or backward; None for any other node.

    Args:
        calls: the graph's recorded calls, by key.
    """
    return calls[str(node.args[0])] if node.target in (custom.opaque_forward, custom.opaque_backward) else None


def draws(node: fx.Node, calls: Mapping[str, OpaqueCall]) -> bool:
    """The node draws from the device's default generator, as a kernel or inside of an opaque module."""
    call = opaque_call_of(node, calls)
    return is_random(node) if call is None else call.draws[node.target is custom.opaque_backward]
