"""Run kernels once to see what they do (`Observation`): on a CPU in a forked child, on CUDA in this process."""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from planner._compat import pytree
from planner._compat.collectives import collectives_forbidden
from planner.errors import first_line
from planner.kernels.calls import make_inputs
from planner.kernels.observed import Look, Observation, dtype_name, is_foreign
from planner.log import PROFILER
from planner.profiler.estimate import GENERIC_CPU, estimate_node
from planner.profiler.forked import Failed, run_forked
from planner.profiler.side_effects import Effects
from planner.profiler.timing import check_memory


def observe(nodes: Sequence[Node], device: torch.device) -> Iterator[tuple[Node, Observation | None]]:
    """Run each node's kernel; None for one that cannot be run (it raised, crashed, or took too long).

    Generators of random numbers stay as they are, Python's and numpy's too. Collectives are refused, not run.
    """
    if device.type == "cpu" and hasattr(os, "fork"):
        jobs: list[Callable[[], Observation]] = [partial(_observe, node, device) for node in nodes]
        patience_s = [20 + 100 * estimate_node(node, GENERIC_CPU).time_ns / 1e9 for node in nodes]
        for index, row in run_forked(jobs, patience_s, _encode, _decode):
            yield nodes[index], _logged(nodes[index], row)
    elif device.type == "cuda" and torch.cuda.is_available():
        yield from _observe_on_cuda(nodes, device)


def _logged(node: Node, found: Observation | Failed) -> Observation | None:
    """None for a kernel that failed, which is logged. One from outside of torch is then never run twice, nor moved."""
    if isinstance(found, Observation):
        return found
    level = logging.INFO if is_foreign(node.target) else logging.DEBUG
    PROFILER.log(
        level, "%s cannot be run on made-up inputs, its results are taken to be as traced: %s", node.target, found.reason
    )
    return None


def _observe_on_cuda(nodes: Sequence[Node], device: torch.device) -> Iterator[tuple[Node, Observation | None]]:
    states = _Generators(device)
    try:
        for node in nodes:
            found: Observation | Failed
            try:
                found = _observe(node, device)
            except Exception as error:
                found = Failed(first_line(error))
            yield node, _logged(node, found)
    finally:
        states.put_back()
        torch.cuda.empty_cache()


def _observe(node: Node, device: torch.device) -> Observation:
    check_memory(node)
    with torch.no_grad():
        args, kwargs = make_inputs(node)
        call: Callable[[], Any] = lambda: node.target(*args, **kwargs)  # type: ignore[operator]
        if not is_foreign(node.target):
            return Observation(_looks(call()), repeatable=True)
        with collectives_forbidden() as refused:
            try:
                return _observe_twice(call, (args, kwargs), device)
            except Exception:
                if refused:
                    return Observation(communicates=True)
                raise


def _observe_twice(call: Callable[[], Any], given: Any, device: torch.device) -> Observation:
    """Equal inputs and equal states of all generators: equal bits, and nothing else changed?"""
    before, contents = _Generators(device), _bytes(given)
    looks = _looks(call())  # what a first call caches is no change
    writes = _bytes(given) != contents
    before.put_back()
    effects = Effects()
    with effects.watched():
        first = _bytes(call())
    between = _Generators(device)
    before.put_back()
    with effects.watched():
        second = _bytes(call())
    after = _Generators(device)
    others = before.others == between.others == after.others  # what the backward would not put back
    same = first == second and between.default == after.default and not effects.differ()
    return Observation(looks, same and others and not writes, before.default != between.default, writes)


class _Generators:
    """States of the device's default generator, and of the others: the host's where that is another, Python's, numpy's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state(legacy=False) if numpy is not None else None

    @property
    def default(self) -> bytes:
        """The state that a recompute puts back."""
        state = self.host if self.on_device is None else self.on_device
        return state.numpy().tobytes()

    @property
    def others(self) -> bytes:
        """The states that no recompute puts back."""
        return pickle.dumps((None if self.on_device is None else self.host.numpy().tobytes(), self.python, self.numpy))

    def put_back(self) -> None:
        """Set all generators to these states."""
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _looks(out: Any) -> tuple[Look, ...]:
    return tuple(Look.of(leaf) for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))


def _bytes(tree: Any) -> list[bytes]:
    """The contents of the tensors in a tree; NaNs count by their bits."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def _encode(found: Observation) -> Any:
    looks = [[dtype_name(look.dtype), list(look.shape), list(look.stride)] for look in found.looks]
    return [looks, found.repeatable, found.draws, found.writes, found.communicates]


def _decode(row: Any) -> Observation:
    looks, *flags = row
    return Observation(tuple(Look(getattr(torch, name), tuple(shape), tuple(stride)) for name, shape, stride in looks), *flags)
