"""The one home of torch's private names. Everything here is probed by feature, never by version.

When a torch release moves something, `selfcheck()` and tests/test_torch_private.py name what moved.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
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
from torch.fx.graph import _BoxedCodeGen
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as untraced

from planner.errors import CaptureError
from planner.profiler import observed
from planner.profiler.kernel import call_key

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
    "collectives_forbidden",
    "export_joint",
    "fake_inputs",
    "fake_mode",
    "global_switches",
    "in_backward",
    "keeps_graph",
    "kernels_chosen",
    "kernels_kept",
    "kernels_replaced",
    "key_value_store",
    "pytree",
    "ranks_of_group",
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
            return torch.empty_strided(look.shape, look.stride, dtype=getattr(torch, look.dtype), device=device)

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
    look otherwise than their fakes is noted in `node.meta[TRACED]` (planner.profiler.observed).

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
        stack.enter_context(_grouped_mm_of_any_dtype())
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
    raise CaptureError(f"the graph hands out a result of a kind that cannot be planned: {type(desc).__name__}")


# Kernels for which torch registers a Python decomposition that differs from what eager runs. Left out on
# purpose: LSTM and GRU, which cannot be traced fused, and native_batch_norm, whose functional form is exact
# and says what it writes.
_KEPT_KERNELS = (
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_upsample_lanczos2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "cudnn_batch_norm",
    "dropout",
    "hardshrink",
    "matmul",
    "miopen_batch_norm",
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "softshrink",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_trilinear3d",
)
_REPLACING_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


@contextlib.contextmanager
def kernels_kept() -> Iterator[None]:
    """While tracing, keep the kernels eager runs: torch's Python decompositions of them step aside."""
    removed: list[tuple[Any, Any, Callable[..., Any]]] = []
    try:
        for name in _KEPT_KERNELS:
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                op = getattr(packet, overload)
                for key in _REPLACING_KEYS:
                    if key in op.py_kernels:
                        removed.append((op, key, op.py_kernels.pop(key)))
                        op._dispatch_cache.clear()
        yield
    finally:
        for op, key, kernel in removed:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextlib.contextmanager
def kernels_chosen(choices: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """While tracing, the composite operators in `choices` run what stands there, whatever device their tensors are on."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    before = {op: op.py_kernels.get(key) for op in choices}
    try:
        for op, choice in choices.items():
            op.py_kernels[key] = choice
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernel in before.items():
            op.py_kernels.pop(key, None)
            if kernel is not None:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextlib.contextmanager
def kernels_replaced(replacements: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """While tracing, these operators run what stands there instead, in the backward too."""
    keys = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.AutogradMeta)
    before = {(op, key): op.py_kernels.get(key) for op in replacements for key in keys}
    try:
        for op, key in before:
            op.py_kernels[key] = replacements[op]
            op._dispatch_cache.clear()
        yield
    finally:
        for (op, key), kernel in before.items():
            op.py_kernels.pop(key, None)
            if kernel is not None:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


def in_backward() -> bool:
    """Autograd's engine is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextlib.contextmanager
def _grouped_mm_of_any_dtype() -> Iterator[None]:
    """While tracing, the fake grouped matmul (for experts) takes float32, as the real one does; before 2.15 it does not."""
    home = torch._meta_registrations
    names = ("_meta_grouped_mm_common", "_create_grouped_mm_output_tensor")
    if not all(hasattr(home, name) for name in names):
        yield
        return
    checked, made = (getattr(home, name) for name in names)

    def common(mat_a: Any, mat_b: Any, scale_a: Any = None, scale_b: Any = None, offs: Any = None, **options: Any) -> Any:
        if scale_a is None and scale_b is None and mat_a.dtype is mat_b.dtype is torch.float32:
            return made(mat_a, mat_b, offs, options.get("out_dtype"))
        return checked(mat_a, mat_b, scale_a=scale_a, scale_b=scale_b, offs=offs, **options)

    home._meta_grouped_mm_common = common  # type: ignore[assignment]
    try:
        yield
    finally:
        home._meta_grouped_mm_common = checked


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


@contextlib.contextmanager
def collectives_forbidden() -> Iterator[list[str]]:
    """While entered, torch.distributed's operators raise, on CPU and CUDA tensors; yields the names of those that were called.

    In a forked child, or on one rank alone, they would wait for ever.
    """
    refused: list[str] = []
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        yield refused
        return

    def refuse(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            refused.append(name)
            raise RuntimeError(f"{name} is not run while a kernel is looked at")

        return call

    known = [name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("c10d", "_c10d_functional")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of every kernel that is replaced
            for name in sorted(set(known)):
                space, _, op = name.partition("::")
                for key in ("CPU", "CUDA") if space in libraries else ():
                    libraries[space].impl(op, refuse(name), key, allow_override=True)
        yield refused
    finally:
        for library in libraries.values():
            library._destroy()


def key_value_store() -> Any:
    """The store by which the processes of torch.distributed find each other; None where it is not in use."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def ranks_of_group(name: str) -> tuple[list[int], int]:
    """The ranks of a process group, by its name ('' for the default one), and this process's rank, all in the world."""
    c10d: Any = torch.distributed.distributed_c10d
    group = c10d._resolve_process_group(name) if name else c10d._get_default_group()
    return torch.distributed.get_process_group_ranks(group), torch.distributed.get_rank()


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """The nodes (or None) that a graph hands out."""
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


def global_switches() -> tuple[tuple[str, Any], ...]:
    """Torch's switches that decide which kernels run or what a call means, by name; the same for equal states."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return (
        ("deterministic algorithms", torch.get_deterministic_debug_mode()),
        ("fill_uninitialized_memory", getattr(torch.utils.deterministic, "fill_uninitialized_memory", None)),
        ("sdpa: flash", cuda.flash_sdp_enabled()),
        ("sdpa: memory-efficient", cuda.mem_efficient_sdp_enabled()),
        ("sdpa: math", cuda.math_sdp_enabled()),
        ("sdpa: cudnn", cuda.cudnn_sdp_enabled()),
        ("sdpa: math in low precision", cuda.fp16_bf16_reduction_math_sdp_allowed()),
        ("sdpa: order of kernels", tuple(map(int, torch._C._get_sdp_priority_order()))),
        ("float32 matmul precision", torch.get_float32_matmul_precision()),
        ("cuda tf32", cuda.matmul.allow_tf32),
        ("cuda fp16 reduction", cuda.matmul.allow_fp16_reduced_precision_reduction),
        ("cuda bf16 reduction", cuda.matmul.allow_bf16_reduced_precision_reduction),
        ("cudnn", (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)),
        ("mkldnn", torch._C._get_mkldnn_enabled()),
        ("mkldnn deterministic", getattr(mkldnn, "deterministic", None)),
        ("default dtype", torch.get_default_dtype()),
        ("default device", str(torch.get_default_device())),
        ("autocast cache", torch.is_autocast_cache_enabled()),
        ("inference mode", torch.is_inference_mode_enabled()),
        ("forward-mode AD", torch.autograd.forward_ad._current_level),
        ("torch.func transforms", torch._C._functorch.maybe_current_level() or 0),
        ("function modes", torch._C._len_torch_function_stack() - _device_modes()),
        ("dispatch modes", torch._C._len_torch_dispatch_stack()),
        ("global module hooks", _num_global_hooks()),
        ("tracing", torch.jit.is_tracing() or torch.compiler.is_exporting()),
        ("tracing by fx", getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", False)),
    )


def _device_modes() -> int:
    """A default device is a function mode, and compared by itself."""
    return sum(type(mode).__name__ == "DeviceContext" for mode in torch.overrides._get_current_function_mode_stack())


def _num_global_hooks() -> int:
    module = torch.nn.modules.module
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name, {}).values()]
    return sum(not str(getattr(hook, "__module__", "")).startswith("planner.") for hook in hooks)  # another thread may capture


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
