"""The audit: now and then the model's own forward runs beside the planned one, from the same state, and both are compared.

No list of what a forward may depend on is complete; this finds what the guards do not know of. It sees forwards only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._torch import pytree
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, alike, tensor_key
from planner.tracer.host.observe import HOOKS
from planner.tracer.host.preserve import Generators, Preserved, keep_deep
from planner.tracer.host.state import HostKey
from planner.tracer.host.values import attributes

Digest = dict[str, Fingerprint]

_NOT_STATE = frozenset(vars(nn.Module())) - {"training"} | {"forward"}


def is_due(num_calls: int) -> bool:
    """Whether the planned call of this number is audited: the 2nd, 10th, 100th, 1000th, ...; the same on every rank."""
    return num_calls == 2 or (num_calls >= 10 and set(str(num_calls)[1:]) == {"0"} and str(num_calls)[0] == "1")


class Rewind:
    """The state that a forward starts from: what it may change is put back by `restore`, as often as wanted."""

    def __init__(self, model: nn.Module, key: HostKey, inputs: Sequence[torch.Tensor], device: torch.device) -> None:
        self._preserved = Preserved()
        names = {id(module): "" for module in model.modules()}
        todo: list[Any] = list(model.modules())
        for scope in key.reads.scopes:
            for name in scope.names:
                self._preserved.keep_variable(scope.variables, name)
                todo += keep_deep(self._preserved, scope.variables.get(name), names, name)
        while todo and len(self._preserved.held) < _MOST_OBJECTS:
            item = todo.pop()
            if self._preserved.keep(item, type(item).__name__):
                for held in list(attributes(item).values()):
                    todo += keep_deep(self._preserved, held, names)
        tensors = [*model.buffers(), *inputs]
        self._contents = [(tensor, tensor.detach().clone()) for tensor in tensors if tensor.layout is torch.strided]
        self._states = _generator_states(device)

    def restore(self) -> None:
        """Put everything back."""
        self._preserved.restore()
        with torch.no_grad():
            for tensor, content in self._contents:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)
        for put_back in self._states:
            put_back()


_MOST_OBJECTS = 20_000
"""Objects followed from a model at most."""


def _generator_states(device: torch.device) -> list[Callable[[], Any]]:
    generators = Generators(device)
    restored: list[Callable[[], Any]] = [partial(torch.set_rng_state, torch.get_rng_state()), generators.remembered()]
    for index in generators.devices():
        restored.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(index), index))
    return restored


def run_original(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The model's own forward with gradients enabled, so that it runs training's kernels; nothing is kept for a backward."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        return forward(*args, **kwargs)


def digest(model: nn.Module, out: Any, inputs: Sequence[torch.Tensor], device: torch.device) -> Digest:
    """What a forward returned and left behind, by name: equal exactly where every bit is."""
    prints = _Contents({id(module): name or "itself" for name, module in model.named_modules()})
    found: Digest = {f"output {i}": prints.of(leaf) for i, leaf in enumerate(pytree.tree_leaves(out))}
    found |= {f"input {i}": prints.of(tensor) for i, tensor in enumerate(inputs)}
    found |= {f"buffer {name}": prints.of(tensor) for name, tensor in model.named_buffers()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _NOT_STATE and attribute not in HOOKS:
                found[f"{name}.{attribute}".lstrip(".")] = prints.of(value)
    found["random state"] = (prints.of(torch.get_rng_state()), repr(Generators(device).host()))
    return found


class _Contents(Fingerprints):
    """Fingerprints in which tensors count with every bit."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(names, lambda _, name: not name.startswith("__"))

    def of(self, value: Any) -> Fingerprint:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            content = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            data = content.view(torch.uint8).cpu().numpy() if content.numel() else b""
            shape, _, *kind = tensor_key(value)
            return ("tensor", shape, *kind, hashlib.blake2b(data).digest())  # type: ignore[arg-type]
        return super().of(value)


def difference(expected: Digest, found: Digest) -> tuple[str, ...]:
    """Names of what is not equal."""
    names = dict.fromkeys((*expected, *found))
    return tuple(n for n in names if n not in expected or n not in found or not alike(expected[n], found[n], copied=True))
