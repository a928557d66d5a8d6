"""Checks of a model and its inputs before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from planner._compat.module_calls import is_compiled_in_place
from planner._compat.switches import global_switches
from planner.errors import CaptureError, InputError
from planner.tracer.libraries import SHARDED_TENSORS, WRAPPERS
from planner.tracer.target_device import TargetDevice
from planner.units import article

_MODES = ("dispatch modes", "function modes", "torch.func transforms")


def check_trainable(model: nn.Module, num_tensors: int) -> None:
    """Raise InputError or CaptureError where the call is no training step that can be planned.

    Args:
        num_tensors: tensors among the call's arguments.
    """
    _refuse_uninitialized(model)
    refuse_wrappers(model)
    check_trains(model, num_tensors)
    switches = dict(global_switches())
    if switches["global module hooks"]:
        raise InputError(
            "remove the hooks of all modules (torch.nn.modules.module.register_module_forward_hook and its like) and register "
            "hooks on single modules: a plan calls none of the model's submodules, and would leave these hooks out"
        )
    if hooks_last_node(model):
        raise CaptureError(
            "the model has a hook by register_backward_hook, which gets the gradients of the last operation of its forward; a "
            "planned forward is one operation. Use register_full_backward_hook"
        )
    on = {name: value for name, value in switches.items() if name in _MODES and value}
    if on:
        raise InputError(
            f"{', '.join(on)} around the call: kernels are not run as they are, and a plan is made of kernels. Plan outside of "
            "the TorchDispatchMode, TorchFunctionMode, torch.func transform or tracer"
        )
    if isinstance(model, nn.RNNBase):  # a submodule of this kind runs as it is
        raise CaptureError(f"the model is a {type(model).__name__}: its fused kernel cannot be captured exactly")


def hooks_last_node(model: nn.Module) -> bool:
    """The model has backward hooks of the older kind: torch hangs them on the node of autograd's graph that made its output."""
    return bool(model._backward_hooks) and model._is_full_backward_hook is False


def check_trains(model: nn.Module, num_tensors: int) -> None:
    """Raise InputError where a call has no tensors, or the model does not train.

    Args:
        num_tensors: tensors among the call's arguments.
    """
    if not num_tensors:
        raise InputError(
            "pass one training batch, plan(model, budget, args=(x,), kwargs={'labels': y}): there are no example inputs. "
            "Tensors are found in tuples, lists and dicts; those in sets and other objects are not seen"
        )
    if not model.training:
        raise InputError("call model.train() first: the model is in eval mode, and a plan is of a training step")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "call requires_grad_() on the parameters that train: no parameter requires grad, and there is no backward to plan"
        )


def _refuse_uninitialized(model: nn.Module) -> None:
    """Raise InputError for a lazy module (nn.LazyLinear) whose parameters have no shape before its first forward."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise InputError(
                f"run one forward first, model(*args, **kwargs): {name} of a {kind} is uninitialized and gets its shape there"
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise InputError for a model that is, or holds, something around a module that no plan can hold, or sharded tensors."""
    for name, module in model.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__ != "builtins"]
        found = next((kind for kind in kinds if kind in WRAPPERS), None)
        if found is not None:
            cure, reason = WRAPPERS[found]
            what, it = (f"the model's submodule {name}", f"model.{name}") if name else ("the model", "model")
            raise InputError(f"{cure.format(it=it)}: {what} is {article(found)}, {reason}")
        if is_compiled_in_place(module):
            what = f"the model's submodule {name}" if name else "the model"
            raise InputError(
                f"plan before compile(), or leave it out and plan(..., compile=True): {what} was compiled by its own "
                "compile(), and what runs then cannot be planned"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _refuse_sharded(name, tensor)


def _refuse_sharded(name: str, tensor: torch.Tensor) -> None:
    kinds = [kind.__name__ for kind in type(tensor).__mro__]
    found = next((kind for kind in kinds if kind in SHARDED_TENSORS), "")
    if getattr(tensor, "_is_flat_param", False):  # FSDP1 marks them so
        found = "FlatParameter"
    if found:
        raise InputError(
            f"{name} is a {found}, of which each rank holds a part, and a plan is made of whole tensors. Plan the module "
            "before it is sharded: install(block, plan(block, budget, args)), then fully_shard(block)"
        )


def one_device(model: nn.Module, tensors: Sequence[torch.Tensor]) -> torch.device:
    """The device that the model and the tensors are on.

    Raises:
        InputError: they are on several, or on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise InputError(
                "give the model storage first, model.to_empty(device=...), or plan for a device that is not here, "
                f"plan(..., device='H100-80GB'): {name} is on the meta device"
            )
        _refuse_inference(name, tensor)
    held = (*model.parameters(), *model.buffers())
    devices = {t.device for t in held if t.dim() > 0} or {t.device for t in held}  # a scalar may lie on another device
    if len(devices) > 1:
        raise InputError(f"move the model to one device, model.to(...): it is spread over {sorted(map(str, devices))}")
    (device,) = devices
    for i, tensor in enumerate(tensors):
        _refuse_sharded(f"tensor input {i}", tensor)
        _refuse_inference(f"tensor input {i}", tensor)
        if tensor.device != device and tensor.dim() > 0:
            raise InputError(
                f"move the batch to the model's device, .to('{device}'): tensor input {i} is on {tensor.device}, the model on "
                f"{device}"
            )
    return device


def _refuse_inference(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_inference():
        raise InputError(
            f"make {name} outside of torch.inference_mode(), or clone it there: it is an inference tensor, which no backward "
            "can use"
        )


def check_gradients_recorded() -> None:
    """Raise InputError where autograd records nothing."""
    mode = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
    if not torch.is_grad_enabled():
        raise InputError(f"plan outside of {mode}: gradients are switched off here, and a plan is of a training step")


def check_absent_device(target: TargetDevice) -> None:
    """Raise InputError for what cannot be traced for a device that is not here."""
    if torch.is_autocast_enabled("cuda") or (target.capability is not None and torch.is_autocast_enabled("cpu")):
        raise InputError(
            f"autocast is on, and which kernels it casts for on {target.name} cannot be traced here: plan a model of the "
            "dtype it trains in, model.to(torch.bfloat16), or plan on the device"
        )
