"""Recorder of the Python state that a forward reads and writes: attributes, global variables, environment variables."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import HOOK_ATTRIBUTES
from planner.profiler.python_events import python_events_off, set_profiler
from planner.tracer.faults import calls_users_code
from planner.tracer.host.backward_code import TAKE_CODE, BackwardCode, LeftOut, given_to
from planner.tracer.host.backward_reads import ReadsOfBackward
from planner.tracer.host.callers import is_checkpoints, is_compilers, is_ours, is_users
from planner.tracer.host.environment import environment_noted
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.foreign import is_foreign_class, is_special
from planner.tracer.host.generators import GENERATOR_CONTROLS, GeneratorCall, control_of_numpy_noted
from planner.tracer.host.iterators import is_used_up
from planner.tracer.host.library_reads import LibraryRead, library_reads
from planner.tracer.host.preserve import Preserved, keep_deep, keep_module, keep_reachable
from planner.tracer.host.scopes import Reads, attribute_names, compares_identities, each_named, is_library_code, scopes_of
from planner.tracer.host.values import attributes, own_class, reachable

_INTERNAL = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
"""Attributes by which nn.Module does its work: its weights, submodules and hooks are compared by themselves."""
_PLAIN = (int, float, str, bool)
_NODE_HOOKS = ("register_hook", "register_prehook")
"""Methods of a node of autograd's graph that take code which runs in the backward."""
_SMALL = 64
"""Items of a container that is looked through at every read."""


class ReadRecorder:
    """Notes, while entered, what Python state the running code reads and writes, and remembers it as it was before.

    Attributes:
        controlled: the first call that controls torch's generator; None if there is none.
        drew: the submodule that first used a random generator of Python's or numpy's; None if none did.
        compares_identities: code asked whether two objects are the same one.
        has_backward_code: code of the model's own will run in the backward.
        left_out: what no plan repeats of the backward, each with the submodule that first prepared it.
        on_hooked_node: called with each node of autograd's graph that code registers a hook on.
        read_at, written_at: attributes that were read and written, by identity of the object; reads of modules alone.
        first: what came first in this run, "read" or "write", per (identity of an object, attribute).
    """

    def __init__(
        self,
        model: nn.Module,
        preserved: Preserved,
        names: Mapping[int, str],
        where: Callable[[], str],
        share: Callable[[torch.Tensor], None],
    ) -> None:
        """`names`: the model's modules by identity. `where`: the submodule that is running. `share`: called with tensors
        whose memory numpy gets."""
        self._preserved, self._names, self._where, self._share = preserved, names, where, share
        self._model = model
        self._thread = threading.get_ident()
        self._read: dict[type, set[str]] = {}
        self._written: dict[type, set[str]] = {}
        self.read_at: dict[int, set[str]] = {}
        self.written_at: dict[int, set[str]] = {}
        self._opened: dict[int, Any] = {}
        self.first: dict[tuple[int, str], str] = {}
        self._patched: dict[type, tuple[Any, Any]] = {}
        self._codes: dict[types.CodeType, tuple[dict[str, Any], str]] = {}
        self._known: dict[int, types.CodeType] = {}  # by identity: a code object computes its hash each time
        self._ignored: set[type] = {types.NoneType}  # classes whose built-in methods `_on_builtin` need not hear of
        self._opaque_codes: dict[types.CodeType, tuple[dict[str, Any], str]] = {}
        self.of_backward = ReadsOfBackward()
        self._classes: frozenset[type] = frozenset()
        self._environment: dict[str, None] = {}
        self._objects: list[Any] = []  # so that no identity is used twice
        self._met: set[int] = set()  # objects that were there; these, or `preserved`, keep them alive
        self._functions: dict[int, Any] = {}  # of methods that were looked at
        self._built: set[int] = set()  # objects that the forward made
        self._sizes: dict[int, int] = {}
        self.controlled: GeneratorCall | None = None
        self.drew: str | None = None
        self.compares_identities = False
        self.has_backward_code = False
        self.left_out: dict[LeftOut, str] = {}
        self.on_hooked_node: Callable[[torch.autograd.graph.Node], None] = lambda node: None
        self.paused = False

    def new_run(self) -> None:
        """From now on, an attribute that is written before it is read counts as not read."""
        self.first.clear()
        self.of_backward.new_run()
        self._classes = frozenset()

    def reads(self) -> Reads:
        """What was read so far."""
        for this in self._opened.values():
            held = object.__getattribute__(this, "__dict__")
            opened = {name for name in held if name not in _INTERNAL and not is_special(name)}
            self._read.setdefault(type(this), set()).update(opened)
            self._written.setdefault(type(this), set()).update(opened)
        named = self.names
        hooks = named & HOOK_ATTRIBUTES
        for module in self._model.modules() if hooks else ():
            self._read.setdefault(type(module), set()).update(hooks)
        return Reads(
            {kind: frozenset(names) for kind, names in self._read.items()},
            named,
            scopes_of(self._codes),
            tuple(self._environment),
            scopes_of(self._opaque_codes),
            self.of_backward.names,
        )

    @property
    def names(self) -> frozenset[str]:
        """Every attribute name in the code that ran."""
        return attribute_names(self._codes)

    def libraries(self) -> tuple[LibraryRead, ...]:
        """What the code that ran reads of libraries."""
        return library_reads(self._codes)

    @property
    def written(self) -> dict[type, frozenset[str]]:
        """Per class, the attributes that were written."""
        return {kind: frozenset(names) for kind, names in self._written.items()}

    def see(self, value: Any, where: str = "") -> None:
        """Remember a value as it is now, and note what is read of the objects it is made of."""
        if self._is_known(value):
            return
        for item in keep_deep(self._preserved, value, self._names, where):
            self._objects.append(item)
            self._met.add(id(item))
            if isinstance(item, nn.Module):  # one that is in a container, not among the model's own
                self._keep_modules(item, where)
            elif not self._patch(type(item)) and self._preserved.keep(item, where):
                for held in list(attributes(item).values()):  # a class that cannot be patched: a namespace
                    self.see(held, where)

    def _is_known(self, value: Any) -> bool:
        """A large container that was looked through, and has about as many items as then: a loop may read it for each item."""
        size = own_class(value).__len__(value) if isinstance(value, (dict, list, set, tuple)) else 0
        if size <= _SMALL:
            return False
        if size // 2 < self._sizes.get(id(value), 0) < size * 2:
            return True
        self._sizes[id(value)] = size
        return False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While entered, reads and writes of this thread are noted."""
        profile, collects = sys.getprofile(), gc.isenabled()
        with control_of_numpy_noted(self._on_control_of_numpy), environment_noted(self._on_variable):
            try:
                gc.disable()  # callbacks and finalizers that a collection runs are not the forward's code
                self._patch(nn.Module)
                sys.setprofile(self._on_event)
                yield
            finally:
                set_profiler(profile)
                if collects:
                    gc.enable()
                for kind, own in self._patched.items():
                    for name, held in zip(("__getattribute__", "__setattr__"), own, strict=True):
                        if held is None:
                            delattr(kind, name)
                        else:
                            setattr(kind, name, held)
                self._patched.clear()

    def _on_variable(self, name: str) -> None:
        if threading.get_ident() == self._thread and not self.paused:
            self._environment[name] = None

    def _on_control_of_numpy(self, caller: types.FrameType) -> None:
        if self.drew is None and not self.paused and not is_ours(caller) and not is_compilers(caller):
            self.drew = self._where()

    def _on_event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        # a million events in a capture: most are of code that is known, and of built-in methods of classes without interest
        if event == "call":
            if (key := id(frame.f_code)) not in self._known or key in TAKE_CODE:
                self._on_call(frame)
        elif event == "c_call" and type(owner := getattr(arg, "__self__", None)) not in self._ignored:
            self._on_builtin(frame, arg, owner)

    def _on_call(self, frame: types.FrameType) -> None:
        code = frame.f_code
        given = None if self.paused else given_to(frame)
        if given is not None:
            self._on_backward_code(given)
        if id(code) in self._known or (self.paused and code in self._opaque_codes):
            return
        is_library = is_library_code(code)
        self.compares_identities = self.compares_identities or compares_identities(code)
        if is_library or not self.paused:
            self._known[id(code)] = code
        if not is_library:
            (self._opaque_codes if self.paused else self._codes)[code] = (frame.f_globals, self._where())
            is_opaque = self.paused
            with self._not_noting():
                self._see_variables(code, frame, is_opaque)

    def _on_builtin(self, frame: types.FrameType, function: Any, owner: Any) -> None:
        """A built-in method of this object is called."""
        if isinstance(owner, torch.Tensor):
            name = function.__name__
            if name == "numpy":
                self._share(owner)
            elif name == "retain_grad" and is_users(frame):
                self._note_left_out(LeftOut.RETAINED_GRADIENT)
        elif isinstance(owner, torch.autograd.graph.Node):
            if function.__name__ in _NODE_HOOKS and is_users(frame):
                self._note_left_out(LeftOut.NODE_HOOK)
                self.on_hooked_node(owner)
        elif is_generator(owner):
            if not self.paused:
                self._on_generator(frame, function, owner)
        else:
            self._ignored.add(type(owner))

    def _on_backward_code(self, given: BackwardCode) -> None:
        """Note what code reads that will run in the backward."""
        self.has_backward_code = True
        if self.of_backward.is_noted(given, self._names):
            return
        with self._not_noting():
            given.follow(self._model, self._names, self._classes_of_model)
            for code, variables in given.codes.items():
                self._codes[code] = (variables, self._where())
                for scope, name in each_named(code, variables):
                    self._preserved.keep_variable(scope, name)
                    if not isinstance(scope[name], (type, types.ModuleType)):
                        self.see(scope[name], name)
            for value in given.held.values():
                if not isinstance(value, nn.Module):
                    self.see(value)
            self.of_backward.add(given, self._names)
            names = given.names
            for module in self._model.modules():  # any of which it may reach
                held = vars(module).keys() - _INTERNAL
                for name in held if names is None else held & names:
                    self._read.setdefault(type(module), set()).add(name)
                    self.see(vars(module)[name], name)
        for kind in given.left_out:
            self._note_left_out(kind)

    def _note_left_out(self, kind: LeftOut) -> None:
        if not self.paused:
            self.left_out.setdefault(kind, self._where())

    def _classes_of_model(self) -> frozenset[type]:
        """Classes of all that the model leads to, as of the first time that a run asks for them."""
        if not self._classes:
            self._classes = frozenset(map(type, reachable([self._model])))
        return self._classes

    def _on_generator(self, frame: types.FrameType, function: Any, owner: Any) -> None:
        if self.controlled is None and not is_ours(frame):
            if not isinstance(owner, torch.Generator):
                if self.drew is None and not is_compilers(frame):
                    self.drew = self._where()
            elif function.__name__ in GENERATOR_CONTROLS:
                self.controlled = GeneratorCall(self._where(), function.__name__, is_checkpoints(frame))

    def _see_variables(self, code: types.CodeType, frame: types.FrameType, is_opaque: bool) -> None:
        """Remember the variables that code names; where it is an opaque module's, everything that these lead to, too."""
        for scope, name in each_named(code, frame.f_globals):
            self._preserved.keep_variable(scope, name)
            value = scope[name]
            if isinstance(value, type) and not is_foreign_class(value):
                keep_deep(self._preserved, value, self._names, name)
                if is_opaque:
                    keep_reachable(self._preserved, [value], self._names)
            if not isinstance(value, (type, types.ModuleType)):
                self._see_value(value, name, is_opaque)
        for name in code.co_freevars:
            held = frame.f_locals.get(name)
            if held is not None and not isinstance(held, nn.Module):
                self._see_value(held, name, is_opaque)

    def _see_value(self, value: Any, name: str, is_opaque: bool) -> None:
        if is_opaque:
            keep_reachable(self._preserved, keep_deep(self._preserved, value, self._names, name), self._names)
        else:
            self.see(value, name)

    def _patch(self, kind: type) -> bool:
        """Patch this class so that reads and writes of its instances' attributes are recorded; False where that fails."""
        if kind in self._patched:
            return True
        if kind is not nn.Module and (issubclass(kind, nn.Module) or is_foreign_class(kind)):
            return False
        getter, setter = kind.__getattribute__, kind.__setattr__
        own = (vars(kind).get("__getattribute__"), vars(kind).get("__setattr__"))
        noted, written = self._note_read, self._note_write

        @calls_users_code
        def recorded_get(this: Any, name: str) -> Any:
            if kind is nn.Module and name in _INTERNAL:  # most reads there are
                return getter(this, name)
            try:
                value = getter(this, name)
            except AttributeError:
                noted(this, name, None)
                raise
            noted(this, name, value)
            return getter(this, name) if is_used_up(value) else value  # its guard is in its place now

        @calls_users_code
        def recorded_set(this: Any, name: str, value: Any) -> None:
            written(this, name)
            setter(this, name, value)

        try:
            kind.__getattribute__ = recorded_get  # type: ignore[method-assign, assignment]
            kind.__setattr__ = recorded_set  # type: ignore[method-assign, assignment]
        except TypeError:  # a class that cannot be changed
            return False
        self._patched[kind] = own
        return True

    def _note_read(self, this: Any, name: str, value: Any) -> None:
        if name == "__dict__" and not self.paused and is_users(sys._getframe(2)):
            self._opened[id(this)] = this  # vars(module): anything in it may be read or written
            return
        if name in _INTERNAL or self.paused or is_special(name) or threading.get_ident() != self._thread:
            return
        needs_look = self._needs_look(value)
        if not needs_look and (id(this), name) in self.first:
            return
        self._keep_object(this)
        if self.first.setdefault((id(this), name), "read") == "read":
            self._read.setdefault(type(this), set()).add(name)
            if issubclass(type(this), nn.Module):
                self.read_at.setdefault(id(this), set()).add(name)
        if needs_look:
            with self._not_noting(), python_events_off():  # looking through a value makes many calls, none of them the model's
                keep = self._keep_modules if isinstance(value, nn.Module) else self.see
                keep(value, name)
                if type(value) is types.MethodType:
                    self._functions[id(value.__func__)] = value.__func__

    def _keep_modules(self, root: nn.Module, where: str) -> None:
        for module in root.modules():
            keep_module(self._preserved, module, where)

    def _needs_look(self, value: Any) -> bool:
        """What a read returns may lead to Python state: it is no number, tensor, module of the model, or plain method of one.

        A method is plain that was looked at before and whose function holds nothing. By `type`: the class that an object names
        itself may be computed by the user's code.
        """
        if value is None or type(value) in _PLAIN or issubclass(type(value), torch.Tensor) or id(value) in self._names:
            return False
        if type(value) is not types.MethodType or id(value.__self__) not in self._names:
            return True
        function = value.__func__
        if type(function) is not types.FunctionType or id(function) not in self._functions:
            return True
        if function.__closure__ or function.__kwdefaults__ or function.__dict__:
            return True
        return any(held is not None and type(held) not in _PLAIN for held in function.__defaults__ or ())

    def _keep_object(self, this: Any) -> None:
        """Remember the attributes of an object, but for one that is being built: a cache outside of the model may keep it."""
        if issubclass(type(this), nn.Module) or id(this) in self._built:
            return
        with self._not_noting():
            if id(this) in self._met or attributes(this):
                self._met.add(id(this))
                self._preserved.keep(this, type(this).__qualname__)
            else:
                self._built.add(id(this))

    def _note_write(self, this: Any, name: str) -> None:
        if self.paused or threading.get_ident() != self._thread:
            return
        self._keep_object(this)
        self.first.setdefault((id(this), name), "write")
        self._written.setdefault(type(this), set()).add(name)
        self.written_at.setdefault(id(this), set()).add(name)

    @contextlib.contextmanager
    def _not_noting(self) -> Iterator[None]:
        """What the recorder itself reads is no read of the model's."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before
