"""Facts about a kernel from its name, its schema and its observed run: is it random, repeatable, a collective?"""

from __future__ import annotations

import torch
from torch import fx

from planner.kernels import custom, observed
from planner.kernels.observed import observation_of

Operator = type(torch.ops.aten.add.Tensor)
"""The class of ATen's operators, which has no public name."""
COLLECTIVE_NAMESPACES = frozenset(
    {"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor"}
)
"""Of operators that communicate with other processes."""

_INERT = {"dropout_p": 0.0, "p": 0.0, "train": False}
"""Arguments at which a kernel that can draw random numbers draws none."""


def is_random(node: fx.Node) -> bool:
    """The node's kernel draws from the default generator. For opaque modules see `planner.tracer.opaque.call.draws`."""
    if node.target is custom.bernoulli:
        return True
    found = observation_of(node) if observed.is_foreign(node.target) else None
    if found is not None and found.draws:
        return True
    if not isinstance(node.target, Operator) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {
        **{a.name: a.default_value for a in node.target._schema.arguments},
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    return not any(name in given and given[name] == inert and given[name] is not None for name, inert in _INERT.items())


def is_repeatable(node: fx.Node) -> bool:
    """With the generator in the same state a second run gives the same bits: torch's kernels, and others as observed."""
    if not isinstance(node.target, Operator) or not observed.is_foreign(node.target):
        return True
    found = observation_of(node)
    return found is not None and found.repeatable


def is_collective(node: fx.Node) -> bool:
    """The kernel communicates with other ranks, or waits for the result of one that does."""
    if getattr(node.target, "namespace", "") in COLLECTIVE_NAMESPACES:
        return True
    found = observation_of(node)
    return found is not None and found.communicates
