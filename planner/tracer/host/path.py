"""Where Python state lies: a Path leads from a model, a global variable or a call's arguments to a place."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from planner._compat.private_names import HOOK_ATTRIBUTES, HOOK_FLAGS
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints
from planner.tracer.host.scopes import ArgumentsScope, Scope
from planner.tracer.host.values import ABSENT, MODULE_STATE, PathStep, attributes, class_homes, find_in_class, member, text_of
from planner.tracer.host.written_values import with_member


@dataclass(frozen=True, slots=True)
class Path:
    """A place in Python state: an attribute of a submodule or a global variable, and steps from its value inwards.

    Attributes:
        module: qualified name of the submodule; for a global variable, of the one that was running when it was first read.
        name: the attribute or variable.
        steps: from its value to the place.
        scope: set for a global variable, and for the arguments of a call (`planner.tracer.host.arguments`).
    """

    module: str
    name: str
    steps: tuple[PathStep, ...] = ()
    scope: Scope | ArgumentsScope | None = None

    def __str__(self) -> str:
        return f"{self.scope.kind} {self.place}" if self.scope is not None else self.place

    @property
    def place(self) -> str:
        """As Python writes it: "body.scale", or "cache['key']" of a global variable."""
        start = self.name if self.scope is not None else f"{self.module}.{self.name}".lstrip(".")
        return start + "".join(map(text_of, self.steps))

    @property
    def holder(self) -> Path:
        """The place of the container or object that the value here is a member of."""
        return Path(self.module, self.name, self.steps[:-1], self.scope)

    def inside(self, step: PathStep) -> Path:
        """The place of a member of the value here."""
        return Path(self.module, self.name, (*self.steps, step), self.scope)

    def is_inside(self, other: Path) -> bool:
        """This place is `other`, or inside of it."""
        same = (self.module, self.name, self.scope) == (other.module, other.name, other.scope)
        return same and self.steps[: len(other.steps)] == other.steps

    def root(self, model: nn.Module) -> Any:
        """The value that the steps start from; ABSENT where there is none."""
        if self.scope is not None:
            return self.scope.variables.get(self.name, ABSENT)
        return look_up(submodule(model, self.module), self.name)

    def fingerprint(self, model: nn.Module, prints: Fingerprints) -> Fingerprint:
        """The fingerprint of the value that the steps start from.

        Hooks are compared in their order: the numbers that torch registers them under differ from one time to the next.
        """
        root = self.root(model)
        if self.scope is None and self.name in HOOK_ATTRIBUTES and isinstance(root, dict):
            flags = [vars(model.get_submodule(self.module)).get(kind, {}) for kind in HOOK_FLAGS.get(self.name, ())]
            return prints.of([(hook, *(number in flag for flag in flags)) for number, hook in root.items()])
        return prints.of(root)

    def get(self, model: nn.Module) -> Any:
        """The value at this place; ABSENT where there is none."""
        value = self.root(model)
        for step in self.steps:
            value = member(value, step)
        return value

    def set(self, model: nn.Module, new: Any) -> None:
        """Write the value at this place, in place where its container can be written, else in a new container.

        Args:
            new: ABSENT removes an attribute, a member of a dictionary or a global variable.

        Raises:
            TypeError: it cannot be written.
        """
        if new is ABSENT:
            self._remove(model)
            return
        values = [self.root(model)]
        for step in self.steps:
            values.append(member(values[-1], step))
        for value, step in zip(reversed(values[:-1]), reversed(self.steps), strict=True):
            written = with_member(value, step, new)
            if written is value:
                return
            new = written
        self._dictionary(model)[self.name] = new

    def replace(self, model: nn.Module, new: Any) -> None:
        """Write another value where the one that is there is held: in a class, where a module has none of its own."""
        module = submodule(model, self.module) if self.scope is None and not self.steps else None
        if module is not None and not any(
            self.name in own for own in (vars(module), *(vars(module)[kind] for kind in MODULE_STATE))
        ):
            home = next((home for home in class_homes(type(module)) if self.name in vars(home)), None)
            if home is not None:
                setattr(home, self.name, new)
                return
        self.set(model, new)

    def _remove(self, model: nn.Module) -> None:
        holder, (kind, key) = (self.holder.get(model), self.steps[-1]) if self.steps else (None, ("", ""))
        if not self.steps:
            self._dictionary(model).pop(self.name, None)
        elif kind == "item" and isinstance(holder, dict):
            holder.pop(key, None)
        elif kind == "attr" and key in attributes(holder):
            object.__delattr__(holder, key)

    def _dictionary(self, model: nn.Module) -> dict[str, Any]:
        """The dictionary that holds the value that the steps start from."""
        if self.scope is not None:
            return self.scope.variables
        module = submodule(model, self.module)
        return next((vars(module)[kind] for kind in MODULE_STATE if self.name in vars(module)[kind]), vars(module))


def submodule(model: nn.Module, name: str) -> nn.Module:
    """As `model.get_submodule`, but for its checks: guards and captures ask for tens of thousands."""
    module: Any = model
    for part in name.split(".") if name else ():
        module = module._modules.get(part)
        if module is None:
            return model.get_submodule(name)  # which finds it elsewhere, or raises
    return module  # type: ignore[no-any-return]


def look_up(module: nn.Module, name: str) -> Any:
    """What `module.name` is, without running properties: its own, its tensors' and submodules', or its class's."""
    own = vars(module)
    if name in own:
        return _plain_forward(module, own[name]) if name == "forward" else own[name]
    for kind in MODULE_STATE:
        if name in own[kind]:
            return own[kind][name]
    return find_in_class(type(module), name)


def _plain_forward(module: nn.Module, value: Any) -> Any:
    """An instance's own `forward`; under an installed plan, the one that the plan was installed over."""
    value = getattr(value, "unplanned", value)
    of_class = next(vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base))
    is_class_one = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is of_class
    return of_class if is_class_one else value


def named(model: nn.Module) -> dict[int, str]:
    """The model's modules and weights, by identity."""
    found = {id(module): name or "itself" for name, module in model.named_modules()}
    weights = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {**{id(tensor): name for name, tensor in reversed(weights)}, **found}
