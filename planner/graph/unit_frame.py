"""A unit's graph as it runs in a step: what it is given, and what it returns, is freed inside of its backward.

Alone, a graph holds its inputs and outputs to the end. In a step, once the backward of a unit has begun, nobody else may need
the activations that it was given, its outputs, and the gradients of these: then each dies at its last read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from planner.graph.graph import Graph, Kind, Op
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator

_KINDS = {Kind.INPUT: Kind.ACTIVATION, Kind.TANGENT: Kind.GRADIENT}
"""What inputs are where an op writes them."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A unit's graph with two more ops, which take no time: one begins the forward, one stands between forward and backward.

    The first writes the activations that the unit is given; the second reads them and the outputs, and writes the gradients of
    the outputs.

    Attributes:
        alone: the unit's graph.
        holds: others may need what the unit is given, its outputs and their gradients until its backward ends. Then a third op,
            at the end, reads all of them.
        workspace_bytes: of the op between forward and backward: a budget of `around_bytes` + s + w, where w is this, bounds the
            saved bytes by s.
        graph: with these ops; that between forward and backward is the last of the forward.
        others: names of the activations that the unit is given, of its outputs, and of their gradients.
        given_bytes: of parameters, buffers and the activations that the unit is given.
        around_bytes: what is held between forward and backward beside the saved bytes: these, the outputs, their gradients.
    """

    alone: Graph
    workspace_bytes: int = 0
    holds: bool = False
    graph: Graph = field(init=False)
    simulator: Simulator = field(init=False)
    others: frozenset[str] = field(init=False)
    given_bytes: int = field(init=False)
    around_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        alone = self.alone
        inputs = [value.name for value in alone.values if value.kind is Kind.INPUT]
        outputs = [name for name in dict.fromkeys(alone.forward_outputs) if name in alone.producer]
        tangents = [value.name for value in alone.values if value.kind is Kind.TANGENT]
        object.__setattr__(self, "graph", self._framed(inputs, outputs, tangents))
        object.__setattr__(self, "simulator", Simulator(self.graph))
        object.__setattr__(self, "others", frozenset((*inputs, *outputs, *tangents)))
        object.__setattr__(self, "given_bytes", alone.resident_bytes)
        output_bytes = sum(alone.value[name].nbytes for name in outputs)
        object.__setattr__(self, "around_bytes", alone.resident_bytes + alone.tangent_bytes + output_bytes)

    def _framed(self, inputs: list[str], outputs: list[str], tangents: list[str]) -> Graph:
        alone, boundary = self.alone, self.alone.num_forward_ops
        begin = Op("(the forward begins)", (), (), tuple(inputs), 0, recomputable=False)
        between = Op("(between)", (), (*inputs, *outputs), tuple(tangents), 0, self.workspace_bytes, recomputable=False)
        given = (*inputs, *outputs, *tangents)
        end = [Op("(the backward ends)", (), given, (), 0, recomputable=False)] if self.holds else []
        return replace(
            alone,
            ops=(begin, *alone.ops[:boundary], between, *alone.ops[boundary:], *end),
            values=tuple(replace(value, kind=_KINDS.get(value.kind, value.kind)) for value in alone.values),
            inputs=tuple(name for name in alone.inputs if alone.value[name].kind not in _KINDS),
            forward_outputs=(),
            num_forward_ops=boundary + 2,
        )

    def schedule(self, alone: Schedule) -> Schedule:
        """A schedule of the unit's graph as one of `graph`."""
        between, first = self.graph.num_forward_ops - 1, alone.boundary(self.alone)
        forward, backward = ([i + 1 + (i + 1 >= between) for i in own] for own in (alone.steps[:first], alone.steps[first:]))
        return Schedule((0, *forward, between, *backward, *([len(self.graph.ops) - 1] if self.holds else [])))

    def without(self, framed: Schedule) -> Schedule:
        """A schedule of `graph` as one of the unit's graph."""
        between, end = self.graph.num_forward_ops - 1, len(self.graph.ops) - 1 if self.holds else -1
        return Schedule(tuple(i - 1 - (i > between) for i in framed.steps if i not in (0, between, end)))
