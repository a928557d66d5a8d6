"""Capture a step as it really runs: kernels whose fakes may be wrong are run once, and the trace follows what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from planner.errors import CaptureError
from planner.graph.source import NOWHERE
from planner.kernels import observed
from planner.kernels.calls import tensors_in
from planner.kernels.facts import is_collective
from planner.kernels.observed import Observation
from planner.log import TRACER
from planner.profiler.probe import observe
from planner.tracer import parts
from planner.tracer.capture import Loss
from planner.tracer.capture import capture as capture_once
from planner.tracer.elsewhere import Elsewhere
from planner.tracer.joint import Joint
from planner.tracer.replay import Replay
from planner.tracer.storage import Storages

_ROUNDS = 50
"""A trace that follows one kernel's strides may come to calls that were not seen before. Seldom are there more than two."""


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    opaque: Collection[str] = (),
    elsewhere: Elsewhere | None = None,
) -> Joint:
    """As `planner.tracer.capture.capture`, and the trace is laid out as the real step is.

    Kernels that may return other strides than their fakes, and operators that are not torch's, are run once before.
    On a CPU they run in a forked child, on made-up inputs; on CUDA in this process. What was seen of torch's own kernels holds
    for the process. Nothing is run for a device that is not here.

    Raises:
        InputError, CaptureError: as there; or a kernel's fake is wrong in a way that no trace can follow.
    """
    begun = time.monotonic()
    traced = lambda parts: capture_once(model, args, kwargs, loss=loss, opaque=parts, elsewhere=elsewhere)
    is_absent_gpu = elsewhere is not None and elsewhere.capability is not None
    joint = traced(opaque) if is_absent_gpu else _settled(model, opaque, traced)
    name, total = type(model).__name__, len(joint.graph.nodes)
    TRACER.info("%s: captured in %.1f s, %d graph nodes", name, time.monotonic() - begun, total)
    _log_parts(name, joint)
    return joint


def _log_parts(name: str, joint: Joint) -> None:
    """Log which submodules run as they are, once for all traces of a capture."""
    opaque = ", ".join(dict.fromkeys(repr(spec.module) for spec in joint.parts.values()))
    if opaque and joint.refused:
        TRACER.warning("%s: runs as it is, unplanned inside: %s. The first error: %s", name, opaque, joint.refused)
    elif opaque:
        TRACER.info("%s: runs as it is, as asked for or always: %s", name, opaque)


def capture_again(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], replay: Replay, opaque: Sequence[str]
) -> Joint:
    """A captured call for other gradients, laid out as its real backward is. The model is not run, but new kernels are.

    Raises:
        InputError, CaptureError: as `capture`.
    """
    return _settled(model, opaque, lambda parts: capture_once(model, args, kwargs, opaque=parts, replay=replay))


def _settled(model: nn.Module, opaque: Collection[str], traced: Callable[[Collection[str]], Joint]) -> Joint:
    fresh: set[str] = set()
    refused = ""
    for _ in range(_ROUNDS):
        joint = traced(opaque)
        nodes = [node for node in _run_nodes(joint) if _key(node) not in fresh]
        drew = {_key(node) for node in nodes if _draws(node)}
        _look_at(nodes, joint)
        fresh |= {_key(node) for node in nodes}
        wrong = next((node for node in nodes if _cannot_be_followed(node)), None)
        if wrong is not None:
            reason = f"{_name(wrong, joint)} {_cannot_be_followed(wrong)}"
            refused = refused or joint.refused or reason
            opaque = _without(model, opaque, joint, wrong)
        elif not any(_differs(node) for node in _run_nodes(joint)) and drew == {_key(node) for node in nodes if _draws(node)}:
            return replace(joint, refused=refused or joint.refused)
        else:
            reason = "kernels that were run once return other layouts than traced, or draw random numbers"
        TRACER.info("%s: capture again: %s", type(model).__name__, reason)
    node = next((node for node in _run_nodes(joint) if _differs(node)), nodes[0])
    raise CaptureError(f"{_name(node, joint)} behaves otherwise each time it is run, and cannot be planned")


def _run_nodes(joint: Joint) -> list[fx.Node]:
    """Kernels to be run, as they were traced: torch's, and others'."""
    writes = Storages(joint.graph).writes
    return [node for node in joint.graph.nodes if node in writes and observed.TRACED in node.meta and not is_collective(node)]


def _key(node: fx.Node) -> str:
    return str(node.meta[observed.TRACED])


def _look_at(nodes: Sequence[fx.Node], joint: Joint) -> None:
    """Run one node of each call. Those from outside of torch are run in every capture: they may have been defined anew."""
    calls = {_key(node): node for node in nodes if observed.is_foreign(node.target) or observed.recall(_key(node)) is None}
    for node, found in observe([*calls.values()], joint.device):
        observed.remember(_key(node), node.target, found or Observation(), tensors_in(node.meta["val"]))


def _draws(node: fx.Node) -> bool:
    found = observed.observation_of(node)
    return found is not None and found.draws


def _differs(node: fx.Node) -> bool:
    found = observed.observation_of(node)
    return found is not None and observed.differing(found.looks, tensors_in(node.meta["val"]))


def _cannot_be_followed(node: fx.Node) -> str:
    """Why no trace can hold the operator: what its fake, or its schema, gets wrong; '' if nothing."""
    found = observed.observation_of(node)
    if found is None or not observed.is_foreign(node.target):
        return ""
    fakes = tensors_in(node.meta["val"])
    if found.writes:
        return "writes into an argument, which its schema does not say (mutates_args)"
    if not found.looks or [f.shape for f in fakes] == [look.shape for look in found.looks]:
        return ""
    return f"returns {', '.join(map(str, found.looks))}, its fake {', '.join(str(observed.Look.of(f)) for f in fakes)}"


def _name(node: fx.Node, joint: Joint) -> str:
    return f"{node.target} at {joint.sources.get(node.name, NOWHERE)}"


def _without(model: nn.Module, opaque: Collection[str], joint: Joint, node: fx.Node) -> tuple[str, ...]:
    """More opaque submodules, so that the one that calls this operator runs as it is.

    Raises:
        CaptureError: it is the model itself.
    """
    source = joint.sources.get(node.name, NOWHERE)
    known = {*opaque, *(spec.module for spec in joint.parts.values())}
    more = parts.widened(model, tuple(known), source.module)
    if not more:
        raise CaptureError(f"{_name(node, joint)} {_cannot_be_followed(node)}; correct that, and plan again")
    return more
