"""The interface of an exported model as Python text: parameters and buffers, arguments, outputs."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import ExportError
from planner.export.names import literal, quoted, unique
from planner.export.standalone import Expected
from planner.graph.graph import Kind
from planner.runtime.step import RewrittenStep
from planner.tracer.host.fingerprint import TensorKey
from planner.tracer.host.state import Ref

_MOST_NUMBERS = 64
"""Larger constants are stored in a file of their own."""

HeldRow = tuple[str, str]
"""A parameter's or buffer's name, and the expression that describes it."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The call that a step was planned for, as forward's arguments.

    Attributes:
        signature: forward's, with the defaults that can be written out.
        values: by name; an Expected where a tensor stands.
        tensors: per tensor leaf of the call, what is expected of it.
        paths: per tensor leaf, the expression that finds it among the arguments.
    """

    signature: inspect.Signature
    values: Mapping[str, Any]
    tensors: tuple[Expected, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _TensorLeaf:
    """Stands for a tensor leaf of the call."""

    position: int


def arguments(forward: Callable[..., Any], step: RewrittenStep) -> Arguments:
    """The planned call as arguments of the model's forward.

    Raises:
        ExportError: an argument is neither a tensor, a plain value, nor a list, tuple or dict of these.
    """
    call = step.joint.call
    leaves: list[Any] = list(call.leaves)
    for n, position in enumerate(call.tensors):
        leaves[position] = _TensorLeaf(n)
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    signature = _signature(forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    flags = _flags(step)
    held = {name for name, _ in step.key.weights}
    found: dict[int, tuple[Expected, str]] = {}

    def named(path: str, value: Any) -> Any:
        if isinstance(value, _TensorLeaf):
            name = f"argument {path}" if path in held else path
            key = step.key.inputs[value.position]
            expected = _expected(name, key, key[1], flags[value.position])
            found[value.position] = (expected, path)
            return expected
        if type(value) in (list, tuple):
            return type(value)(named(f"{path}[{i}]", item) for i, item in enumerate(value))
        if type(value) is dict:
            return {key: named(f"{path}[{key!r}]", item) for key, item in value.items()}
        try:
            literal(value)
        except ExportError as error:
            raise ExportError(f"argument {path} of the planned call: {error}") from error
        return value

    values = {name: named(name, value) for name, value in bound.arguments.items()}
    tensors, paths = zip(*(found[n] for n in range(len(call.tensors))), strict=True)
    return Arguments(signature, values, tensors, paths)


def _flags(step: RewrittenStep) -> dict[str | int, dict[str, bool]]:
    """Key of a tensor in the joint graph -> the attributes of its Expected that depend on the step."""
    given = [i for i in step.joint.inputs if i.kind is not Kind.TANGENT]
    return {i.key: {"backward": i.node in step.partitioned.saved_inputs, "written": i.mutated} for i in given}


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    kept = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty:
            try:
                literal(default)
            except ExportError:
                default = None  # then only None may be passed
        kept.append(parameter.replace(annotation=parameter.empty, default=default))
    return inspect.Signature(kept)


def _expected(name: str, key: TensorKey, stride: Sequence[int], flags: Mapping[str, bool]) -> Expected:
    shape, _, dtype, device, requires_grad = key
    is_plain = tuple(stride) == torch.empty(shape, device="meta").stride()
    return Expected(name, tuple(shape), dtype, requires_grad, None if is_plain else tuple(stride), device, **flags)


def expected_text(value: Any, device: torch.device) -> str:
    """An argument of the planned call, as Python text."""
    if isinstance(value, Expected):
        return f"Expected({', '.join([quoted(value.name), literal(value.shape), *_options(value, device)])})"
    if isinstance(value, (list, tuple)):
        items = [expected_text(item, device) for item in value]
        one = "," if len(items) == 1 else ""
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)}{one})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {expected_text(item, device)}" for key, item in value.items()) + "}"
    return literal(value, device)


def _options(expected: Expected, device: torch.device) -> list[str]:
    """The attributes that are not the usual ones, as keyword arguments."""
    options = []
    for field in fields(Expected)[2:]:
        value = getattr(expected, field.name)
        if value != field.default and not (field.name == "device" and value == device):
            options.append(f"{field.name}={literal(value, device)}")
    return options


def held_rows(model: nn.Module, step: RewrittenStep, stored: dict[str, torch.Tensor]) -> Iterator[HeldRow]:
    """The model's parameters and buffers in its own order; values too large to be written out are added to `stored`.

    Raises:
        ExportError: state_dict holds something else than these.
    """
    keys = dict(step.key.weights)
    flags = _flags(step)
    first: dict[int, str] = {}
    in_state = []
    for path, module in model.named_modules(remove_duplicate=False):
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{own}".strip(".")
            if tensor is None:
                continue
            is_saved = own not in module._non_persistent_buffers_set
            in_state += [name] if is_saved else []
            if id(tensor) in first:
                yield name, f"tied({quoted(name)}, {quoted(first[id(tensor)])})"
                continue
            first[id(tensor)] = name
            kind = "parameter" if own in module._parameters else "buffer" if is_saved else "unsaved"
            expected = _expected(name, keys[name], tensor.stride(), flags[name])
            options = _options(expected, step.joint.device)
            if kind == "parameter":
                options = [option for option in options if option not in ("requires_grad=True", "backward=True")]
                options += [] if expected.requires_grad else ["requires_grad=False"]
            if kind == "unsaved":
                options.append(f"value={value_text(name, tensor, stored, step.joint.device)}")
            yield name, f"{kind}({', '.join([quoted(name), *map(str, expected.shape), *options])})"
    if set(in_state) != set(model.state_dict()):
        other = sorted(set(in_state) ^ set(model.state_dict()))
        raise ExportError(f"the model's state_dict differs from its parameters and buffers in {', '.join(other[:5])}")


def value_text(name: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor], device: torch.device) -> str:
    """A tensor's values as text where they are few or all equal, else stored under its name."""
    if tensor.is_contiguous() and tensor.numel():
        rows = tensor.detach().reshape(-1).view(torch.uint8).view(tensor.numel(), -1)  # as bytes: 0.0 and -0.0 differ
        if bool((rows == rows[0]).all()):
            return literal(tensor.flatten()[0].item(), device)
        if tensor.numel() <= _MOST_NUMBERS:
            return literal(tensor.tolist(), device)
    stored[name] = tensor.detach().cpu().clone()
    return f"STORED[{quoted(name)}]"


def constant_text(name: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor], device: torch.device) -> str:
    """An expression that evaluates to the tensor."""
    value = value_text(name, tensor, stored, device)
    if name in stored:
        return value
    options = f"dtype={tensor.dtype}, device={literal(tensor.device, device)}"
    if value.startswith("["):
        return f"torch.tensor({value}, {options})"
    return f"torch.full({literal(tuple(tensor.shape))}, {value}, {options})"


def folded(rows: Sequence[HeldRow], free: str = "ijklmn") -> Iterator[str]:
    """`yield` statements for the rows; rows that differ only in a module's number become a loop."""
    done = 0
    while done < len(rows):
        loop = _loop(rows[done:], free[0]) if free else None
        if loop is None:
            yield f"yield {rows[done][1]}"
            done += 1
            continue
        first, count, body = loop
        yield f"for {free[0]} in range({first}, {first + count}):" if first else f"for {free[0]} in range({count}):"
        yield from (f"    {line}" for line in folded(body, free[1:]))
        done += count * len(body)


def _loop(rows: Sequence[HeldRow], variable: str) -> tuple[int, int, list[HeldRow]] | None:
    """(First number, number of iterations, rows of one iteration) of the outermost loop that begins with the first row."""
    for match in re.finditer(r"(?<![^.])(\d+)\.", rows[0][0]):
        first, start = int(match[1]), rows[0][0][: match.start()]
        iterations: list[list[HeldRow]] = []
        rest = list(rows)
        while True:
            path = f"{start}{first + len(iterations)}."
            size = next((n for n, (name, _) in enumerate(rest) if not name.startswith(path)), len(rest))
            marked = f"{start}{{{variable}}}."
            rows_here = [(name.replace(path, marked, 1), _counted(text, path, marked)) for name, text in rest[:size]]
            if not rows_here or (iterations and rows_here != iterations[0]):
                break
            iterations.append(rows_here)
            rest = rest[size:]
        if len(iterations) > 1:
            return first, len(iterations), iterations[0]
    return None


def _counted(text: str, path: str, marked: str) -> str:
    return text.replace(f'f"{path}', f'f"{marked}').replace(f'"{path}', f'f"{marked}').replace('ff"', 'f"')


@dataclass(frozen=True, slots=True)
class OutputText:
    """The model's output as an expression of the step's results.

    Attributes:
        expression: the output.
        definitions: statements that the expression needs, at the top of the file.
        replaced: names of the classes that an Output replaces.
    """

    expression: str
    definitions: tuple[str, ...]
    replaced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Text:
    """A leaf of the output."""

    text: str


def output_text(step: RewrittenStep, results: Sequence[str], paths: Sequence[str]) -> OutputText:
    """The model's output as Python text.

    Args:
        step: the rewritten step.
        results: names of the variables that hold the results.
        paths: per tensor leaf of the call, the expression that finds it.

    Raises:
        ExportError: it is of a class that torch alone does not have, and has no named fields.
    """
    leaves = []
    for out in step.joint.outputs:
        text = paths[out.input] if out.input is not None else literal(out.constant, step.joint.device)
        text = results[out.result] if out.result is not None else text
        leaves.append(_Text(f"{text}.requires_grad_()" if out.is_leaf else text))
    definitions: dict[str, None] = {}
    replaced: dict[str, None] = {}

    def written(value: Any) -> str:
        if isinstance(value, _Text):
            return value.text
        if value is None:  # a field that was not set
            return "None"
        kind = type(value)
        if kind in (dict, OrderedDict, defaultdict):
            return "{" + ", ".join(f"{literal(key)}: {written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            items = ", ".join(written(item) for item in value)
            if hasattr(value, "_fields"):
                definitions[f"{kind.__name__} = namedtuple({quoted(kind.__name__)}, {literal(value._fields)})"] = None
                return f"{kind.__name__}({items})"
            return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
        is_mapping = isinstance(value, Mapping)  # as a ModelOutput of transformers is, with the fields that are set
        named = value if is_mapping or not is_dataclass(value) else {f.name: getattr(value, f.name) for f in fields(value)}
        if not isinstance(named, Mapping) or not all(str(key).isidentifier() for key in named):
            raise ExportError(f"the model returns a {kind.__name__}, which a file that needs torch alone cannot make")
        replaced[kind.__name__] = None
        return f"Output({', '.join(f'{key}={written(item)}' for key, item in named.items())})"

    expression = written(pytree.tree_unflatten(leaves, step.joint.call.out_spec))
    return OutputText(expression, tuple(definitions), tuple(replaced))


def held_constants(model: nn.Module, step: RewrittenStep) -> dict[str, torch.Tensor]:
    """Tensors that the model holds as plain attributes, as they are now, by placeholder name.

    Raises:
        ExportError: the forward writes into one, or differentiates it.
    """
    joint, found = step.joint, {}
    first = len(joint.call.tensors)
    for given in joint.inputs:
        if given.kind is not Kind.INPUT or int(given.key) < first:
            continue
        path = joint.host.state[int(given.key) - first]
        tensor = path.get(model)
        if given.mutated or tensor.requires_grad:
            raise ExportError(
                f"the forward {'writes into' if given.mutated else 'differentiates'} {path.module}.{path.name}, which is "
                "neither parameter nor buffer, and an exported file holds those alone: register it, or train with the planned "
                "module"
            )
        found[given.node] = tensor
    return found


def reassigned_lines(step: RewrittenStep, results: Sequence[str]) -> list[str]:
    """Statements that store results in the buffers that the forward assigns.

    Raises:
        ExportError: it leaves something elsewhere, or something else.
    """
    lines = []
    buffers = {name for name, _ in step.joint.weights}
    counted = ", ".join(map(str, step.joint.host.counts.places))
    if counted:
        raise ExportError(f"the forward counts in {counted}, which an exported file does not: train with the planned module")
    for effect in step.joint.host.effects:
        path, ref = effect.path, effect.template
        name = f"{path.module}.{path.name}".lstrip(".")
        is_plain = not (path.steps or path.scope or effect.appends or effect.replaces)
        if not (is_plain and name in buffers and isinstance(ref, Ref) and ref.source == "result"):
            raise ExportError(
                f"the forward leaves something in {path.place}, which an exported file does not hold: it "
                "keeps parameters and buffers alone. Return it from the forward, or train with the planned module"
            )
        lines.append(f"self.get_submodule({quoted(path.module)})._buffers[{quoted(path.name)}] = {results[ref.key]}")
    for _, path in step.joint.call.returned:
        raise ExportError(
            f"the model returns the list or dictionary at {path.place} itself, and an exported file would return another one: "
            "return a copy, or train with the planned module"
        )
    return lines


def result_names(step: RewrittenStep, taken: set[str]) -> list[str]:
    """Names of variables for the step's results, taken from the model's output."""
    names: dict[int, str] = {}
    for out in (*step.joint.outputs, *step.joint.left):
        if out.result is not None and out.result not in names:
            names[out.result] = unique(out.name if out.name.isidentifier() else "out", {*taken, *names.values()})
    return [names[i] for i in range(len(names))]
