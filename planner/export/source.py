"""export_source: a planned step as one Python file that a person can read and that needs torch alone."""

from __future__ import annotations

import inspect
import operator
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from planner import arguments
from planner._compat.backward_state import KEEPS_GRAPH_IMPORT
from planner._compat.dispatch import OpOverload
from planner._compat.fx_graphs import results
from planner.errors import ExportError, InputError
from planner.export import skeleton, standalone
from planner.export.body import BlockCall, Body, Words, wrapped
from planner.export.fold import Block, repeated
from planner.export.lines import WrittenPass, write_pass
from planner.export.names import ValueNames, counted, kernel_names, literal, quoted, snake, unique
from planner.graph.graph import Kind
from planner.kernels import custom
from planner.report import files
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.joint import Input

_TAKEN = frozenset(
    {"torch", "nn", "contextlib", "annotations", "dataclass", "Path", "Any", "Callable", "Iterable", "Iterator", "Sequence"}
    | {"DEVICE", "STEP", "STORED", "forward", "backward", "held", "read"}
    | {one.__name__ for one in standalone.EMBEDDED}
)
"""Names that have a meaning in every exported file."""

_CONSTANTS = ".constants.pt"
"""Suffix of the file of constants; .pt alone may be the user's own checkpoint."""

_LOADED = "map_location=DEVICE, weights_only=True"

_GUIDE = """\
How to read it. `forward` and `backward` are the step, kernel by kernel; blocks of the model that repeat are functions of
their own, with the module's name in `at`. Comments name the module and the line that a kernel comes from.
  w[...]           parameters, buffers and arguments, by name
  kept[...]        an activation that the forward keeps for the backward; `kept.pop` is its last use
  # recomputed     this kernel runs again, because its result was not kept
  del x            here x is freed; f(x := [x]) passes x to f, and f frees it. The plan's peak depends on both.
The file holds this step alone: another shape, eval() or no_grad() is an error that says what differs."""


def export_source(planned: CheckpointedModule, path: str | Path) -> None:
    """Write the planned training step as one Python file that needs torch alone, not this package.

    The file holds the forward and the backward kernel by kernel, with what is kept and recomputed; repeated blocks are one
    function each. Its class takes a `state_dict` of the original model, is called as the original, and trains bit for bit
    like it within the plan's budget. Gradients are returned when the backward is complete (a planned module returns
    them in stages). Constants too large for source code are saved next to it in a file ending in .constants.pt.

    Args:
        planned: from `plan` or `apply`.
        path: of the .py file; overwritten.

    Raises:
        InputError: `planned` is no planned module, or the path is not that of a Python file that can be written.
        ExportError: something in the step needs more than torch; says what.
    """
    arguments.check_planned(planned, CheckpointedModule, "export_source")
    file = check_path(path)
    source = _Source(planned, file.stem)
    text = source.text()
    files.write(file, text)
    try:
        if source.stored:
            torch.save(source.stored, file.with_suffix(_CONSTANTS))
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {file}: {error}") from error


def check_path(path: str | Path) -> Path:
    """The path, if a Python file can be written there.

    Raises:
        InputError: it cannot.
    """
    arguments.check_path(path)
    file = Path(path)
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise InputError(f"cannot export to {file}: give a file name that Python can import, such as model_ckpt.py")
    if not file.parent.is_dir():
        raise InputError(f"cannot export to {file}: there is no folder {file.parent}")
    return file


@dataclass(frozen=True, slots=True)
class _Function:
    """A function of the file, and the blocks that call it."""

    name: str
    text: str
    blocks: tuple[Block, ...] = ()


class _Source:
    """Writes one exported file.

    Attributes:
        stored: tensors too large for source code, by name; filled by `text()`.
    """

    def __init__(self, planned: CheckpointedModule, stem: str) -> None:
        self._planned, self._stem, self._step, self._model = planned, stem, planned.step, planned.original
        self._joint, self._partitioned = self._step.joint, self._step.partitioned
        _check_exportable(planned)
        self._constants = self._joint.constants | skeleton.held_constants(self._model, self._step)
        self.stored: dict[str, torch.Tensor] = {}
        self._class = unique(type(self._model).__name__, _TAKEN)
        self._arguments = skeleton.arguments(unplanned_forward(self._model), self._step)
        self._results = skeleton.result_names(self._step, {"self", *self._arguments.values})
        self._output = skeleton.output_text(self._step, self._results, self._arguments.paths)
        graphs = [self._partitioned.forward, self._partitioned.backward, *([self._joint.guards] if self._joint.guards else [])]
        called = [n.target for g in graphs for n in g.nodes if n.op == "call_function" and n.target is not operator.getitem]
        names = kernel_names(called, {*_TAKEN, self._class, "w", "kept", "grads", "at"})
        self._forward, self._backward, values = self._written_passes()
        self._words = Words(values, names, self._joint.device)

    def text(self) -> str:
        """The file."""
        forward, backward = self._functions(self._forward, "forward"), self._functions(self._backward, "backward")
        rows = list(skeleton.held_rows(self._model, self._step, self.stored))
        constants = {n: skeleton.constant_text(n, t, self.stored, self._joint.device) for n, t in self._constants.items()}
        parts = [
            self._header(),
            "\n".join(self._imports()),
            self._class_text(),
            *(function.text for function in (*forward, *backward)),
            *([self._read()] if self._joint.guards is not None else []),
            _function("held", "", "The original's parameters and buffers, in its order.", list(skeleton.folded(rows))),
            "# From here on: what is the same in every exported file, and at the end what this step is right for.",
            *(inspect.getsource(one).rstrip() for one in self._embedded()),
            self._step_text(constants),
        ]
        return "\n\n\n".join(parts) + "\n"

    def _written_passes(self) -> tuple[WrittenPass, WrittenPass, ValueNames]:
        joint, partitioned = self._joint, self._partitioned
        ops = {op.name for op in self._planned.plan.graph.ops}
        inputs = {given.node: given for given in joint.inputs}
        before = [given for given in joint.inputs if given.kind is not Kind.TANGENT]
        ran: set[str] = set()
        sources = joint.sources | {state: joint.sources[kernel] for kernel, state in joint.rng_states.items()}
        handed, num_results = results(partitioned.forward), len(joint.results)
        outside = {node: ("w", self._key(i)) for node, i in zip(_placeholders(partitioned.forward), before, strict=True)}
        forward = write_pass(partitioned.forward, ops, sources, ran, outside, handed[:num_results])
        values = ValueNames(forward, {node.name for node in list(joint.graph.nodes)[: joint.num_forward_nodes]})
        keys: dict[str, None] = {}
        for node in handed[num_results:]:
            keys[unique(values.key(*forward.place(node)), keys)] = None
        kept = {node: ("kept", key) for node, key in zip(handed[num_results:], keys, strict=True)}

        places = [("kept", key) for key in keys]
        places += [("w", self._key(inputs[name])) for name in partitioned.saved_inputs]
        places += [("output gradient", f"d_{self._results[i]}") for i in partitioned.output_gradients]
        taken = dict(zip(_placeholders(partitioned.backward), places, strict=True))
        backward = write_pass(partitioned.backward, ops, sources, ran, taken, ())
        owners = [("grads", self._key(given)) for given, _ in joint.gradients]
        return forward.storing(kept), backward.storing(dict(zip(results(partitioned.backward), owners, strict=True))), values

    def _key(self, given: Input) -> str:
        """The name of a tensor in `w`."""
        if given.node in self._constants:
            return given.node
        return self._arguments.tensors[int(given.key)].name if given.kind is Kind.INPUT else str(given.key)

    def _functions(self, written: WrittenPass, direction: str) -> list[_Function]:
        """The functions of a pass: its repeated blocks, then itself."""
        is_backward = direction == "backward"
        groups = repeated(written, self._words)
        stems = [f"{snake(type(self._model.get_submodule(blocks[0].prefix)).__name__)}_{direction}" for blocks in groups]
        pieces = Counter(block.prefix for blocks in groups for block in blocks)
        functions: list[_Function] = []
        for stem, blocks in zip(stems, groups, strict=True):
            taken = {*_TAKEN, self._class, *self._words.kernels.values(), *(function.name for function in functions)}
            name = unique(stem, taken)
            body = blocks[0].body
            parameters = ["at", "w", "kept", *(["grads"] if is_backward else []), *body.argument_names]
            what = f"A part of the {direction}" if pieces[blocks[0].prefix] > 1 else direction.capitalize()
            doc = f"{what} of {counted([block.prefix for block in blocks])}."
            functions.append(_Function(name, _function(name, ", ".join(parameters), doc, body.text), tuple(blocks)))
        calls = [
            BlockCall(block.start, block.stop, block.prefix, function.name, block.body.arguments, block.body.results)
            for function in functions
            for block in function.blocks
        ]
        whole = Body(written, self._words, 0, len(written.lines), calls=calls)
        output_gradients = [name for kind, name in written.outside.values() if kind == "output gradient"]
        parameters = ["w", "kept", *(["grads", *output_gradients] if is_backward else [])]
        docs = {
            "forward": "The forward: returns the results, and fills `kept`.",
            "backward": "The backward: empties `kept`, and fills `grads`.",
        }
        return [*functions, _Function(direction, _function(direction, ", ".join(parameters), docs[direction], whole.text))]

    def _read(self) -> str:
        guards = self._joint.guards
        assert guards is not None
        nodes = {node.name for node in guards.nodes}
        inputs = {given.node: given for given in self._joint.inputs}
        outside = {node: ("w", self._key(inputs[node.name])) for node in _placeholders(guards)}
        written = write_pass(guards, nodes, self._joint.sources, set(), outside, results(guards))
        body = Body(written, self._words, 0, len(written.lines))
        return _function("read", "w", "The tensors whose values decided how the model ran when it was captured.", body.text)

    def _header(self) -> str:
        tensors = [path for path in self._arguments.paths if path.isidentifier()]
        plan = textwrap.indent(str(self._planned.plan), "    ")
        replaced = ", ".join(self._output.replaced)
        stands_in = f"\nIt returns an Output of this file in place of a {replaced}.\n" if replaced else ""
        beside = f"\nIts constants lie next to it, in {self._stem}{_CONSTANTS}.\n" if self.stored else ""
        return f'''\
"""One training step of {self._class} within a memory budget. Made by checkpoint-planner; needs torch alone.

    from {self._stem} import {self._class}
    model = {self._class}()
    model.load_state_dict(original.state_dict())
    out = model({", ".join(f"{name}={name}" for name in tensors)})  # then backward, as with the original

It trains bit for bit like the original within this plan:

{plan}
{stands_in}{beside}
{_GUIDE}
"""'''

    def _imports(self) -> list[str]:
        operators = [(name, op) for op, name in self._words.kernels.items() if isinstance(op, OpOverload)]
        return [
            "from __future__ import annotations\n",
            "import contextlib",
            "import weakref",
            *(["from collections import namedtuple"] if self._output.definitions else []),
            "from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence",
            "from dataclasses import dataclass",
            *(["from pathlib import Path"] if self.stored else []),
            "from typing import Any\n",
            "import torch",
            "from torch import nn",
            f"{KEEPS_GRAPH_IMPORT}\n",
            f"DEVICE = torch.device({quoted(str(self._joint.device))})",
            *([f"STORED = torch.load(Path(__file__).with_suffix({quoted(_CONSTANTS)}), {_LOADED})"] if self.stored else []),
            *(f"{name} = torch.ops.{op}" for name, op in operators),
            *self._output.definitions,
        ]

    def _class_text(self) -> str:
        results = f"({self._results[0]},)" if len(self._results) == 1 else ", ".join(self._results)
        definition = "\n    ".join(wrapped([f"def forward(self, {str(self._arguments.signature)[1:-1]}):"]))
        return (
            f"class {self._class}(nn.Module):\n"
            f'    """Takes state_dicts of the original, is called as the original; for the call of `STEP` alone."""\n\n'
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        build(self, STEP.held, DEVICE)\n\n"
            f"    {definition}\n"
            f"        {results} = run_step(self, STEP, locals())\n"
            + "".join(f"        {line}\n" for line in skeleton.reassigned_lines(self._step, self._results))
            + f"        return {self._output.expression}"
        )

    def _embedded(self) -> list[Any]:
        """The code that does not depend on the model."""
        own = [target for target in self._words.kernels if target not in standalone.EMBEDDED]
        return [*standalone.EMBEDDED, *(target for target in own if hasattr(target, "__code__"))]

    def _step_text(self, constants: dict[str, str]) -> str:
        joint, device = self._joint, self._joint.device
        leaf = {out.result: out for out in reversed((*joint.outputs, *joint.left)) if out.result is not None}
        order = range(len(joint.results))
        arguments = "".join(
            f"        {quoted(name)}: {skeleton.expected_text(value, device)},\n"
            for name, value in self._arguments.values.items()
        )
        made = "".join(f"\n        {quoted(name)}: {text}," for name, text in constants.items())
        trained = {self._key(given) for given, _ in joint.gradients}
        asking = [name for name, key in self._step.key.weights if key[-1]]
        asking += [expected.name for expected in self._arguments.tensors if expected.requires_grad]
        autocast = self._step.key.autocast
        facts = {
            "forward": "forward",
            "backward": "backward",
            "held": "tuple(held())",
            "call": f"{{\n{arguments}    }}",
            "results": literal(tuple(leaf[i].name for i in order)),
            "differentiated": literal(self._partitioned.output_gradients),
            "requires_grad": literal(tuple(leaf[i].requires_grad and not leaf[i].is_leaf for i in order)),
            "inner": literal(tuple(i for i in order if leaf[i].requires_grad and leaf[i].is_inner)),
            "aliased": literal(self._partitioned.aliased),
            "autocast": literal((False, "") if autocast is None else (True, str(autocast))),
            "device": "DEVICE",
            "swaps": literal(any(node.target is custom.swap_rng_state for node in self._partitioned.backward.nodes)),
            "constants": f"{{{made}\n    }}" if made else "{}",
            "read": "read" if joint.guards is not None else "None",
            "values": literal(tuple((read.value, str(read.source)) for read in joint.host_reads)),
            "without_gradient": literal(tuple(name for name in asking if name not in trained)),
        }
        return "STEP = ExportedStep(\n" + "".join(f"    {name}={text},\n" for name, text in facts.items()) + ")"


def _check_exportable(planned: CheckpointedModule) -> None:
    """Raise ExportError where submodules run as they are, whose code is the user's, or kernels are another device's."""
    if planned.step.joint.absent_device:
        raise ExportError(
            f"the step was planned for {planned.step.joint.absent_device}, which is not here: save the plan, "
            "`apply` it on that device, and export there"
        )
    modules = dict.fromkeys(spec.module for spec in planned.step.joint.opaque_calls.values())
    if modules:
        kinds = [f"{name} (a {type(planned.original.get_submodule(name)).__name__})" for name in modules]
        raise ExportError(
            f"the plan runs {', '.join(kinds)} as the model has it, and a file that needs torch alone cannot hold a "
            "submodule's own code. Replace it by what can be captured, or train with the planned module; torch.save takes that"
        )


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _function(name: str, parameters: str, doc: str, body: str | Sequence[str]) -> str:
    lines = body if isinstance(body, str) else "\n".join(f"    {line}" for line in body)
    return f'def {name}({parameters}):\n    """{doc}"""\n{lines}'
