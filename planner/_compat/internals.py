"""The one home of torch's private names. Everything here is probed by feature, never by version.

When a torch release moves something, `selfcheck()` and tests/unit/compat/test_internals.py name what moved.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch._meta_registrations
import torch.fx.traceback
from torch import fx, nn
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.graph import _BoxedCodeGen
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as untraced

from planner._compat.kernels import grouped_mm_of_any_dtype, kernels_chosen, kernels_kept, kernels_replaced
from planner.errors import CaptureError
from planner.kernels import observed
from planner.kernels.calls import call_key

__all__ = [
    "KEEPS_GRAPH_IMPORT",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "ExportedJoint",
    "FakeTensor",
    "HigherOrderOperator",
    "InPlaceCollectiveError",
    "OpOverload",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "box",
    "calls_intercepted",
    "export_joint",
    "fake_inputs",
    "fake_mode",
    "in_backward",
    "keeps_graph",
    "kernels_chosen",
    "kernels_kept",
    "kernels_replaced",
    "pytree",
    "release_saved",
    "results",
    "selfcheck",
    "stand_ins",
    "storage_id",
    "tensors_alike",
    "untraced",
]


@dataclass(frozen=True, slots=True)
class ExportedJoint:
    """A captured joint graph, its inputs and outputs told apart by plain words.

    Attributes:
        graph_module: the joint graph as torch made it.
        inputs: per placeholder ("param", name), ("buffer", name), ("input", index) or ("tangent", output index).
        outputs: per forward output ("output", index) or ("mutation", *input); then per non-tangent
            input ("gradient", *input). In the order of the graph's output node.
    """

    graph_module: fx.GraphModule
    inputs: tuple[tuple[Any, ...], ...]
    outputs: tuple[tuple[Any, ...], ...]


class InPlaceCollectiveError(Exception):
    """A traced call communicates by one of torch.distributed's operators that write in place, which no graph can hold."""


_FOLLOWS: ContextVar[bool] = ContextVar("fake tensors follow what was observed on this machine", default=True)


def fake_mode() -> FakeTensorMode:
    """While entered, tensors are made without data; real ones, as a model's own constants, are let in.

    Fake tensors look as the real ones do, where a kernel was seen to return other strides than its fake (profiler/observed.py).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = mode.dispatch

    def empty(look: observed.Look, device: torch.device) -> torch.Tensor:
        with mode:
            return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device=device)

    def dispatch(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "c10d":
            raise InPlaceCollectiveError(str(func))
        kept = _KEPT_CALLS.get()
        if kept is not None and observed.is_foreign(func):
            kept.add(func)
        out = own(func, types, args, kwargs or {})
        if func is torch.ops.aten.bernoulli.p:  # the real kernel draws into an empty_like; the fake one is contiguous
            with mode:
                return torch.empty_like(args[0])
        if str(func) == "_c10d_functional.wait_tensor.default":  # the real one returns its argument, the fake one a copy
            with mode:
                return torch.ops.aten.alias.default(args[0])
        return observed.as_observed(func, args, kwargs or {}, out, empty) if _FOLLOWS.get() else out

    mode.dispatch = dispatch  # type: ignore[method-assign]  # not a subclass: higher-order operators look for this very type
    return mode


def fake_inputs(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stand-ins without data, static in shape, under one mode: that of the tensors which are fake already, as these stay."""
    mode = _mode_of(tensors)
    return [t if isinstance(t, FakeTensor) else mode.from_tensor(t, static_shapes=True) for t in tensors]


def stand_ins(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake CPU tensors that look like these, which may be real, fake or on the meta device; one for a tensor given twice."""
    with _mode_of(tensors):
        made = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in tensors}
    return [made[id(t)].requires_grad_(t.requires_grad) for t in tensors]


def _mode_of(tensors: Sequence[torch.Tensor]) -> FakeTensorMode:
    return next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None) or fake_mode()


def export_joint(
    module: nn.Module, fakes: Sequence[torch.Tensor], choices: Mapping[OpOverload, Callable[..., Any]] | None = None
) -> ExportedJoint:
    """Trace forward and backward of `module(*fakes)` into one functional ATen graph.

    Parameters and buffers are named as in `module`. Metadata set with `torch.fx.traceback.annotate`
    survives on `node.meta["custom"]`, on backward nodes too. `choices`: see `kernels_chosen`. A call whose outputs may really
    look otherwise than their fakes is noted in `node.meta[TRACED]` (planner.kernels.observed).

    Raises:
        CaptureError: an input or output of a kind that is not understood.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_fakes())
        stack.enter_context(_foreign_calls_kept())
        stack.callback(_FOLLOWS.reset, _FOLLOWS.set(not choices))
        stack.enter_context(torch._functorch.config.patch(backward_pass_autocast="off"))
        stack.enter_context(kernels_kept())
        stack.enter_context(kernels_chosen(choices or {}))
        stack.enter_context(grouped_mm_of_any_dtype())
        stack.enter_context(fx.traceback.preserve_node_meta())
        joint = aot_export_joint_with_descriptors(stack, module, tuple(fakes))
        graph_module = joint._aot_graph_capture.graph_module
    for node in graph_module.graph.nodes:
        if isinstance(node.target, OpOverload) and not choices and observed.needs_run(node):
            node.meta[observed.TRACED] = call_key(node.target, node.args, node.kwargs)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    output = graph_module.graph.output_node()
    inputs = tuple(_input_role(node.meta["desc"]) for node in placeholders)
    plain = [role for role in inputs if role[0] != "tangent"]
    descs = output.meta["desc"]
    forward = descs[: len(descs) - len(plain)]
    outputs = tuple(_output_role(desc) for desc in forward) + tuple(("gradient", *role) for role in plain)
    return ExportedJoint(graph_module, inputs, outputs)


@contextlib.contextmanager
def _quiet_fakes() -> Iterator[None]:
    """What fake kernels raise is raised to the user as an error of ours; torch logs it with its own frames as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Kept(set[Any]):
    """Operators whose calls no elimination of dead code takes out."""

    def add(self, op: Any) -> None:
        if op not in torch.fx.node._side_effectful_functions:
            torch.fx.node._side_effectful_functions.add(op)
            super().add(op)


_KEPT_CALLS: ContextVar[set[Any] | None] = ContextVar("operators from outside of torch that were traced", default=None)


@contextlib.contextmanager
def _foreign_calls_kept() -> Iterator[None]:
    """While tracing, calls of operators that are not torch's stay in the graph, used or not: nobody knows what else they do."""
    kept = _Kept()
    token = _KEPT_CALLS.set(kept)
    try:
        yield
    finally:
        _KEPT_CALLS.reset(token)
        torch.fx.node._side_effectful_functions.difference_update(kept)


def keep_layout(tensor: torch.Tensor) -> None:
    """Give a traced tensor that a kernel has written into the layout back that it has in eager.

    Functionalization replaces a write (`x.masked_fill_`) by a kernel that returns a new tensor (`masked_fill`), which may be
    laid out otherwise than `x`; the kernels that read it may then be others, with other bits.
    """
    if not isinstance(tensor, FunctionalTensor) or tensor.layout is not torch.strided:
        return
    torch._sync(tensor)
    if torch._from_functional_tensor(tensor.elem).stride() == tensor.stride():
        return
    fresh: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    fresh.copy_(tensor)
    functional = tensor.elem
    torch._functionalize_replace(functional, torch._from_functional_tensor(fresh.elem))
    torch._functionalize_commit_update(functional)
    torch._sync(tensor)


def written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call writes into, by its schema."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | dict(kwargs)
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = pytree.tree_leaves([given.get(name) for name in names])
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _input_role(desc: Any) -> tuple[Any, ...]:
    match desc:
        case descriptors.ParamAOTInput():
            return ("param", desc.target)
        case descriptors.BufferAOTInput():
            return ("buffer", desc.target)
        case descriptors.PlainAOTInput():
            return ("input", desc.idx)
        case descriptors.TangentAOTInput(output=descriptors.PlainAOTOutput() as output):
            return ("tangent", output.idx)
        case descriptors.TangentAOTInput():
            raise CaptureError(
                "the model's forward writes a tensor that requires grad into a buffer or an argument, whose gradients would go "
                "on into the next call. Write a detached one"
            )
    if "Token" in type(desc).__name__:
        raise CaptureError(
            "the model runs an operator with side effects (it prints, or calls a TorchScript object), which no plan can hold"
        )
    raise CaptureError(f"the graph takes an input of a kind that cannot be planned: {type(desc).__name__}")


def _output_role(desc: Any) -> tuple[Any, ...]:
    match desc:
        case descriptors.PlainAOTOutput():
            return ("output", desc.idx)
        case descriptors.InputMutationAOTOutput():
            return ("mutation", *_input_role(desc.mutated_input))
    raise CaptureError(f"the graph returns a result of a kind that cannot be planned: {type(desc).__name__}")


def in_backward() -> bool:
    """Autograd's engine is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextlib.contextmanager
def calls_intercepted(
    modules: Mapping[nn.Module, str], handle: Callable[[nn.Module, str, Any, Any, Callable[[], Any]], Any]
) -> Iterator[None]:
    """While entered, `module(*args, **kwargs)` of the outermost of `modules` is `handle(module, name, args, kwargs, run)`.

    `run()` makes the call as it would have been. As fx's own tracer does, by way of nn.Module's `__call__`.
    """
    call = nn.Module.__call__
    inside = False
    thread = threading.get_ident()

    def intercepted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or threading.get_ident() != thread or self not in modules:
            return call(self, *args, **kwargs)
        inside = True
        try:
            return handle(self, modules[self], args, kwargs, lambda: call(self, *args, **kwargs))
        finally:
            inside = False

    nn.Module.__call__ = intercepted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """The nodes (or None) that a graph returns."""
    handed: Any = graph.output_node().args[0]
    return tuple(handed)


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage: equal for a fake tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


def tensors_alike(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], bool]:
    """A quick check whether other tensors are of the same type, shape, strides, dtype, device and requires_grad as these.

    False may also mean that the thread's dispatch state (autocast, ...) is another one. Dynamo's own check, 0.1 us a tensor;
    where torch has none, the answer is always False.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    if guards is None or not hasattr(guards, "TensorGuards"):
        return lambda others: False
    check = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return lambda others: bool(check(*others))


def box(graph: fx.Graph) -> None:
    """Make the graph's code take one list and empty it, so that inputs can be freed midway."""
    graph.set_codegen(_BoxedCodeGen())


KEEPS_GRAPH_IMPORT = "from torch._C._autograd import _get_current_graph_task_keep_graph"
"""What `keeps_graph` needs where its source is written into an exported file."""


def keeps_graph() -> bool:
    """The backward that runs now was told to keep its graph (retain_graph=True)."""
    return bool(_get_current_graph_task_keep_graph())


def release_saved(ctx: Any) -> list[torch.Tensor]:
    """Take the saved tensors off an autograd context; unless the graph is retained, it forgets them."""
    saved = list(ctx.saved_tensors)
    if not keeps_graph():
        ctx.maybe_clear_saved_tensors()
    return saved


def selfcheck() -> list[str]:
    """What of this file no longer works on the installed torch: a line each; empty is good.

    Captures a small model that has a little of everything and looks at what came out.
    """
    problems = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x).sum(),)

    try:
        joint = export_joint(Loss(), fake_inputs([torch.zeros(2, 3)]))
    except Exception as error:
        return [f"torch {torch.__version__}: the joint graph cannot be captured: {type(error).__name__}: {error}"]
    kinds = {role[0] for role in joint.inputs}
    if kinds != {"param", "buffer", "input", "tangent"}:
        problems.append(f"torch {torch.__version__}: the joint graph's inputs are told apart as {sorted(kinds)}")
    if sum(role[0] == "mutation" for role in joint.outputs) != 3:
        problems.append(f"torch {torch.__version__}: batch norm's three buffer updates are not among {joint.outputs}")
    handed = results(joint.graph_module.graph)
    if sum(role[0] == "gradient" and node is not None for role, node in zip(joint.outputs, handed, strict=True)) != 4:
        problems.append(f"torch {torch.__version__}: not every parameter has a gradient among the graph's outputs")
    if not tensors_alike([torch.zeros(2)])([torch.ones(2)]) or tensors_alike([torch.zeros(2)])([torch.zeros(3)]):
        problems.append(f"torch {torch.__version__}: Dynamo's TensorGuards no longer compare tensors: guards take longer")
    if not all(isinstance(node.meta.get("val"), FakeTensor) for node in handed if node is not None):
        problems.append(f"torch {torch.__version__}: graph nodes carry no fake tensors in meta['val']")
    return problems
