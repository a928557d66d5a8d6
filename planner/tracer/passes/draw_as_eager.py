"""Draw random numbers as eager does, with dropout's draws and its scaling in separate kernels."""

from __future__ import annotations

import torch

from planner.kernels import custom
from planner.tracer.passes.graph import TracedGraph

_DIVISIONS = (torch.ops.aten.div.Scalar, torch.ops.aten.div.Tensor)


def draw_as_eager(traced: TracedGraph) -> None:
    """Replace functional `bernoulli` by a kernel that draws as eager's in-place one.

    Eager's CPU dropout multiplies by `empty_like(x).bernoulli_(keep).div_(keep)`, in x's dtype. Drawing is by far its most
    expensive part (6 times all the rest, measured), and a draw fits into a byte: drawn as bytes, with the scaled noise made
    by a kernel of its own, a plan can keep a quarter of the bytes and repeat only the cheap part. The CPU generator yields
    the same draws for every dtype, so the noise keeps its bits. That was not checked on CUDA, where dropout is a fused kernel
    with a small mask already: there the draws keep their dtype.
    """
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.p):
        like = node.meta["val"]  # laid out as an empty_like of what is dropped, which is not read: it can be freed
        keep, dtype = node.args[1], like.dtype
        scaled = [user for user in node.users if user.target in _DIVISIONS and user.args[0] is node]
        only_scaled = 0 < len(scaled) == len(node.users) and all(isinstance(div.args[1], float) for div in scaled)
        if only_scaled and traced.device.type == "cpu":
            for div in scaled:
                div.target, div.args = custom.noise, (node, div.args[1], dtype)
            dtype = torch.uint8
            node.meta["val"] = node.meta["val"].to(dtype)
        node.target, node.args = custom.bernoulli, (keep, tuple(like.shape), tuple(like.stride()), dtype, traced.device)
