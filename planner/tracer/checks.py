"""What a training step must be like to be planned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from planner.errors import CaptureError, InputError
from planner.tracer.elsewhere import Elsewhere


def check_trainable(model: nn.Module, num_tensors: int) -> None:
    """Raise what says why this is no training step that can be planned; `num_tensors`: among the call's arguments."""
    if not num_tensors:
        raise InputError("no example inputs: pass one training batch, plan(model, budget, args=(x,), kwargs={'labels': y})")
    if not model.training:
        raise InputError("the model is in eval mode; a training step is planned in training mode: call model.train() first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("no parameter requires grad: there is no backward to plan")
    if isinstance(model, nn.RNNBase):  # a submodule of this kind runs as it is
        raise CaptureError(f"the model is a {type(model).__name__}: its fused kernel cannot be captured exactly")


def one_device(model: nn.Module, tensors: Sequence[torch.Tensor]) -> torch.device:
    """The one device everything is on, or an InputError that says what to change."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise InputError(
                f"{name} is on the meta device: give the model storage first, model.to_empty(device=...), "
                "or plan for a device that is not here, plan(..., device='H100-80GB')"
            )
    held = (*model.parameters(), *model.buffers())
    devices = {t.device for t in held if t.dim() > 0} or {t.device for t in held}  # a scalar may lie elsewhere beside others
    if len(devices) > 1:
        raise InputError(f"the model is spread over {sorted(map(str, devices))}; a plan is made for one device")
    (device,) = devices
    for i, tensor in enumerate(tensors):
        if tensor.device != device and tensor.dim() > 0:
            raise InputError(f"tensor input {i} is on {tensor.device}, the model on {device}: move it with .to('{device}')")
    return device


def check_elsewhere(elsewhere: Elsewhere) -> None:
    """Raise InputError for what a trace for a device that is not here cannot hold."""
    if torch.is_autocast_enabled("cuda") or (elsewhere.capability is not None and torch.is_autocast_enabled("cpu")):
        raise InputError(
            f"autocast is on, and which kernels it casts for on {elsewhere.name} cannot be traced here: plan a model of the "
            "dtype it trains in, model.to(torch.bfloat16), or plan on the device"
        )
