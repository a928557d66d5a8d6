"""Code that `planner.export.source` copies into every exported file: the sources of `EMBEDDED`.

So it is checked and tested here, and uses torch alone. In an exported file the backward runs in one stage.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat.backward_state import keeps_graph, release_saved
from planner.kernels.custom import rng_put_back_on_error, rng_state, swap_rng_state
from planner.runtime.backward_checks import check_backward, check_inner_outputs, check_modes

Named = dict[str, torch.Tensor]


class CallError(RuntimeError):
    """The call is not the one that this file was made for."""


class BackwardError(RuntimeError):
    """This file has no backward for this: a second derivative, autocast, or gradients of other outputs."""


class Output(dict[str, Any]):
    """Outputs by name: out.loss, out["loss"] or out[0]."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the output has no {name!r}, only {', '.join(self)}")
        return super().__getitem__(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclass(frozen=True, slots=True)
class Expected:
    """The properties that the step expects of a tensor.

    Attributes:
        name: of a parameter or buffer as in state_dict; of an argument as in the code below.
        stride: None where it is contiguous.
        device: None for the step's device.
        backward: the backward reads it again, so that writing into it in between is an error. False for parameters, for which
            this always holds.
        written: the forward itself writes into it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    stride: tuple[int, ...] | None = None
    device: torch.device | None = None
    backward: bool = False
    written: bool = False

    def difference(self, tensor: Any, device: torch.device, with_stride: bool) -> str:
        """What is not as expected of a tensor; "" if nothing."""
        if not isinstance(tensor, torch.Tensor):
            return f"is a {type(tensor).__name__}, and was a tensor when planned"
        expected = (self.dtype, list(self.shape), self.device or device, self.requires_grad)
        found = (tensor.dtype, list(tensor.shape), tensor.device, tensor.requires_grad)
        if expected != found:
            described = ("{} {} on {}, requires_grad={}".format(*kind) for kind in (found, expected))
            return "is {}, and was {} when planned".format(*described)
        if with_stride and tensor.stride() != (self.stride or torch.empty(self.shape, device="meta").stride()):
            return f"has strides {tensor.stride()}, and had {self.stride or 'contiguous ones'} when planned"
        return ""


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or buffer of the model.

    Attributes:
        tensor: its properties.
        kind: "parameter", "buffer", or "unsaved" for a buffer that is not in state_dict.
        same_as: the earlier name of the same tensor; "" if this is the first.
        value: of an unsaved buffer: numbers or a tensor.
    """

    tensor: Expected
    kind: str
    same_as: str = ""
    value: Any = None


def parameter(name: str, *shape: int, requires_grad: bool = True, **more: Any) -> Held:
    """A parameter; NaN or 0 until a state_dict is loaded."""
    return Held(Expected(name, shape, requires_grad=requires_grad, **more), "parameter")


def buffer(name: str, *shape: int, **more: Any) -> Held:
    """A buffer that is in state_dict."""
    return Held(Expected(name, shape, **more), "buffer")


def unsaved(name: str, *shape: int, value: Any, **more: Any) -> Held:
    """A buffer that is not in state_dict, with its value."""
    return Held(Expected(name, shape, **more), "unsaved", value=value)


def tied(name: str, same_as: str) -> Held:
    """A second name of an earlier parameter or buffer."""
    return Held(Expected(name, ()), "tied", same_as=same_as)


@dataclass(frozen=True, slots=True)
class ExportedStep:
    """The step and the call that it is right for.

    Attributes:
        forward: (tensors by name, dict that receives kept activations) -> results.
        backward: (tensors by name, kept activations, dict that receives gradients, gradients of the `differentiated` results).
        held: the model's parameters and buffers, in its order.
        call: the arguments planned for, by name.
        constants: tensors that the model holds outside of parameters and buffers.
        results: names of the results.
        differentiated: positions of the results that backward starts from.
        requires_grad, aliased: per result: it requires grad; it shares its storage with an argument or another result.
        inner: positions of the results that others are computed from, if they require grad.
        autocast: (enabled, dtype) around the call.
        device: where it runs.
        swaps: the backward recomputes under an earlier state of the random generator.
        read, values: computes the tensors whose values decided how the model ran when it was captured; (value, where) of each.
        without_gradient: parameters and arguments that the backward does not reach.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., None]
    held: tuple[Held, ...]
    call: dict[str, Any]
    results: tuple[str, ...]
    differentiated: tuple[int, ...]
    requires_grad: tuple[bool, ...]
    inner: tuple[int, ...]
    aliased: tuple[bool, ...]
    autocast: tuple[bool, str]
    device: torch.device
    swaps: bool
    constants: Named
    read: Callable[[Named], tuple[torch.Tensor, ...]] | None = None
    values: tuple[tuple[Any, str], ...] = ()
    without_gradient: tuple[str, ...] = ()


def build(model: nn.Module, held: Iterable[Held], device: torch.device) -> None:
    """Register the parameters and buffers in the model, in submodules by their qualified names."""
    made: Named = {}
    for one in held:
        name, expected = one.tensor.name, one.tensor
        path, _, attribute = name.rpartition(".")
        place = model
        for part in path.split(".") if path else ():
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        if one.same_as:
            made[name] = made[one.same_as]
        else:
            stride = expected.stride or torch.empty(expected.shape, device="meta").stride()
            tensor = torch.empty_strided(expected.shape, stride, dtype=expected.dtype, device=expected.device or device)
            unset = float("nan") if tensor.is_floating_point() else 0
            tensor.copy_(torch.as_tensor(unset if one.value is None else one.value, dtype=expected.dtype))
            made[name] = nn.Parameter(tensor, expected.requires_grad) if one.kind == "parameter" else tensor
        tensor = made[name]
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(attribute, tensor)
        else:
            place.register_buffer(attribute, tensor, persistent=one.kind != "unsaved")


def run_step(model: nn.Module, step: ExportedStep, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The step's results, with the backward attached.

    Raises:
        CallError: this is not the planned call; says what differs.
    """
    arguments = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
    given = {expected.name: (expected, tensor) for expected, tensor in _tensors("", step.call, arguments, step.device)}
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    _check(model, step, weights)
    w = weights | step.constants | {name: tensor for name, (_, tensor) in given.items()}
    _check_values(step, w)
    everything = [*(one.tensor for one in step.held if not one.same_as), *(expected for expected, _ in given.values())]
    again = {one.tensor.name for one in step.held if one.kind == "parameter"} | {one.name for one in everything if one.backward}
    checked = [one.name for one in everything if one.name in again and not one.written]
    unchecked = [one.name for one in everything if one.name in again and one.written]
    trained = [one.name for one in everything if one.requires_grad and one.name not in step.without_gradient]
    with torch.autocast(step.device.type, enabled=False):  # every cast is written out
        names = (checked, unchecked, trained)
        return TrainingStep.apply(step, w, names, *(w[name] for name in trained))  # type: ignore[no-any-return]


def _tensors(where: str, expected: Any, found: Any, device: torch.device) -> Iterator[tuple[Expected, torch.Tensor]]:
    """The tensors of a call, each with what was expected of it."""
    if isinstance(expected, Expected):
        difference = expected.difference(found, device, with_stride=True)
        if difference:
            raise CallError(f"this file holds one training step, planned for one call: {where} {difference}")
        yield expected, found
    elif isinstance(expected, (dict, list, tuple)) and type(found) is type(expected) and len(found) == len(expected):
        keys = list(expected) if isinstance(expected, dict) else range(len(expected))
        for key in keys:
            if isinstance(found, dict) and key not in found:
                raise CallError(f"this file holds one training step, planned for one call: {where} has no {key!r}")
            yield from _tensors(f"{where}[{key!r}]" if where else str(key), expected[key], found[key], device)
    elif isinstance(found, torch.Tensor) or type(found) is not type(expected) or found != expected:
        raise CallError(
            f"this file holds one training step, planned for one call: {where} is {_short(found)}, and was {_short(expected)} "
            "when planned"
        )


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _check(model: nn.Module, step: ExportedStep, weights: Named) -> None:
    """Raise CallError where the model or the modes (grad, autocast) are not as planned."""
    if not (model.training and torch.is_grad_enabled()):
        raise CallError("this file holds a training step: for eval() or no_grad() load the state_dict into the original model")
    expected = {one.tensor.name: one.tensor for one in step.held if not one.same_as}
    if weights.keys() != expected.keys():
        raise CallError(f"parameters were added, removed or untied: {', '.join(sorted(weights.keys() ^ expected.keys()))}")
    for name, tensor in weights.items():
        difference = expected[name].difference(tensor, step.device, with_stride=False)
        if difference:
            raise CallError(f"{name} {difference}")
    enabled = torch.is_autocast_enabled(step.device.type)
    autocast = (enabled, str(torch.get_autocast_dtype(step.device.type)) if enabled else "")
    if autocast != step.autocast:
        raise CallError(f"autocast is {autocast}, and was {step.autocast} when planned")


def _check_values(step: ExportedStep, w: Named) -> None:
    """Raise CallError where a value that decided how the model ran has changed."""
    if step.read is None:
        return
    with torch.no_grad(), torch.autocast(step.device.type, enabled=False):
        tensors = step.read(w)
    for tensor, (expected, where) in zip(tensors, step.values, strict=True):
        value = tensor.item()
        if value != expected and not (value != value and expected != expected):
            raise CallError(f"the value that the model read at {where} is {value}, and was {expected} when planned")


class TrainingStep(torch.autograd.Function):
    """The whole step as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, step: ExportedStep, w: Named, names: tuple[list[str], ...], *_trained: torch.Tensor) -> Any:
        """Run the forward, and save what the backward needs."""
        kept: Named = {}
        results = step.forward(w, kept)
        ctx.step, (ctx.checked, unchecked, ctx.trained), ctx.kept = step, names, list(kept)
        ctx.unchecked = {name: w[name] for name in unchecked}
        ctx.save_for_backward(*(w[name] for name in ctx.checked), *kept.values())
        ctx.set_materialize_grads(False)
        outputs = tuple(out.detach() if alias else out for out, alias in zip(results, step.aliased, strict=True))
        ctx.mark_non_differentiable(*(out for out, can in zip(outputs, step.requires_grad, strict=True) if not can))
        ctx.inner = {i: weakref.ref(outputs[i]) for i in step.inner}
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor | None) -> Any:
        """Run the backward on the kept activations, each of which is freed after its last use."""
        step: ExportedStep = ctx.step
        check_inner_outputs(ctx.inner, step.results, output_gradients)
        check_backward(output_gradients, step.differentiated, step.results, step.device)
        saved = release_saved(ctx)
        w = step.constants | dict(zip(ctx.checked, saved, strict=False)) | ctx.unchecked
        kept = dict(zip(ctx.kept, saved[len(ctx.checked) :], strict=True))
        del saved
        gradients: Named = {}
        with rng_put_back_on_error(step.device) if step.swaps else contextlib.nullcontext():
            step.backward(w, kept, gradients, *(output_gradients[i] for i in step.differentiated))
        return (None, None, None, *(gradients.pop(name) for name in ctx.trained))


EMBEDDED = (
    CallError,
    BackwardError,
    Output,
    Expected,
    Held,
    parameter,
    buffer,
    unsaved,
    tied,
    ExportedStep,
    build,
    run_step,
    _tensors,
    _short,
    _check,
    _check_values,
    TrainingStep,
    check_modes,
    check_backward,
    check_inner_outputs,
    keeps_graph,
    release_saved,
    rng_state,
    swap_rng_state,
    rng_put_back_on_error,
)
"""In the order in which they are written."""
