"""What the tracer returns: one step of the model as an fx graph in normal form, and how a call maps onto it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner._compat.switches import Autocast
from planner.graph.graph import Kind
from planner.graph.source import Source
from planner.tracer.call import CallSpec
from planner.tracer.host.fingerprint import TensorKey
from planner.tracer.host.kernels import RecordedRead
from planner.tracer.host.model_keys import ModuleKey
from planner.tracer.host.state import HostState
from planner.tracer.opaque.call import OpaqueCall


@dataclass(frozen=True, slots=True)
class Input:
    """A placeholder of the joint graph.

    Attributes:
        node: its name.
        kind: PARAM, BUFFER, INPUT or TANGENT.
        key: the parameter's or buffer's qualified name; the position among the call's tensor leaves and, after these, the
            tensors of `Joint.host.state`; for the gradient of an output the position among the results; for a captured
            constant "constant:N".
        mutated: the forward writes into it (running statistics, in-place ops on inputs).
        is_leaf: of autograd, in the captured call; None where its gradient is the same whether it is one or not.
    """

    node: str
    kind: Kind
    key: str | int
    mutated: bool = False
    is_leaf: bool | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One leaf of the model's output.

    Attributes:
        name: how the user reaches it, for messages: "loss", "[0]", ...
        result: position among the graph's results; None for a constant, or an input that is returned.
        differentiated: backward starts from it.
        requires_grad: eager's output requires grad (it does not when False).
        constant: the leaf itself where it is no tensor.
        input: position among the call's tensor leaves, then `Joint.host.state`, where it is an input that is returned.
        left_out: None takes the place of what eager returns (a key-value cache).
        is_inner: autograd reaches it from another result, too.
        is_leaf: eager's has no history and requires grad; no result depends on it.
    """

    name: str
    result: int | None
    differentiated: bool = False
    requires_grad: bool = False
    constant: Any = None
    input: int | None = None
    left_out: bool = False
    is_inner: bool = False
    is_leaf: bool = False


@dataclass(frozen=True, slots=True)
class HostRead:
    """A tensor value that Python read during capture, so that the graph is only right for this value."""

    node: str
    value: bool | int | float | complex
    source: Source


@dataclass(frozen=True, slots=True)
class Joint:
    """The joint forward + backward graph in normal form.

    Normal form (passes/normalize.py): ATen kernels and those of planner.kernels.custom only, forward first; every mutation is a
    `copy_` node of its own; random forward kernels are preceded by a node that saves the generator's state; every gradient is a
    storage of its own, laid out as its parameter; no constants hidden in get_attr nodes; no detach nodes.

    Attributes:
        graph: placeholders as `inputs`, one output node of (forward leaves in graph order, gradients).
        inputs: one per placeholder.
        outputs: one per leaf of the model's output.
        results: nodes of the forward's results, in the graph's output order.
        gradients: (input, node name) of every input that gets a gradient.
        uses: by the placeholder of an input with a gradient, how many operations' gradients reach it, which eager adds up;
            negative where one of them may be none, or a sum itself.
        rng_states: random forward node -> node that saved the generator's state before it.
        num_forward_nodes: graph nodes up to and including the forward's last one.
        constants: tensors that the model holds as plain attributes, by placeholder name.
        guards: a graph from the call's inputs to the tensors that Python read; None when it read none.
        host_reads: what it read, in the order of the guards' outputs.
        call: how calls map onto the graph.
        sources: where in the user's code each node comes from, by name.
        device: where the step runs.
        weights: name and metadata of the model's parameters and buffers.
        modules: the model's modules.
        left: one Output per result that the forward leaves in Python state.
        host: what Python does beside the kernels.
        opaque_calls: recorded calls of opaque modules, by key.
        saved_handles: names of the nodes that hold autograd graphs of opaque modules.
        absent_device: name of the device whose kernels these are, where it is not here; "" where they are this machine's.
        autocast, switches: the modes of torch that it was captured in.
        recorded: (kernel, value) of every host read, to capture the call again without running it; None if no forward was run.
        refused: the first error of captures that failed, after which submodules became opaque; "" where none failed.
        repeats: kind of equal blocks that were captured once -> names of these submodules (planner/tracer/units).
    """

    graph: fx.Graph
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    results: tuple[str, ...]
    gradients: tuple[tuple[Input, str], ...]
    rng_states: dict[str, str]
    num_forward_nodes: int
    constants: dict[str, torch.Tensor]
    guards: fx.Graph | None
    host_reads: tuple[HostRead, ...]
    call: CallSpec
    sources: dict[str, Source]
    device: torch.device
    uses: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[tuple[str, TensorKey], ...] = ()
    modules: tuple[ModuleKey, ...] = ()
    left: tuple[Output, ...] = ()
    host: HostState = field(default_factory=HostState)
    opaque_calls: Mapping[str, OpaqueCall] = field(default_factory=dict)
    saved_handles: frozenset[str] = frozenset()
    absent_device: str = ""
    autocast: Autocast = None
    switches: tuple[tuple[str, Any], ...] = ()
    recorded: tuple[RecordedRead, ...] | None = None
    refused: str = ""
    repeats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
