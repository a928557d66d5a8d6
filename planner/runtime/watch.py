"""What capture froze of the model itself: its modules, their attributes and hooks, its tensors. Looked at anew at every call.

A look costs microseconds, so it is prepared: dictionaries and getters are found once, and compared as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from planner._torch import tensors_alike
from planner.tracer.fidelity import HOOKS, is_foreign

_SCALARS = (bool, int, float, str, type(None))
_NOT_RUNNING = frozenset({"__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights", "__setstate__"})
_READ_BY_TRANSFORMERS = frozenset(
    {
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class Attributes:
    """Plain values that a module's code may branch on.

    Attributes:
        module: position of the module in `modules()`.
        holder: name of the module's attribute that holds them ("config"); "" for the module itself.
        names, values: at capture. A module's own names start with "training".
    """

    module: int
    holder: str
    names: tuple[str, ...]
    values: tuple[Any, ...]


def attributes(
    model: nn.Module, volatile: Collection[tuple[int, str]] = (), parts: Collection[str] = ()
) -> tuple[Attributes, ...]:
    """The plain attributes named in the code of the model's classes.

    `volatile`: (position of the module, name) of those that the forward itself changes (counters), left out.
    `parts`: names of submodules that run as they are, of which only the training flags matter.
    """
    found: list[Attributes] = []
    seen: set[int] = set()
    named = {kind: _names_in(kind) for kind in {type(module) for module in model.modules()}}
    for i, (path, module) in enumerate(model.named_modules()):
        inside = any(path == part or path.startswith(f"{part}.") for part in parts)
        mine = frozenset() if inside else named[type(module)]
        held = {name: value for name, value in vars(module).items() if name in mine and (i, name) not in volatile}
        plain = {name: value for name, value in held.items() if _is_plain(value)}
        plain.pop("training", None)
        found.append(Attributes(i, "", ("training", *plain), (module.training, *plain.values())))
        for name, value in held.items():
            if id(value) not in seen and _is_settings(value):
                seen.add(id(value))
                inner = {key: item for key, item in vars(value).items() if _is_plain(item) and _is_steering(value, key)}
                found += [Attributes(i, name, tuple(inner), tuple(inner.values()))] if inner else []
    return tuple(found)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (type(value) is tuple and all(isinstance(item, _SCALARS) for item in value))


def _is_steering(settings: Any, name: str) -> bool:
    """Saving a transformers model writes into its configuration; of those, what its forward is known to read."""
    return not type(settings).__module__.startswith("transformers.") or name in _READ_BY_TRANSFORMERS


def _is_settings(value: Any) -> bool:
    """An object of the user's that holds plain values, as a configuration does."""
    known = isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value)
    return not known and hasattr(value, "__dict__") and not type(value).__module__.startswith("torch")


def _names_in(kind: type[nn.Module]) -> frozenset[str]:
    """Every attribute name in the code that instances of a module class run: an attribute not among them steers nothing."""
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for key, member in vars(base).items():
            function = inspect.unwrap(member.fget if isinstance(member, property) and member.fget else member)
            if key not in _NOT_RUNNING and isinstance(function, FunctionType):
                names.update(name for code in _codes(function.__code__) for name in code.co_names)
    return frozenset(names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class Watched:
    """A model's modules, parameters and buffers, as they are at each call."""

    def __init__(self, model: nn.Module, names: Sequence[str], expected: Sequence[Attributes]) -> None:
        self.modules = tuple(model.modules())
        self._names = [name or "the model" for name, _ in model.named_modules()]
        self.now = _reader([_place(model, name) for name in names])
        """The tensors that the model holds at this moment."""
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(self.now())))}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        known = set(names)
        self._ties = [(name, _place(model, name), first[id(tensor)]) for name, tensor in every if name not in known]
        self._expected = tuple(expected)
        self._holders = [_holder(self.modules[a.module], a.holder) for a in expected]
        held = zip(self._holders, expected, strict=True)
        self._attributes = _reader([(holder, name) for holder, a in held for name in a.names])
        self._values = tuple(value for a in expected for value in a.values)
        self._parents = [module._modules for module in self.modules if module._modules]
        self._children = self._submodules()
        hooks = [vars(module)[kind] for module in self.modules[1:] for kind in HOOKS]
        self._without_hooks = [held for held in hooks if not held]
        self._alike: Any = None

    def _submodules(self) -> tuple[list[int], list[nn.Module | None]]:
        return list(map(len, self._parents)), list(chain.from_iterable(held.values() for held in self._parents))

    def changed(self) -> str:
        """What of the modules is not as it was at capture; '' if nothing."""
        try:
            if self._attributes() != self._values:
                return self._changed_attribute()
        except (KeyError, RuntimeError, TypeError, ValueError):  # gone, or now a tensor
            return self._changed_attribute()
        if self._submodules() != self._children:
            return "the model's submodules (one was replaced, added or removed)"
        if any(self._without_hooks):
            if any(is_foreign(hook) for hooks in self._without_hooks for hook in hooks.values()):
                return "a submodule's hooks (one was added, which a plan would not call)"
            self._without_hooks = [hooks for hooks in self._without_hooks if not hooks]
        return ""

    def _changed_attribute(self) -> str:
        for holder, expected in zip(self._holders, self._expected, strict=True):
            module = f"{self._names[expected.module]}{'.' if expected.holder else ''}{expected.holder}"
            for name, value in zip(expected.names, expected.values, strict=True):
                now = holder.get(name, "gone")
                if isinstance(now, torch.Tensor) or type(now) is not type(value) or now != value:
                    if name == "training":
                        return f"training mode (a {type(self.modules[expected.module]).__name__}: {module}, is now {now})"
                    return f"{module}.{name} ({now!r}, planned for {value!r})"
        return ""

    def untied(self, held: Sequence[torch.Tensor]) -> str:
        """Name of a tensor that was the same as another when this was made and no longer is; '' if none."""
        return next((name for name, (holder, key), i in self._ties if holder[key] is not held[i]), "")

    def alike(self, held: Sequence[torch.Tensor]) -> bool:
        """The tensors have the metadata they had when `approve` was called; False says nothing."""
        return self._alike is not None and self._alike(held)

    def approve(self, held: Sequence[torch.Tensor]) -> None:
        """These tensors were found to be as planned: `alike` compares with them."""
        self._alike = tensors_alike(held)


def _reader(places: Sequence[tuple[dict[str, Any], str]]) -> Callable[[], tuple[Any, ...]]:
    """A function that looks up every (dictionary, key). It is generated: a loop over them takes twice as long."""
    holders = list({id(holder): holder for holder, _ in places}.values())
    position = {id(holder): i for i, holder in enumerate(holders)}
    given = ", ".join(f"d{i}" for i in range(len(holders)))
    looked_up = "".join(f"d{position[id(holder)]}[{name!r}], " for holder, name in places)
    made: dict[str, Any] = {}
    exec(f"def bind({given}):\n    def read():\n        return ({looked_up})\n    return read", made)
    return made["bind"](*holders)  # type: ignore[no-any-return]


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    return vars(vars(module)[name]) if name else vars(module)


def _place(model: nn.Module, qualified: str) -> tuple[dict[str, Any], str]:
    path, _, name = qualified.rpartition(".")
    module = model.get_submodule(path)
    holder = module._parameters if name in module._parameters else module._buffers
    return holder, name
