"""Names of kernels, values and constants in an exported file."""

from __future__ import annotations

import builtins
import json
import keyword
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from planner._compat.dispatch import OpOverload
from planner.errors import ExportError
from planner.export.lines import Line, WrittenPass, origin
from planner.kernels import custom

_WRITTEN_OUT = (custom.bernoulli, custom.noise, custom.laid_out, custom.rng_state, custom.swap_rng_state)
_NAMESPACES = ("aten", "prims")
_LETTERS = [*string.ascii_lowercase, *(f"x{i}" for i in range(26, 1000))]
_MOST_PARTS = 3
"""Number of a module path's last parts that go into a name."""


def kernel_names(targets: Iterable[Any], taken: Collection[str]) -> dict[Any, str]:
    """Kernel -> its short name in the file: the operator's, with the overload where several of one operator are called.

    Args:
        targets: what the graphs call.
        taken: names that already have a meaning in the file.

    Raises:
        ExportError: a kernel that torch alone does not have.
    """
    names: dict[Any, str] = {}
    used = {*taken, *dir(builtins), *keyword.kwlist}
    for target in dict.fromkeys(targets):
        if target in _WRITTEN_OUT:
            names[target] = target.__name__
            used.add(target.__name__)
    for target in sorted({target for target in targets if target not in names}, key=_usual_first):
        if not isinstance(target, OpOverload) or target.namespace not in _NAMESPACES:
            raise ExportError(
                f"the step calls {target}, which plain torch does not have, so that no file can stand alone with it. "
                "Train with the planned module itself; torch.save takes it as it is"
            )
        operator, overload = str(target).split(".")[1:]
        name = operator if operator not in used else f"{operator}_{overload}"
        while name in used:
            name += "_"
        names[target] = name
        used.add(name)
    return names


def _usual_first(target: Any) -> tuple[bool, str]:
    return not str(target).endswith((".default", ".Tensor")), str(target)


def literal(value: Any, device: torch.device | None = None) -> str:
    """Python text of a constant; `device` is written as DEVICE.

    Raises:
        ExportError: not a plain value.
    """
    if isinstance(value, (list, tuple)) and type(value).__name__ in ("list", "tuple", "immutable_list", "Size"):
        items = ", ".join(literal(item, device) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item, device)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.device):
        return "DEVICE" if value == device else f"torch.device({str(value)!r})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if value is None or value is ... or type(value) in (bool, int, float, str, bytes):
        return quoted(value) if isinstance(value, str) else repr(value)
    raise ExportError(f"a {type(value).__name__} ({str(value)[:60]}) cannot be written into a file that knows torch alone")


def quoted(text: str) -> str:
    """The text in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def key_text(key: str, prefix: str) -> str:
    """A qualified name as Python text; relative to `at` where it lies below the prefix."""
    return f"at + {quoted(key[len(prefix) :])}" if is_below(key, prefix) else quoted(key)


def is_below(key: str, prefix: str) -> bool:
    """Whether the qualified name lies below the module `prefix`; nothing lies below ""."""
    return bool(prefix) and key.startswith(f"{prefix}.")


class ValueNames:
    """Names for values by the module and the kernel that they come from: the same in forward and backward.

    A value of the forward has a key, "transformer.h.3.mlp.act.tanh"; what the backward makes starts with "d_".

    `nodes`: names of the joint graph's nodes that are the forward.
    """

    def __init__(self, forward: WrittenPass, nodes: Collection[str]) -> None:
        self._nodes = nodes
        counts: dict[tuple[str, str], int] = {}
        self._stems: dict[str, tuple[str, str]] = {}
        for line in forward.lines:
            if origin(line.kernel) not in self._stems:
                operator = _operator(line)
                counts[line.module, operator] = n = counts.get((line.module, operator), 0) + 1
                self._stems[origin(line.kernel)] = (line.module, operator if n == 1 else f"{operator}_{n}")

    def is_of_forward(self, line: Line) -> bool:
        """The line is of the forward, for the first time or again."""
        return origin(line.kernel) in self._nodes

    def key(self, line: Line, position: int) -> str:
        """Of the result of a line at this position: its module, and what is told apart there."""
        module, stem = self._stems.get(origin(line.kernel)) or (line.module, _operator(line))
        suffix = f"_{_LETTERS[position]}" if len(line.made) > 1 else ""
        return f"{module}.{stem}{suffix}".strip(".")


def identifier(key: str, prefix: str, is_gradient: bool = False) -> str:
    """A variable's name for a value of this key inside a function for the module `prefix`; not yet told from others."""
    path, _, stem = key.rpartition(".")
    inside = path[len(prefix) + 1 :] if is_below(path, prefix) else path
    parts = _parts(inside)[-_MOST_PARTS:] if path != prefix else [_container(prefix) or "model"]
    return re.sub(r"\W", "_", "_".join([*(["d"] if is_gradient else []), *parts, stem]))


def _operator(line: Line) -> str:
    target = line.kernel.target
    name = str(target).split(".")[1] if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))
    return re.sub(r"^_*(native_)?|(_legit)?(_functional)?(_backward(_data)?)?$", "", name)


def _parts(path: str) -> list[str]:
    """The parts of a module path, numbers joined to what they number: transformer, h3, attn."""
    parts: list[str] = []
    for part in path.split(".") if path else ():
        if not part[:1].isdigit():
            parts.append(part)
        elif parts:
            parts[-1] += f"_{part}" if parts[-1][-1].isdigit() else part
        else:
            parts.append(f"m{part}")
    return parts


def _container(prefix: str) -> str:
    """What numbered modules are called by: "h" for transformer.h.3."""
    named = [part for part in prefix.split(".") if not part[:1].isdigit()]
    return named[-1] if named else ""


def counted(paths: Sequence[str]) -> str:
    """Module paths as a person would list them: "transformer.h.0, 3-11"."""
    numbers: dict[str, set[int]] = {}
    for path in paths:
        container, dot, last = path.rpartition(".")
        numbers.setdefault(container + dot if last.isdigit() else path, set()).update([int(last)] if last.isdigit() else [])
    listed = []
    for container, found in numbers.items():
        firsts = [n for n in sorted(found) if n - 1 not in found]
        lasts = [n for n in sorted(found) if n + 1 not in found]
        ranges = [str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True)]
        listed.append(container + ", ".join(ranges))
    return "; ".join(listed)


def snake(name: str) -> str:
    """GPT2Block -> gpt2_block."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def unique(name: str, taken: Mapping[str, Any] | Collection[str]) -> str:
    """The name, numbered where it is taken."""
    candidate, n = name, 1
    while candidate in taken:
        n += 1
        candidate = f"{name}_{n}"
    return candidate
