"""The recording forward: a model is run for real, until two runs do the same, to learn what Python does beside the kernels.

Nothing is kept for a backward, so a run needs no more memory than an inference forward. Everything is put back afterwards.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.private_names import MODULE_HOOKS
from planner._compat.tensors import shared_storages
from planner.errors import CaptureError
from planner.tracer.host.backward_reads import refuse_left_out, refuse_reads_of_own_hooks
from planner.tracer.host.changes import Changes, find_changes, frozen
from planner.tracer.host.fingerprint import Fingerprints, tensor_key
from planner.tracer.host.foreign import is_foreign_class, is_special
from planner.tracer.host.generator_calls import refuse_generators
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.kernels import RecordKernels, Run
from planner.tracer.host.model_keys import weight_places
from planner.tracer.host.one_call import OneCall
from planner.tracer.host.path import Path, named, submodule
from planner.tracer.host.preserve import Preserved, keep_deep, keep_model, keep_module, plain_tensors
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.host.scopes import Reads
from planner.tracer.host.state import HostKey, HostState, roots, skipped_places, walk, written_containers
from planner.tracer.host.steady import Runs, left_to_next_call, run_as_found, run_until_steady
from planner.tracer.host.tensor_identity import inputs_at, places, weight_classes
from planner.tracer.host.tensor_places import TensorRead
from planner.tracer.host.tensor_reads import SeenByLine, TensorReads, refuse_marked, refuse_retained
from planner.tracer.host.tracked import note_returned
from planner.tracer.host.values import ABSENT, class_homes, is_code
from planner.tracer.model_call import Called

NO_ORIGINALS: Mapping[int, torch.Tensor] = MappingProxyType({})
"""All of the call's tensors are the user's own."""


@dataclass(frozen=True)
class ObservedForward:
    """What the recording forward found.

    Attributes:
        run: the last run.
        host: what Python does; the templates of its effects hold the tensors that the last run left.
        preserved: puts Python state back as it was before the first run.
        written: tensors that were there before and that the runs wrote into, but for the model's weights and buffers.
        settled: every place that the forward reads or writes, as the last run left it; empty where the first run differed.
        seen_by_line: what tensors showed that the forward made.
        moved: where Python state holds tensors that were in other places before the last run, by identity.
        has_backward_code: as of ReadRecorder.
    """

    run: Run
    host: HostState
    preserved: Preserved
    written: tuple[torch.Tensor, ...]
    settled: Mapping[Path, Any]
    seen_by_line: SeenByLine
    moved: Mapping[int, Path]
    has_backward_code: bool


class Observer:
    """Makes the runs.

    Args:
        model: left as it was found when `preserved` is restored, which the caller does.
        modules: the stack of running submodules, followed by hooks.
        opaque: names of opaque modules, whose inner state is left out.
        written: weights and buffers that kernels may write into.
        originals: by identity of a tensor that takes the place of one of the call's, that one.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Any,
        opaque: Sequence[str],
        device: torch.device,
        written: Sequence[torch.Tensor],
        originals: Mapping[int, torch.Tensor] = NO_ORIGINALS,
    ) -> None:
        self.model, self._modules, self._opaque = model, modules, tuple(opaque)
        self._weights: frozenset[tuple[str, str]] | None = None
        self._names = {id(module): name for name, module in model.named_modules()}
        self.preserved = Preserved()
        for module in model.modules():
            keep_module(self.preserved, module, self._names[id(module)])
            for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
                self.preserved.keep(kind)
                for name, held in list(vars(kind).items()):
                    if not is_special(name) and not is_code(held):
                        for item in keep_deep(self.preserved, held, self._names, f"{kind.__name__}.{name}"):
                            self.preserved.keep(item)  # a descriptor is read by way of the module alone
        if opaque:  # what runs in there is not followed: everything reachable from the model is remembered
            keep_model(model, self.preserved)
        for tensor in model.parameters():
            self.preserved.keep(tensor)
        where = lambda: str(modules)
        self.kernels = RecordKernels(where, self.pause)
        self.kernels.know([*model.parameters(), *model.buffers()], plain_tensors(model), written)
        self.preserved.finally_do(lambda: self.kernels.restore_contents(forms=True))
        self.reads = ReadRecorder(model, self.preserved, self._names, where, self.kernels.share)
        self.tensors = TensorReads(where, self.kernels.has_made, originals)
        self._inside = contextvars.copy_context().run  # context variables that a run sets stay in there
        self._generators = Generators(device)
        self._environment = dict(os.environ)
        self._on_tensors = {id(tensor): dict(vars(tensor)) for tensor in model.parameters()}
        self._of_classes = self._class_data()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """While entered, an opaque module runs: nothing that it does is recorded."""
        before = self.kernels.paused, self.reads.paused, self.tensors.paused
        self.kernels.paused = self.reads.paused = self.tensors.paused = True
        host = self._generators.host()
        try:
            with iterators_copied():
                yield
        finally:
            self.kernels.paused, self.reads.paused, self.tensors.paused = before
            now = self._generators.host()
            if now != host:
                self._modules.drawn(now)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """While entered, `preserved` keeps what Python code reads and kernels write: globals and others' tensors, too.

        Here code may do what `observe` refuses.
        """
        with self.kernels, self.reads.recording():
            yield

    def observe(self, call: Callable[[], Called], inputs: Sequence[torch.Tensor], *, as_found: bool = False) -> ObservedForward:
        """Run the forward until two runs do the same, and say what Python does in it.

        Args:
            as_found: both start from the Python state that is found now; else each starts from what the one before left.

        Raises:
            CaptureError: it does something that a plan cannot repeat; names it, and the submodule.
        """
        for tensor in inputs:
            self.preserved.keep(tensor)
        changes_of = lambda runs: self._changes(runs, inputs, as_found=as_found)
        if as_found:
            self._weights = weight_places(self.model)
            runs, changes, counts = run_as_found(self, call, inputs, changes_of)
            after, now = {}, runs.before
        else:
            runs, changes, counts = run_until_steady(self, call, inputs, changes_of)
            after = self.snapshot()
            now = left_to_next_call(self, inputs, after)
        last, before, outside = runs.runs[-1], runs.before, self._outside(runs.runs[-1], inputs)
        reads = self.reads.reads()
        only_written = lambda path: self._is_only_written(path, reads)
        state = self._state(before, last, outside, changes)
        # the first run started from other values and ran the same kernels: what it writes there does not affect it
        is_steady = runs.are_alike and not as_found
        left = tuple(e.path for e in changes.effects if not any(p.is_inside(e.path) for p in state)) if is_steady else ()
        if not as_found:  # how far a list has grown is no matter to calls that only append to it
            left = tuple(dict.fromkeys((*left, *(effect.path for effect in changes.effects if effect.appends))))
        left = (*left, *counts.places)
        users = [self.tensors.originals.get(id(tensor), tensor) for tensor in inputs]
        of_tensors = self.tensors.found(places(self.model, users, before), last.outside)
        key = self._inside(lambda: self._key(reads, left, of_tensors))
        key = replace(key, weight_classes=weight_classes(self.model, users, reads.names), libraries=self.reads.libraries())
        key = replace(key, containers=written_containers(changes.effects, self.model))
        if self.reads.compares_identities:
            key = replace(key, compares_identities=True, inputs_at=inputs_at(inputs, users, before, only_written))
        held = [before[path] for path in state]
        forms = tuple(map(tensor_key, held)), shared_storages(held)
        number = {id(before[path]): i for i, path in enumerate(state)}
        shared = tuple((path, number[id(v)]) for path, v in before.items() if id(v) in number and path not in state)
        host = HostState(key, state, *forms, shared, self._aliases(), runs.effects(changes.effects), counts=counts)
        host = replace(host, as_found=as_found, found=changes.found)
        weights = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        written = tuple(tensor for tensor in self.kernels.written if id(tensor) not in weights)
        settled = after if is_steady else {}
        moved = {id(v): path for path, v in now.items() if isinstance(v, torch.Tensor) and before.get(path) is not v}
        return ObservedForward(
            last, host, self.preserved, written, settled, self.tensors.seen_by_line, moved, self.reads.has_backward_code
        )

    def _outside(self, run: Run, inputs: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The tensors of Python state that kernels read in a run, by identity."""
        known = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers(), *inputs)}
        return {key: tensor for key, tensor in run.outside.items() if key not in known}

    def _changes(self, runs: Runs, inputs: Sequence[torch.Tensor], *, as_found: bool) -> Changes:
        """What the last run has changed in Python state."""
        reads, outside = self.reads.reads(), self._outside(runs.runs[-1], inputs)
        only_written = lambda path: self._is_only_written(path, reads, lately=True)
        known = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers(), *inputs)}
        given = {id(tensor) for tensor in inputs}
        finder = OneCall if as_found else None
        stored = [effect.template for effect in runs.runs[-1].written]
        after = self.snapshot()
        there = {id(value) for value in runs.before.values()}
        refuse_retained((path.module, value) for path, value in after.items() if id(value) not in there)
        return find_changes(self.model, runs.before, after, outside, known, given, only_written, finder, stored)

    def run_once(self, call: Callable[[], Called], *, may_initialize: bool = False) -> Run:
        """Run the forward; `may_initialize`: it may give weights other memory, as a first call does."""
        run = self._inside(lambda: self._run(call))
        self._refuse_untracked_changes(may_initialize=may_initialize)
        return run

    def snapshot(self) -> dict[Path, Any]:
        """Every place that the forward reads or writes, as far as runs have shown, with its value."""
        return self._inside(self._snapshot)

    def is_paused(self) -> bool:
        """A submodule that plans run as it is runs now."""
        return self.kernels.paused

    def replace_tensors(self, copies: Mapping[int, torch.Tensor]) -> None:
        """Put other tensors into the places that hold these, by identity."""
        for path, value in self.snapshot().items():
            if id(value) in copies:
                self._inside(path.replace, self.model, copies[id(value)])

    def _refuse_untracked_changes(self, may_initialize: bool) -> None:
        """Raise CaptureError where the last run changed what no Path covers. With
        `may_initialize` it may have given weights other memory.

        Environment variables, a tensor's memory, attributes of tensors, class attributes.
        """
        added = {name for name, _ in self.model.named_modules()} ^ set(self._names.values())
        if added:
            inner = min(added)
            raise CaptureError(
                f"the model's forward adds, removes or replaces the submodule {inner}: run the model once before planning",
                module=inner.rpartition(".")[0],
            )
        changed = {name for name, _ in dict(os.environ).items() ^ self._environment.items()}
        if changed:
            os.environ.clear()
            os.environ.update(self._environment)
            raise CaptureError(f"the model's forward changes environment variables ({', '.join(sorted(changed))[:80]})")
        if self.kernels.has_unguarded_changes or (self.kernels.has_swapped_data and not may_initialize):
            raise CaptureError(
                "the model's forward gives a tensor other memory (tensor.data = ...): write into it, or assign it"
            )
        for name, tensor in self.model.named_parameters():
            if vars(tensor).keys() ^ self._on_tensors.get(id(tensor), {}).keys() or any(
                vars(tensor)[key] is not held for key, held in self._on_tensors.get(id(tensor), {}).items()
            ):
                raise CaptureError(f"the model's forward sets an attribute on the tensor {name}: keep it on the module")
        for (kind, attribute), held in self._class_data().items():
            if self._of_classes.get((kind, attribute)) is not held and held is not ABSENT:
                module = next(name for name, module in self.model.named_modules() if kind in class_homes(type(module)))
                raise CaptureError(
                    f"the model's forward changes the class attribute {kind.__name__}.{attribute}, which a plan would not do: "
                    "keep it in the module, or in a buffer",
                    module=module,
                )

    def _class_data(self) -> dict[tuple[type, str], Any]:
        """What the classes of the model's modules hold, but for their code; a class of the user's may have none, and counts."""
        kinds = {base for module in self.model.modules() for base in class_homes(type(module))}
        return {
            (kind, name): ABSENT if is_code(value) and (not isinstance(value, type) or is_foreign_class(value)) else value
            for kind in kinds
            if not is_foreign_class(kind)
            for name, value in vars(kind).items()
            if not is_special(name)
        }

    def _class_attributes(self, names: Collection[str]) -> dict[type, set[str]]:
        """Per class of the model's modules, those of `names` that it holds as data: code may read them by the class itself."""
        found: dict[type, set[str]] = {}
        for (kind, name), value in self._class_data().items():
            if name in names and value is not ABSENT:
                for other in {type(module) for module in self.model.modules()}:
                    found.setdefault(other, set()).update([name] if kind in class_homes(other) else [])
        return found

    def _run(self, call: Callable[[], Called]) -> Run:
        def refuse(_: Any) -> Any:
            raise CaptureError("backward was called inside the model's forward")

        torch.clear_autocast_cache()  # or a run would read casts of the one before
        run = self.kernels.new_run((*self.model.parameters(), *self.model.buffers()))
        self.reads.new_run()
        with (
            torch.random.fork_rng(devices=self._generators.devices()),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse),
            self.kernels,
            self.reads.recording(),
            self.tensors.recording(),
            self._modules.following(self._generators.host, self._opaque),
        ):
            try:
                called = call()
            except CaptureError as error:
                error.module = error.module or str(self._modules)
                raise
        note_returned(called.output)
        refuse_generators(self.reads, self.kernels, self._modules)
        refuse_left_out(self.reads.left_out, self.reads.of_backward, called.arguments.places)
        refuse_reads_of_own_hooks(self.model, self.reads.names)
        refuse_marked(pytree.tree_leaves(called.output), self.kernels.has_made)
        run.written, run.arguments = called.written, called.arguments
        return run

    def _is_weight(self, path: Path) -> bool:
        """A parameter or buffer: what becomes of these is in the graph. One that a call fills, as found, is Python state."""
        if path.scope is not None or path.steps:
            return False
        if self._weights is not None:
            return (path.module, path.name) in self._weights
        held = vars(submodule(self.model, path.module))
        return path.name in held["_parameters"] or path.name in held["_buffers"]

    def _snapshot(self) -> dict[Path, Any]:
        reads = self.reads.reads()
        merged = {kind: reads.attributes.get(kind, frozenset()) | names for kind, names in self.reads.written.items()}
        both = replace(reads, attributes={**reads.attributes, **merged}, environment=(), opaque_scopes=())
        found: dict[Path, Any] = {}
        seen: set[int] = set()
        of_classes = self._class_attributes(both.names)
        names = lambda kind: both.attributes.get(kind, frozenset()) | of_classes.get(kind, set())
        for path in roots(self.model, names, both, self._opaque, self._touched()):
            if self._is_weight(path):
                continue
            places = walk(path, path.root(self.model), both, self._names, seen)
            found.update((place, frozen(value)) for place, value in places)
        return found

    def _touched(self, *kinds: Mapping[int, Collection[str]]) -> dict[int, set[str]]:
        """Attributes that the forward reads or writes at single modules, from outside of these where they are opaque."""
        found: dict[int, set[str]] = {}
        for touched in kinds or (self.reads.read_at, self.reads.written_at):
            for key, names in touched.items():
                found.setdefault(key, set()).update(names)
        return found

    def _is_opaque(self, name: str) -> bool:
        return any(name == opaque or name.startswith(f"{opaque}.") for opaque in self._opaque)

    def _aliases(self) -> tuple[tuple[Path, str], ...]:
        weights = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        names = {id(tensor): name for name, tensor in weights.items()}
        places = ((path, value) for path, value in self._snapshot().items() if isinstance(value, torch.Tensor))
        return tuple((path, names[id(value)]) for path, value in places if id(value) in names and (path.steps or path.scope))

    def _state(
        self, before: Mapping[Path, Any], last: Run, outside: Mapping[int, torch.Tensor], changes: Changes
    ) -> tuple[Path, ...]:
        """The places whose tensors the last run read, or stored in another place."""
        wanted = {*outside, *changes.moved}
        found: dict[int, Path] = {}
        for path, value in before.items():
            now = path.get(self.model) if isinstance(value, torch.Tensor) and id(value) in wanted else None
            if isinstance(now, torch.Tensor) and id(value) not in found:
                found[id(value)] = path
        for key, tensor in outside.items():
            own = key in found or key in last.weights or self.kernels.has_made(tensor)
            if tensor.requires_grad and not own:
                raise CaptureError(
                    f"the model's forward uses a tensor {list(tensor.shape)} that requires grad and is found neither among its "
                    "parameters nor in its attributes (a cached tensor, a tensor of another module?). Make it a parameter"
                )
        return tuple(found.values())

    def _is_only_written(self, path: Path, touched: Reads, *, lately: bool = False) -> bool:
        """An attribute that runs write and do not read; `lately`: the last one has written it."""
        module = None if path.steps or path.scope is not None else self.model.get_submodule(path.module)
        is_written = path.name in self.reads.written.get(type(module), frozenset()) and path.name != "training"
        is_read = path.name in touched.attributes.get(type(module), frozenset())
        return is_written and not is_read and not (lately and self.reads.first.get((id(module), path.name)) != "write")

    def _key(self, reads: Reads, left: tuple[Path, ...], of_tensors: tuple[TensorRead, ...]) -> HostKey:
        model = self.model
        prints = Fingerprints(named(model), reads.wants, skipped_places(left, model))
        of_classes = self._class_attributes(reads.names)
        read = lambda kind: reads.attributes.get(kind, frozenset()) - {"training"} | of_classes.get(kind, set())
        places = list(roots(model, read, reads, self._opaque, self._touched(self.reads.read_at)))
        places += [Path(name, "training") for name, _ in model.named_modules()]
        for name, module in model.named_modules():
            if name and not self._is_opaque(name):
                places += [Path(name, kind) for kind in MODULE_HOOKS if vars(module)[kind]]
        expected = tuple((path, path.fingerprint(model, prints)) for path in places if path not in left)
        environment = tuple((name, os.environ.get(name)) for name in reads.environment)
        held = self.reads.of_backward.held_in((*places, *left), model, self._names)
        return HostKey(reads, expected, self._opaque, left, environment, of_tensors, held_by_backward=held)
