"""A training step as values (storages) and ops that read and write them; all subpackages use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from planner.errors import GraphError
from planner.graph.source import NOWHERE, Source


class Kind(StrEnum):
    """What a value is to the user; decides which row of the table its bytes are counted in."""

    INPUT = "input"
    PARAM = "param"
    BUFFER = "buffer"
    TANGENT = "tangent"
    """Gradient of a forward output, given by the caller; live from the end of the forward."""
    RESERVED = "reserved"
    """Bytes the user sets aside (optimizer state, ...): read by nobody, resident all the time."""
    ACTIVATION = "activation"
    GRADIENT = "gradient"


RESIDENT_KINDS = frozenset({Kind.INPUT, Kind.PARAM, Kind.BUFFER, Kind.TANGENT, Kind.RESERVED})
"""Kinds that come from outside the step; ACTIVATION and GRADIENT are written by ops."""


@dataclass(frozen=True, slots=True)
class Value:
    """One storage. Views are folded into the storage they look at, so bytes are never counted twice.

    Attributes:
        nbytes: all that it takes.
        hidden_bytes: bytes of the real storage beyond the fake tensor's; included in nbytes.
        form: dtype and shape, "float32[8, 4]", of the tensor that was allocated, for people; "" where it is not known.
    """

    name: str
    nbytes: int
    kind: Kind
    hidden_bytes: int = 0
    form: str = ""


@dataclass(frozen=True, slots=True)
class Op:
    """One schedulable unit: a kernel, with the getitems and views of its outputs.

    Attributes:
        name: unique among ops.
        nodes: names of the fx nodes it stands for, the kernel's first.
        reads, writes: value names; a value is written by exactly one op.
        cost_ns: time of one execution.
        workspace_bytes: what the kernel holds at its peak above its reads and writes; negative where it frees, as it goes,
            values that it alone reads, and holds less than they and its writes together. Such an op runs once.
        recomputable: False where a second execution could give another result (mutation, reads of a
            mutated buffer, random numbers without a saved state).
        source: where in the user's code it comes from; NOWHERE where that is not known.
        kernel: what it runs, such as "aten.addmm.default"; "" where that is not known (graphs that were not captured).
        arguments: what the kernel is called with: dtypes, shapes, views, scalars; "%2" is the op's third read. Names no node.
    """

    name: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    cost_ns: int
    workspace_bytes: int = 0
    recomputable: bool = True
    source: Source = NOWHERE
    kernel: str = ""
    arguments: str = ""

    @property
    def text(self) -> str:
        """For people: its name, with the module and the line where they are known."""
        return f"{self.name} ({self.source})" if self.source else self.name


def reserved_name(purpose: str) -> str:
    """The name of the value of kind RESERVED that stands for bytes set aside for this purpose."""
    return f"({purpose})"


def purpose_of(name: str) -> str:
    """What the bytes of a value of kind RESERVED are for, by its name."""
    return name.removeprefix("(").removesuffix(")")


@dataclass(frozen=True, slots=True)
class Graph:
    """The joint forward + backward graph: ops in topological order, forward first. Checked when built.

    Attributes:
        ops: executed in this order by a plain step.
        values: every storage that an op reads or writes, or that is resident.
        inputs: values of a resident kind; alive before the first step, never freed.
        forward_outputs: values the caller keeps from the forward on; never freed.
        backward_outputs: gradients handed to the caller, at full size; never freed.
        num_forward_ops: ops[:num_forward_ops] are the forward.
        backward_is_fixed: backward ops run in this order alone (they draw random numbers, communicate, ...).
        in_flight: forwards that have run when the first backward begins, as in the stages of a pipeline. What each of them
            saves counts: the others hold it during the whole step.

    Raises:
        GraphError: from the constructor, naming the op or value.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    inputs: tuple[str, ...]
    forward_outputs: tuple[str, ...]
    backward_outputs: tuple[str, ...]
    num_forward_ops: int
    backward_is_fixed: bool = False
    in_flight: int = 1
    value: dict[str, Value] = field(init=False, repr=False, compare=False)
    """Value by name."""
    producer: dict[str, int] = field(init=False, repr=False, compare=False)
    """Index of the op that writes a value; resident values are missing."""
    pinned: frozenset[str] = field(init=False, repr=False, compare=False)
    """Values that never die once they exist: resident ones and outputs."""
    plain_ns: int = field(init=False, repr=False, compare=False)
    """Time of the plain step: every op once."""
    tangent_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of the output gradients; live from the end of the forward."""
    resident_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of the other inputs; live from the start to the end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinned", frozenset((*self.inputs, *self.forward_outputs, *self.backward_outputs)))
        object.__setattr__(self, "value", {value.name: value for value in self.values})
        object.__setattr__(self, "producer", {name: i for i, op in enumerate(self.ops) for name in op.writes})
        resident = [value for value in self.values if value.kind in RESIDENT_KINDS]
        tangent_bytes = sum(value.nbytes for value in resident if value.kind is Kind.TANGENT)
        object.__setattr__(self, "plain_ns", sum(op.cost_ns for op in self.ops))
        object.__setattr__(self, "tangent_bytes", tangent_bytes)
        object.__setattr__(self, "resident_bytes", sum(value.nbytes for value in resident) - tangent_bytes)
        _check_values(self)
        _check_ops(self)

    @property
    def backward_ops(self) -> range:
        """Indices of the backward ops."""
        return range(self.num_forward_ops, len(self.ops))


def _check_values(graph: Graph) -> None:
    if len(graph.value) != len(graph.values):
        raise GraphError(f"value names occur twice: {_twice(v.name for v in graph.values)}")
    if len({op.name for op in graph.ops}) != len(graph.ops):
        raise GraphError(f"op names occur twice: {_twice(op.name for op in graph.ops)}")
    if not 0 <= graph.num_forward_ops <= len(graph.ops):
        raise GraphError(f"num_forward_ops is {graph.num_forward_ops}, but there are {len(graph.ops)} ops")
    if graph.in_flight < 1:
        raise GraphError(f"in_flight is {graph.in_flight}: at least one forward has run when a backward begins")
    inputs = set(graph.inputs)
    for value in graph.values:
        if not 0 <= value.hidden_bytes <= value.nbytes:
            raise GraphError(f"value {value.name} has {value.nbytes} bytes, {value.hidden_bytes} of them hidden")
        resident = value.kind in RESIDENT_KINDS
        if resident and value.name in graph.producer:
            raise GraphError(
                f"value {value.name} of kind {value.kind} is written by op {graph.ops[graph.producer[value.name]].name}"
            )
        if resident != (value.name in inputs):
            raise GraphError(f"value {value.name} of kind {value.kind} must {'' if resident else 'not '}be among the inputs")
        if not resident and value.name not in graph.producer:
            raise GraphError(f"no op writes value {value.name}")
    for name in (*graph.inputs, *graph.forward_outputs, *graph.backward_outputs):
        if name not in graph.value:
            raise GraphError(f"input or output {name} is not a value of the graph")
    for name in (*graph.forward_outputs, *graph.backward_outputs, *(name for op in graph.ops for name in op.reads)):
        if name in graph.value and graph.value[name].kind is Kind.RESERVED:
            raise GraphError(f"reserved bytes {name} are read by an op, or are an output")


def _check_ops(graph: Graph) -> None:
    written: set[str] = set(graph.inputs)
    tangents = {value.name for value in graph.values if value.kind is Kind.TANGENT}
    for i, op in enumerate(graph.ops):
        for name in op.reads:
            if name not in written:
                raise GraphError(f"op {op.name} reads {name}, which is not written before it")
            if i < graph.num_forward_ops and name in tangents:
                raise GraphError(f"forward op {op.name} reads {name}, the gradient of an output")
        for name in op.writes:
            if name not in graph.value:
                raise GraphError(f"op {op.name} writes {name}, which is not a value of the graph")
            if name in written:
                raise GraphError(f"value {name} is written twice, the second time by op {op.name}")
            written.add(name)
        if op.cost_ns < 0 or op.workspace_bytes < -sum(freed_early(graph, op).values()):
            raise GraphError(f"op {op.name} has cost {op.cost_ns} ns and workspace {op.workspace_bytes} bytes")
    for name in graph.forward_outputs:
        if graph.producer.get(name, 0) >= graph.num_forward_ops:
            raise GraphError(f"forward output {name} is written by backward op {graph.ops[graph.producer[name]].name}")


def read_alone(graph: Graph, op: Op) -> list[str]:
    """Values that die with an op in every schedule: it runs once, and no other op reads them."""
    others = {name for other in graph.ops if other is not op for name in other.reads} | graph.pinned
    return [] if op.recomputable else [name for name in op.reads if name not in others]


def freed_early(graph: Graph, op: Op) -> dict[str, int]:
    """Bytes of what an op reads that are gone before it holds its most, by value: its negative workspace."""
    freed: dict[str, int] = {}
    todo = -op.workspace_bytes
    for name in read_alone(graph, op) if todo > 0 else ():
        freed[name] = min(todo, graph.value[name].nbytes)
        todo -= freed[name]
    return {name: nbytes for name, nbytes in freed.items() if nbytes}


def _twice(names: object) -> str:
    seen: set[str] = set()
    return ", ".join(sorted({n for n in names if n in seen or seen.add(n)}))  # type: ignore[attr-defined,func-returns-value]
