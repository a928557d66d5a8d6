"""Random kernels: which they are, and the generator states that let the backward run them again exactly."""

from __future__ import annotations

import torch
from torch import fx

from planner._torch import OpOverload, outside_modes
from planner.tracer import kernels

_INERT = {"dropout_p": 0.0, "p": 0.0, "train": False}
"""Arguments at which a kernel that can draw random numbers draws none."""


def dropout(tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Eager's dropout, with the fused kernel and its small mask wherever that gives the same bits.

    On CPU eager multiplies by a noise tensor of 0 and 1/(1-p) in the input's dtype; the fused kernel
    keeps a bool mask (a quarter of the bytes) and scales at higher precision, which agrees for most p
    in float32 and differs in the last bit for some (0.15 is one).
    """
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor.mul(torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    if tensor.device.type != "cpu" or _fused_is_exact(p, tensor.dtype):
        return torch.ops.aten.native_dropout.default(tensor, p, True)[0]
    return tensor * torch.empty_like(tensor).bernoulli_(1 - p).div_(1 - p)


def _fused_is_exact(p: float, dtype: torch.dtype) -> bool:
    scale = 1 / (1 - p)
    with outside_modes():
        noise = torch.ones((), dtype=dtype).div_(1 - p)
        return bool(noise.double() == (scale if dtype == torch.float64 else torch.tensor(scale, dtype=torch.float32).double()))


DECOMPOSITIONS = {"dropout": dropout}
"""What tracing uses in place of torch's own decompositions (see `kernels_kept` in planner/_torch.py)."""


def is_random(node: fx.Node) -> bool:
    """The node draws from the default generator."""
    if node.target is kernels.bernoulli:
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
