"""Capture a step with the layouts of real kernels: those whose fakes may be wrong are run once, and the trace follows them."""

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
from planner.kernels.observed import ObservedKernel, TensorLayout
from planner.log import TRACER
from planner.profiler.probe import observe
from planner.tracer.capture import Loss
from planner.tracer.capture import capture as capture_once
from planner.tracer.joint import Joint
from planner.tracer.opaque.choose import widened
from planner.tracer.replay import Replay, Strides
from planner.tracer.storage import Storages
from planner.tracer.target_device import TargetDevice

_ROUNDS = 50
"""Traces at most. A trace that follows one kernel's strides may contain calls that have not run yet; few models need three."""


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    opaque: Collection[str] = (),
    target: TargetDevice | None = None,
    gradients: Sequence[Strides] | None = None,
    as_found: bool = False,
) -> Joint:
    """As `planner.tracer.capture.capture`, with tensors laid out as in the real step.

    Kernels that may return other strides than their fakes, and operators that are not torch's, are run once.
    On a CPU they run in a forked child, on made-up inputs; on CUDA in this process. What torch's own kernels did is remembered
    for the process. Nothing is run for a device that is not here.

    Raises:
        InputError, CaptureError: as there; or a kernel's fake is wrong in a way that no trace can follow.
    """
    begun = time.monotonic()

    def traced(opaque: Collection[str]) -> Joint:
        return capture_once(
            model, args, kwargs, loss=loss, opaque=opaque, target=target, gradients=gradients, as_found=as_found
        )

    is_absent_gpu = target is not None and target.capability is not None
    joint = traced(opaque) if is_absent_gpu else _captured(model, opaque, traced)
    name, total = type(model).__name__, len(joint.graph.nodes)
    TRACER.info("%s: captured in %.1f s, %d graph nodes", name, time.monotonic() - begun, total)
    _log_opaque(name, joint)
    return joint


def _log_opaque(name: str, joint: Joint) -> None:
    """Log which submodules run as they are, once for all traces of a capture."""
    opaque = ", ".join(dict.fromkeys(repr(spec.module) for spec in joint.opaque_calls.values()))
    if opaque and joint.refused:
        TRACER.warning("%s: runs as it is, unplanned inside: %s. The first error: %s", name, opaque, joint.refused)
    elif opaque:
        TRACER.info("%s: runs as it is, as asked for or always: %s", name, opaque)


def capture_again(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], replay: Replay, opaque: Sequence[str]
) -> Joint:
    """A captured call for other gradients, laid out as its real backward is. Kernels may be run, the model is not.

    Raises:
        InputError, CaptureError: as `capture`.
    """
    return _captured(model, opaque, lambda opaque: capture_once(model, args, kwargs, opaque=opaque, replay=replay))


def _captured(model: nn.Module, opaque: Collection[str], traced: Callable[[Collection[str]], Joint]) -> Joint:
    fresh: set[str] = set()
    refused = ""
    for _ in range(_ROUNDS):
        joint = traced(opaque)
        nodes = [node for node in _run_nodes(joint) if _call(node) not in fresh]
        drew = {_call(node) for node in nodes if _draws(node)}
        _run_unknown(nodes, joint)
        fresh |= {_call(node) for node in nodes}
        wrong = next((node for node in nodes if _cannot_be_followed(node)), None)
        if wrong is not None:
            reason = f"{_name(wrong, joint)} {_cannot_be_followed(wrong)}"
            refused = refused or joint.refused or reason
            opaque = _without(model, opaque, joint, wrong)
        elif not any(_differs(node) for node in _run_nodes(joint)) and drew == {_call(node) for node in nodes if _draws(node)}:
            return replace(joint, refused=refused or joint.refused)
        else:
            reason = "kernels that were run once return other layouts than traced, or draw random numbers"
        TRACER.info("%s: capture again: %s", type(model).__name__, reason)
    node = next((node for node in _run_nodes(joint) if _differs(node)), nodes[0])
    raise CaptureError(f"{_name(node, joint)} behaves differently each time it is run, and cannot be planned")


def _run_nodes(joint: Joint) -> list[fx.Node]:
    """Kernels to be run, as they were traced: torch's, and others'."""
    writes = Storages(joint.graph).writes
    return [node for node in joint.graph.nodes if node in writes and observed.TRACED in node.meta and not is_collective(node)]


def _call(node: fx.Node) -> str:
    return str(node.meta[observed.TRACED])


def _run_unknown(nodes: Sequence[fx.Node], joint: Joint) -> None:
    """Run one node of each call that has not run yet, and of each operator that is not torch's: it may have been redefined."""
    calls = {_call(node): node for node in nodes if observed.is_foreign(node.target) or observed.recall(_call(node)) is None}
    for node, found in observe([*calls.values()], joint.device):
        observed.remember(_call(node), node.target, found or ObservedKernel(), tensors_in(node.meta["val"]))


def _draws(node: fx.Node) -> bool:
    found = observed.observation_of(node)
    return found is not None and found.draws


def _differs(node: fx.Node) -> bool:
    found = observed.observation_of(node)
    return found is not None and observed.differing(found.layouts, tensors_in(node.meta["val"]))


def _cannot_be_followed(node: fx.Node) -> str:
    """Why no trace can hold the operator: what its fake, or its schema, gets wrong; '' if nothing."""
    found = observed.observation_of(node)
    if found is None or not observed.is_foreign(node.target):
        return ""
    fakes = tensors_in(node.meta["val"])
    if found.writes:
        return "writes into an argument, which its schema does not say (mutates_args)"
    if not found.layouts or [f.shape for f in fakes] == [layout.shape for layout in found.layouts]:
        return ""
    return f"returns {', '.join(map(str, found.layouts))}, its fake {', '.join(str(TensorLayout.of(f)) for f in fakes)}"


def _name(node: fx.Node, joint: Joint) -> str:
    return f"{node.target} at {joint.sources.get(node.name, NOWHERE)}"


def _without(model: nn.Module, opaque: Collection[str], joint: Joint, node: fx.Node) -> tuple[str, ...]:
    """More opaque submodules, so that the one that calls this operator runs as it is.

    Raises:
        CaptureError: it is the model itself.
    """
    source = joint.sources.get(node.name, NOWHERE)
    known = {*opaque, *(spec.module for spec in joint.opaque_calls.values())}
    more = widened(model, tuple(known), source.module)
    if not more:
        raise CaptureError(f"{_name(node, joint)} {_cannot_be_followed(node)}; correct that, and plan again")
    return more
