"""The audit: at some calls the model's own forward runs beside the planned one, from the same state, and both are compared.

No list of what a forward may depend on is complete; the audit finds what the guards do not know. It compares forwards only.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.private_names import MODULE_HOOKS
from planner._compat.switches import saved_tensors_hooks
from planner.graph.graph import Kind
from planner.results.plan import Plan
from planner.runtime.autograd import run_without_backward
from planner.runtime.executable import Executable
from planner.runtime.guards.call import MatchedCall
from planner.runtime.outputs import rebuild_output
from planner.runtime.ranks import communicates
from planner.runtime.step import RewrittenStep
from planner.tracer.host.arguments import argument_effects, bound_and_restored
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, alike, tensor_key
from planner.tracer.host.foreign import is_special
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.preserve import contents_preserved, plain_tensors
from planner.tracer.host.state import HostKey, HostState, remembered
from planner.tracer.joint import Joint
from planner.tracer.opaque.measure import written_weights
from planner.tracer.outputs import without_caches

Digest = dict[str, Fingerprint]
"""What a forward returned and changed: a fingerprint per name. Equal exactly where every bit is."""

_NOT_STATE = frozenset(vars(nn.Module())) - {"training"} | {"forward"}


def is_due(num_calls: int) -> bool:
    """Whether the planned call of this number is audited: the 2nd, 10th, 100th, 1000th, ...; the same on every rank."""
    return num_calls == 2 or (num_calls >= 10 and set(str(num_calls)[1:]) == {"0"} and str(num_calls)[0] == "1")


def can_audit(step: RewrittenStep) -> bool:
    """Whether the original forward may run a second time, and has to give the same bits: it has no effects outside."""
    hooked = any(not spec.repeatable for spec in step.joint.opaque_calls.values())
    return not step.is_compiled and not step.joint.absent_device and not hooked and not communicates(step.joint)


def audit_fits(plan: Plan, written_bytes: int) -> bool:
    """Whether an audit fits the budget: the peak of the planned forward, and copies of what it writes.

    The original forward needs no more than the planned one, which runs the same kernels and holds what it saves, too.

    Args:
        written_bytes: of the tensors that the forward writes into.
    """
    boundary = plan.solution.schedule.boundary(plan.graph)
    forward = max(plan.timeline.live_bytes[: boundary + 1], default=0)
    return forward + max(0, written_bytes - plan.margin_bytes) <= plan.budget_bytes


def compare_forwards(
    original: Callable[..., Any], model: nn.Module, step: RewrittenStep, plan: Plan, executable: Executable, call: MatchedCall
) -> tuple[str, ...] | None:
    """Run both forwards; names of what they leave different, or None where the budget has no place for it.

    None, too, where hooks on saved tensors are not allowed: by these the original forward saves nothing.

    Args:
        original: the model's own forward.
        call: what both are called with; what it holds and writes is restored.
    """
    joint, args, kwargs = step.joint, call.args, call.kwargs
    plain = [given for given in joint.inputs if given.kind is not Kind.TANGENT]
    written = [tensor for given, tensor in zip(plain, call.inputs, strict=True) if given.mutated]
    are_hooks_allowed, _ = saved_tensors_hooks()
    if not are_hooks_allowed or not audit_fits(plan, sum(tensor.nbytes for tensor in written)):
        return None
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def of_original() -> Digest:
        with bound_and_restored(args, kwargs):
            return digest(model, run_original(original, args, kwargs), given, joint.device, joint.host)

    def of_planned() -> Digest:
        with torch.autocast(joint.device.type, enabled=False), bound_and_restored(args, kwargs):
            results = run_without_backward(executable, call.inputs)
            return digest(model, rebuild_output(joint, model, results, call), given, joint.device, joint.host)

    return repeatable_difference(of_original, of_planned, partial(rewound, model, joint.host.key, written, joint.device))


def may_be_written(model: nn.Module, joint: Joint, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose content a forward of the model itself may change.

    Args:
        given: the call's.
    """
    state = [path.get(model) for path in joint.host.state]
    held = [*model.buffers(), *plain_tensors(model), *given, *state]
    names = {given.key for given in joint.inputs if given.mutated}
    weights = [*written_weights(model), *(tensor for name, tensor in model.named_parameters() if name in names)]
    return [*weights, *(t for t in held if isinstance(t, torch.Tensor) and not t.requires_grad)]


@contextlib.contextmanager
def rewound(model: nn.Module, key: HostKey, written: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """A context that restores, at its end, the state that a forward starts from; after an error, too.

    Args:
        written: the tensors that the forward writes into.
    """
    states = Generators(device).restorers()
    with contents_preserved(written):
        preserved = remembered(model, key)
        try:
            with iterators_copied():
                yield
        finally:
            preserved.restore()
            for put_back in states:
                put_back()


def repeatable_difference(
    original: Callable[[], Digest], planned: Callable[[], Digest], restoring: Callable[[], AbstractContextManager[None]]
) -> tuple[str, ...]:
    """Names of what two forwards leave different; empty where they agree, or where one of them does not repeat itself.

    Args:
        original, planned: run a forward and return its digest.
        restoring: makes a context that restores what the forwards start from.
    """

    def run(forward: Callable[[], Digest]) -> Digest:
        with restoring():
            return copy_context().run(forward)  # a forward may set context variables

    expected, found = run(original), run(planned)
    different = difference(expected, found)
    return different if different and not difference(expected, run(original)) and not difference(found, run(planned)) else ()


def run_original(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run the model's own forward with gradients enabled (for training's kernels); nothing is saved for a backward.

    Autocast keeps no casts of weights: they would stay for the rest of its region, beside what the budget holds.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            return forward(*args, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(cached)


def digest(model: nn.Module, out: Any, inputs: Sequence[torch.Tensor], device: torch.device, host: HostState) -> Digest:
    """What a forward returned (without caches, which plans leave out) and changed; its call is bound (`arguments.bound`)."""
    prints = _Contents({id(module): name or "itself" for name, module in model.named_modules()})
    found: Digest = {f"output {i}": prints.of(leaf) for i, leaf in enumerate(without_caches(pytree.tree_leaves(out)))}
    found |= {f"input {i}": prints.of(tensor) for i, tensor in enumerate(inputs)}
    found |= {f"buffer {name}": prints.of(tensor) for name, tensor in model.named_buffers()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _NOT_STATE and attribute not in MODULE_HOOKS:
                found[f"{name}.{attribute}".lstrip(".")] = prints.of(value)
    found |= {str(effect.path): prints.of(effect.path.get(model)) for effect in argument_effects(host)}
    generators = Generators(device)
    found["random state"] = (*generators.of_torch(), repr(generators.host()))
    return found


def digest_of(values: Mapping[str, Any]) -> Digest:
    """Fingerprints of single values, none of which holds a module."""
    prints = _Contents({})
    return {name: prints.of(value) for name, value in values.items()}


class _Contents(Fingerprints):
    """Fingerprints that include every bit of a tensor; of one moment: what many modules hold is looked at once."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(names, lambda _, name: not is_special(name))
        self._known: dict[int, tuple[Any, Fingerprint]] = {}

    def of(self, value: Any) -> Fingerprint:
        if self._open:  # inside of another value: what leads back to that is told by its place there
            return self._anew(value)
        if id(value) not in self._known:
            self._known[id(value)] = value, self._anew(value)
        return self._known[id(value)][1]

    def _anew(self, value: Any) -> Fingerprint:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            content = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            data = content.view(torch.uint8).cpu().numpy() if content.numel() else b""
            shape, _, *kind = tensor_key(value)
            return ("tensor", shape, *kind, hashlib.blake2b(data).digest())  # type: ignore[arg-type]
        return super().of(value)


def difference(expected: Digest, found: Digest) -> tuple[str, ...]:
    """Names of unequal entries."""
    names = dict.fromkeys((*expected, *found))
    known: dict[tuple[int, int], bool] = {}  # by identity of the fingerprints, of which many entries are one

    def differs(name: str) -> bool:
        if name not in expected or name not in found:
            return True
        pair = expected[name], found[name]
        key = id(pair[0]), id(pair[1])
        if key not in known:
            known[key] = alike(*pair, copied=True)
        return not known[key]

    return tuple(filter(differs, names))
