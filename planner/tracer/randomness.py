"""Random kernels: which they are, and the generator states that let the backward run them again exactly."""

from __future__ import annotations

import torch
from torch import fx

from planner._compat.internals import OpOverload
from planner.profiler import observed
from planner.profiler.observed import observation_of
from planner.tracer import kernels

_INERT = {"dropout_p": 0.0, "p": 0.0, "train": False}
"""Arguments at which a kernel that can draw random numbers draws none."""


_DIVISIONS = (torch.ops.aten.div.Scalar, torch.ops.aten.div.Tensor)


def draw_as_eager(graph: fx.Graph, device: torch.device) -> None:
    """Random draws as eager makes them, and dropout's noise taken apart.

    Eager's CPU dropout multiplies by `empty_like(x).bernoulli_(keep).div_(keep)`, in x's dtype. Drawing is by far its
    most expensive part (6 times all the rest, measured), and the draws fit a byte each: drawn as bytes, with the
    noise made of them by a kernel of its own, a plan can keep a quarter of the bytes and repeat only the cheap part.
    The CPU generator yields the same draws for every dtype, so the noise keeps its bits. That was not checked on CUDA,
    where dropout is a fused kernel with a small mask already: there the draws stay as they are.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.p):
        like = node.meta["val"]  # laid out as an empty_like of what is dropped, which is not read: that lets it go
        keep, dtype = node.args[1], like.dtype
        scaled = [user for user in node.users if user.target in _DIVISIONS and user.args[0] is node]
        only_scaled = 0 < len(scaled) == len(node.users) and all(isinstance(div.args[1], float) for div in scaled)
        if only_scaled and device.type == "cpu":
            for div in scaled:
                div.target, div.args = kernels.noise, (node, div.args[1], dtype)
            dtype = torch.uint8
            node.meta["val"] = node.meta["val"].to(dtype)
        node.target, node.args = kernels.bernoulli, (keep, tuple(like.shape), tuple(like.stride()), dtype, device)


def is_random(node: fx.Node) -> bool:
    """The node draws from the default generator."""
    if node.target is kernels.bernoulli:
        return True
    if node.target in (kernels.part, kernels.part_backward):
        return bool(node.meta["part"].draws[node.target is kernels.part_backward])
    found = observation_of(node) if observed.is_foreign(node.target) else None
    if found is not None and found.draws:
        return True
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {
        **{a.name: a.default_value for a in node.target._schema.arguments},
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    return not any(name in given and given[name] == inert and given[name] is not None for name, inert in _INERT.items())


def is_repeatable(node: fx.Node) -> bool:
    """A second run gives the same bits, the generator put back: so torch's kernels do, and others' that were seen to."""
    if not isinstance(node.target, OpOverload) or not observed.is_foreign(node.target):
        return True
    found = observation_of(node)
    return found is not None and found.repeatable


def save_rng_states(graph: fx.Graph, last_forward: fx.Node | None, device: torch.device) -> dict[str, str]:
    """Put a node that saves the generator's state before every random forward kernel; kernel name -> node name."""
    states: dict[str, str] = {}
    state_bytes = torch.get_rng_state().numel() if device.type == "cpu" else 0  # of a CUDA generator's lie in host memory
    for node in list(graph.nodes):
        if node.op == "call_function" and is_random(node):
            with graph.inserting_before(node):
                state = graph.call_function(kernels.rng_state, (device,))
            state.meta["val"] = torch.empty(state_bytes, dtype=torch.uint8, device="meta")
            states[node.name] = state.name
        if node is last_forward:
            break
    return states
