"""Random kernels: draws as eager makes them, and the generator states that let the backward run them again exactly."""

from __future__ import annotations

import torch
from torch import fx

from planner.kernels import custom
from planner.kernels.facts import is_random

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
                div.target, div.args = custom.noise, (node, div.args[1], dtype)
            dtype = torch.uint8
            node.meta["val"] = node.meta["val"].to(dtype)
        node.target, node.args = custom.bernoulli, (keep, tuple(like.shape), tuple(like.stride()), dtype, device)


def save_rng_states(graph: fx.Graph, last_forward: fx.Node | None, device: torch.device) -> dict[str, str]:
    """Put a node that saves the generator's state before every random forward kernel; kernel name -> node name."""
    states: dict[str, str] = {}
    state_bytes = torch.get_rng_state().numel() if device.type == "cpu" else 0  # of a CUDA generator's lie in host memory
    for node in list(graph.nodes):
        if node.op == "call_function" and is_random(node):
            with graph.inserting_before(node):
                state = graph.call_function(custom.rng_state, (device,))
            state.meta["val"] = torch.empty(state_bytes, dtype=torch.uint8, device="meta")
            states[node.name] = state.name
        if node is last_forward:
            break
    return states
