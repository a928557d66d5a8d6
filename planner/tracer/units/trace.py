"""Units in a trace: which of them are of one kind, and what is traced at their calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.dispatch import untraced
from planner._compat.joint_export import ExportedJoint
from planner._compat.module_calls import calls_intercepted
from planner._compat.units import BlankTensor, has_attributes, has_saved_tensor_hooks, is_tracing_graph
from planner.tracer.units.choice import Form, candidates, changeable, is_plain, structure
from planner.tracer.units.kernels import Place, Recording, compared, held_tensors, watched
from planner.tracer.units.refused import Refused
from planner.tracer.units.splice import splice
from planner.tracer.units.standin import Kind, UnitCall, gate, known, stand_in
from planner.tracer.units.template import SplicedGraph

_MOST_KINDS = 4
"""Kinds that a unit is compared with, the one that fitted last first: where every unit is of its own, more would cost much."""


class Units:
    """The units of a model, while one step of it is traced.

    Torch runs the forward twice. In the first run, units are told apart by kind; in the second, which is recorded, every unit
    of a kind must call its template's kernels again.

    Attributes:
        kinds: those of the last run that have more than one unit.
        left_out: unit -> why it is traced as it is.
        different: unit -> in what it differs from those before it.
        changed_trace: a gate or a stand-in was traced.
    """

    def __init__(self, model: nn.Module, apart: Collection[str], left_out: Collection[str] | None = ()) -> None:
        """`apart`: see `choice.candidates`. `left_out`: units that an earlier try has ruled out; None for every one."""
        self._model = model
        self._units = {} if left_out is None else candidates(model, apart)
        self._structures = {name: structure(module) for module, name in self._units.items()}
        self.left_out = {name: "it has hooks" for name, form in self._structures.items() if form is None}
        self.left_out.update((name, "another try failed with it") for name in left_out or ())
        self.different: dict[str, str] = {}
        self._kinds: dict[Hashable, list[Kind]] = {}
        self._chosen: dict[str, int] = {}
        self._templates: dict[int, Kind] = {}
        self._called: set[str] = set()
        self._calls: dict[str, UnitCall] = {}
        self._clears: Callable[[], int] = lambda: 0
        self._refused: Refused | None = None
        self._num_errors = 0
        self.changed_trace = False

    def __bool__(self) -> bool:
        """There are two that may be of one kind."""
        forms = [form for name, form in self._structures.items() if name not in self.left_out]
        return len(set(forms)) < len(forms)

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of more than one unit, of the last run."""
        return [kind for kind in self._templates.values() if kind.members]

    @contextmanager
    def known(self) -> Iterator[None]:
        """While entered, fake kernels know the stand-ins: around the whole trace, backward included."""
        with known(self._calls):
            yield

    @contextmanager
    def tracing(self, clears: Callable[[], int]) -> Iterator[None]:
        """While entered, around one run of the forward, calls of units are traced as kinds, stand-ins, or as they are.

        Args:
            clears: how often autocast's cache was cleared so far in this run.
        """
        if is_tracing_graph():
            self._choose()
            handle: Any = self._traced
        else:
            handle = self._told_apart
        self._kinds.clear()
        self._templates.clear()
        self._called.clear()
        self._calls.clear()
        self._num_errors = BlankTensor.num_errors
        self._clears = clears
        with calls_intercepted(self._units, handle):
            yield

    def spliced(self, exported: ExportedJoint, names: Mapping[str, str]) -> ExportedJoint:
        """A joint graph with the stand-ins replaced, by what was seen while it was traced.

        Args:
            names: the model's parameters' and buffers' names by the names in `exported`.

        Raises:
            Refused: it might be another one than that of the whole model.
        """
        if self._refused is not None:  # and the model's code has caught it
            raise self._refused
        if BlankTensor.num_errors != self._num_errors:
            raise Refused("a tensor leaves a block otherwise than as its result")
        kinds = self.kinds
        if len(kinds) < len(self._templates):
            raise Refused(
                "a template is the only one of its kind", *(k.template for k in self._templates.values() if not k.members)
            )
        if not kinds:
            return exported
        first: dict[int, str] = {}
        buffers = self._model.named_buffers(remove_duplicate=False)
        aliases = {name: same for name, buffer in buffers if (same := first.setdefault(id(buffer), name)) != name}
        with untraced():
            return splice(exported, SplicedGraph.of(exported, names, aliases), kinds)

    def _choose(self) -> None:
        """Number the kinds that the first run has found."""
        for kinds in self._kinds.values():
            for kind in kinds:
                members = [name for name in (kind.template, *kind.members) if name not in self.left_out]
                if len(members) > 1:
                    self._chosen.update(dict.fromkeys(members, id(kind)))

    def _told_apart(self, module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """A unit's call in the first run: as another one of a kind, or else the first of a new kind."""
        arguments = _Arguments(args, kwargs)
        if self._is_ruled_out(name, arguments):
            return run()
        kinds = self._kinds.setdefault((self._structures[name], arguments.key()), [])
        for kind in kinds[:_MOST_KINDS]:
            try:
                out = self._as_stand_in(kind, module, name, arguments)
            except Refused as refused:
                self.different.setdefault(name, str(refused))
                continue
            kinds.remove(kind)
            kinds.insert(0, kind)
            return out
        out, found = self._as_template(module, name, arguments)
        if found is not None:
            kinds.insert(0, found)
        return out

    def _traced(self, module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """A unit's call in the run that is recorded.

        Raises:
            Refused: it is not what it was in the first run.
        """
        try:
            return self._traced_as_chosen(module, name, args, kwargs, run)
        except Refused as refused:
            self._refused = self._refused or refused
            raise

    def _traced_as_chosen(self, module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        number = self._chosen.get(name)
        if number is None or name in self.left_out:
            return run()
        if name in self._called:
            raise Refused("it is called a second time", name)
        self._called.add(name)
        arguments = _Arguments(args, kwargs)
        if number in self._templates:
            return self._as_stand_in(self._templates[number], module, name, arguments)
        out, kind = self._as_template(module, name, arguments)
        if kind is None:
            raise Refused(self.left_out[name], name)
        self._templates[number] = kind
        return out

    def _is_ruled_out(self, name: str, arguments: _Arguments) -> bool:
        """Note why a unit is not one of a kind, if it is not."""
        reason = arguments.complaint()
        if name in self._called:
            reason = "it is called more than once"
        elif not torch.is_grad_enabled():
            reason = "it runs without gradients"
        elif has_saved_tensor_hooks():
            reason = "hooks on saved tensors are active"
        self._called.add(name)
        if reason:
            self.left_out.setdefault(name, reason)
        return name in self.left_out

    def _as_template(self, module: nn.Module, name: str, arguments: _Arguments) -> tuple[Any, Kind | None]:
        """Run a unit between gates; its output, and what was learned of it: None if it cannot be a template."""
        self.changed_trace = True
        given = [gate(tensor, name, "argument", i) for i, tensor in enumerate(arguments.tensors)]
        mode = Recording(module, given)
        kind = Kind(name, mode.log, len(given), key=arguments.key(), clears=self._clears())
        held = held_tensors(module)
        with watched(mode):
            out = arguments.call(module, given)
        leaves, kind.out_spec = pytree.tree_flatten(out)
        reason = mode.refused or _complaint(out, leaves, mode)
        if held != held_tensors(module):
            reason = reason or "it replaces a tensor that it holds"
        if reason:
            self.left_out[name] = reason
            return out, None
        kind.leaves = [mode.places.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind.results = [(Form.of(tensor), tensor.requires_grad) for tensor in tensors]
        gated = iter([gate(tensor, name, "result", i) for i, tensor in enumerate(tensors)])
        leaves = [next(gated) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, kind.out_spec), kind

    def _as_stand_in(self, kind: Kind, module: nn.Module, name: str, arguments: _Arguments) -> Any:
        """One kernel in place of a unit, once it is shown to run the kind's kernels.

        Raises:
            Refused: it does not.
        """
        tensors = arguments.tensors
        clears = self._clears()
        try:
            out = compared(module, kind.log, tensors, lambda given: arguments.call(module, given))
        except Refused as refused:
            raise Refused(str(refused), name) from None
        leaves, spec = pytree.tree_flatten(out)
        if arguments.key() != kind.key:
            raise Refused("its arguments look otherwise than the template's", name)
        if spec != kind.out_spec or not _same(leaves, kind.leaves):
            raise Refused("it returns something else than its template", name)
        weights = [(place, weight.requires_grad) for place, weight in module.named_parameters()]
        wanted = [(i, Form.of(tensor)) for i, tensor in enumerate(tensors) if tensor.requires_grad]
        call = UnitCall(name, kind, wanted, weights, clears)
        kind.members[name] = self._calls[name] = call
        results = iter(stand_in(call, tensors))
        return pytree.tree_unflatten([next(results) if isinstance(leaf, Place) else leaf for leaf in leaves], spec)


class _Arguments:
    """A unit's arguments, as a tree."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self._changeable = changeable((*args, *kwargs.values()))
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [self._leaves[i] for i in self._at]

    def complaint(self) -> str:
        """Why a call with these arguments is not traced once; '' if nothing."""
        if self._changeable:
            return f"it is given a {self._changeable}"
        if not _are_plain(self._leaves):
            return "it is given a tuple of a class of its own"
        if len({id(tensor) for tensor in self.tensors}) < len(self.tensors):
            return "it is given a tensor twice"
        if any(map(has_attributes, self.tensors)):
            return "it is given a tensor on which an attribute is set"
        if not any(tensor.requires_grad for tensor in self.tensors):
            return "no argument of it requires grad"
        return ""

    def key(self) -> Hashable:
        """What two calls must have in common for their kernels to be compared."""
        plain = tuple((i, type(leaf), leaf) for i, leaf in enumerate(self._leaves) if i not in self._at)
        tensors = tuple((Form.of(t), t.storage_offset(), t.requires_grad) for t in self.tensors)
        return str(self._spec), plain, tensors

    def call(self, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
        """The module's call with other tensors in place."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return nn.Module.__call__(module, *args, **kwargs)


def _are_plain(leaves: Sequence[Any]) -> bool:
    return all(isinstance(leaf, torch.Tensor) or is_plain(leaf) for leaf in leaves)


def _complaint(out: Any, leaves: Sequence[Any], mode: Recording) -> str:
    """Why a unit with such an output is no template; '' if nothing."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if changeable(out) or not _are_plain(leaves):
        return f"it returns a {changeable(out) or 'tuple of a class of its own'}"
    if any(tensor not in mode.places or isinstance(mode.places.of(tensor).source, str) for tensor in tensors):
        return "it returns a tensor that it is given"
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return "it returns a tensor twice"
    if any(map(has_attributes, tensors)):
        return "it sets an attribute on a tensor that it returns"
    return "" if any(tensor.requires_grad for tensor in tensors) else "no result of it requires grad"


def _same(leaves: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(type(one) is type(other) and one == other for one, other in zip(leaves, others, strict=True))
