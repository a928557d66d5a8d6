"""Forward and backward of a module as one functional ATen graph, by torch's ahead-of-time autograd."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import OpOverload

from planner._compat.fake_tensors import FOLLOWS_OBSERVED, FOREIGN_CALLS
from planner._compat.kernels import grouped_mm_of_any_dtype, kernels_chosen, kernels_kept
from planner.errors import CaptureError
from planner.kernels import observed
from planner.kernels.calls import call_key


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
        stack.callback(FOLLOWS_OBSERVED.reset, FOLLOWS_OBSERVED.set(not choices))
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


@contextlib.contextmanager
def _foreign_calls_kept() -> Iterator[None]:
    """While tracing, calls of operators that are not torch's stay in the graph, used or not: nobody knows what else they do."""
    kept = _Kept()
    token = FOREIGN_CALLS.set(kept)
    try:
        yield
    finally:
        FOREIGN_CALLS.reset(token)
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
