"""What keeps the trace equal to eager: host reads recorded and replayed, the user's lines, a model left as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.fx.traceback
from torch import nn

from planner._torch import DataDependentOutputException, TorchDispatchMode
from planner.errors import CaptureError

# Kernels that hand a tensor's value to Python.
HOST_READS = frozenset({torch.ops.aten._local_scalar_dense.default})

_PACKAGE = str(Path(__file__).parent.parent)
_CALLER = str(Path(__file__).with_name("capture.py"))  # who calls the model: frames beyond are not the model's
_TORCH = str(Path(torch.__file__).parent)


class ModuleStack:
    """The qualified name of the submodule whose forward is running, kept by hooks on the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []

    def __str__(self) -> str:
        return self._running[-1] if self._running else ""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """While entered, forwards of the model's submodules are followed."""

        def enter(module: nn.Module, _args: Any) -> None:
            if module in self._names:
                self._running.append(self._names[module])

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if module in self._names and self._running:
                self._running.pop()

        hooks = nn.modules.module
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()


def user_line() -> str:
    """'file.py:12' of the innermost running frame of the model's own code, else of torch's."""
    frame: FrameType | None = sys._getframe(1)
    inside_torch = ""
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file = frame.f_code.co_filename
        line = f"{Path(file).name}:{frame.f_lineno}"
        if file.startswith(_TORCH):
            inside_torch = inside_torch or line
        elif not file.startswith(_PACKAGE):
            return line
        frame = frame.f_back
    return inside_torch


class RecordReads(TorchDispatchMode):
    """In a real forward: remembers every tensor value that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, bool | int | float | complex]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in HOST_READS:
            self.values.append((str(func), result))
        return result


class Tracing(TorchDispatchMode):
    """Inside the traced forward: notes where each kernel was called and answers host reads from a recording.

    Attributes:
        read: (tensor read, value, source) per host read, in order; the tensors are traced.
        where: source of the kernel called last, for errors.
    """

    def __init__(self, modules: ModuleStack, recorded: Sequence[tuple[str, Any]] | None) -> None:
        super().__init__()
        self._modules = modules
        self._recorded = recorded
        self.read: list[tuple[torch.Tensor, Any, str]] = []
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.where = f"{self._modules} {user_line()}".strip()
        if func in HOST_READS:
            return self._answer(func, args)
        with torch.fx.traceback.annotate({"planner_source": self.where}):
            return func(*args, **(kwargs or {}))

    def _answer(self, func: Any, args: Any) -> Any:
        if self._recorded is None:
            raise DataDependentOutputException(func)
        position = len(self.read)
        if position >= len(self._recorded) or self._recorded[position][0] != str(func):
            raise CaptureError(
                f"the model read other tensor values while traced than in a real forward ({func} at {self.where}); "
                "its control flow depends on something a trace cannot hold"
            )
        value = self._recorded[position][1]
        self.read.append((args[0], value, self.where))
        return value


def record_host_reads(model: nn.Module, call: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> list[tuple[str, Any]]:
    """Run one real forward and return the tensor values that Python read, in order.

    Nothing is kept for a backward, so it needs no more memory than an inference forward.
    """

    def refuse(_: Any) -> Any:
        raise CaptureError("backward was called inside the model's forward")

    record = RecordReads()
    with (
        untouched(model, [*model.buffers(), *inputs]),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse),
        record,
    ):
        call()
    return record.values


@contextlib.contextmanager
def untouched(model: nn.Module, tensors: Sequence[torch.Tensor] = ()) -> Iterator[set[tuple[int, str]]]:
    """Put back what running or tracing the model changes: attributes, RNG state and the contents of `tensors`.

    Yields a set that holds, afterwards, (position of the module, name) of the attributes that were changed.
    """
    changed: set[tuple[int, str]] = set()
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    registered = [(dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in modules]
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        try:
            yield changed
        finally:
            for i, (module, attributes) in enumerate(zip(modules, before, strict=True)):
                now = vars(module)
                changed.update((i, name) for name in attributes if now.get(name, changed) is not attributes[name])
            with torch.no_grad():
                for tensor, content in contents:
                    tensor.copy_(content)
            for module, attributes, (parameters, own_buffers, children) in zip(modules, before, registered, strict=True):
                vars(module).clear()
                vars(module).update(attributes)
                _refill(module._parameters, parameters)
                _refill(module._buffers, own_buffers)
                _refill(module._modules, children)


def _refill(live: dict[str, Any], old: dict[str, Any]) -> None:
    live.clear()
    live.update(old)
