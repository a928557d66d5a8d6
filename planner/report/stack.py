"""Live memory as a stack of layers: what the timeline and the report draw, in the same order and colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.live import MemoryKind, Span, spans
from planner.graph.modules import kinds_of, module_of
from planner.graph.schedule import Schedule
from planner.report.picture import shortened

NUM_MODULES = 5
"""Kinds of modules whose kept activations are layers of their own."""
OTHER = "other modules"
RECOMPUTE_COLOR = "#d55e00"
_WIDE = 36
_COLORS = {
    MemoryKind.RESERVED: "#303030",
    MemoryKind.PARAMETERS: "#606060",
    MemoryKind.INPUTS: "#bdbdbd",
    MemoryKind.IN_FLIGHT: "#582c78",
    MemoryKind.GRADIENTS: "#cc79a7",
    MemoryKind.TEMPORARY: "#efefef",
    MemoryKind.RECOMPUTED: RECOMPUTE_COLOR,
}
_MODULE_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00")
_OTHER_COLOR = "#a9cbe4"
"""Okabe and Ito's colours, made for the colour-blind (jfly.uni-koeln.de/color), and greys."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the stack.

    Attributes:
        part: what the bytes are for.
        module: for kept activations, the kind of module that wrote them ("h.*.mlp"), or OTHER; else "".
        color: "#rrggbb".
    """

    part: MemoryKind
    module: str
    color: str

    @property
    def label(self) -> str:
        """What a legend says."""
        return f"kept: {shortened(self.module, _WIDE)}" if self.module else self.part.value

    @property
    def is_hatched(self) -> bool:
        """Recomputed values are hatched: seen without colours, too."""
        return self.part is MemoryKind.RECOMPUTED


class Stack:
    """The layers of some schedules of a graph, from the bottom up.

    Attributes:
        layers: those with bytes. Kept activations are split by the kinds of modules that keep most.
    """

    def __init__(self, graph: Graph, schedules: Iterable[Schedule]) -> None:
        kinds = kinds_of(map(module_of, graph.ops))
        self._kinds = [kinds[module_of(op)] for op in graph.ops]
        kept, parts = Counter[str](), set[MemoryKind]()
        for schedule in schedules:
            for span in spans(graph, schedule):
                if span.nbytes:
                    parts.add(span.part)
                if span.part is MemoryKind.KEPT:
                    kept[self._kinds[span.op]] += span.nbytes
        named = [kind for kind, _ in sorted(kept.items(), key=lambda entry: (-entry[1], entry[0]))]
        split = [*named[:NUM_MODULES], *([OTHER] if named[NUM_MODULES:] else [])]
        colors = dict(zip(split, [*_MODULE_COLORS[: len(named)], _OTHER_COLOR], strict=False))
        made: list[Layer] = []
        for part in MemoryKind:
            if part is MemoryKind.KEPT:
                made += [Layer(part, kind, colors[kind]) for kind in split]
            elif part in parts:
                made.append(Layer(part, "", _COLORS[part]))
        self.layers = tuple(made)
        self._number = {(layer.part, layer.module): k for k, layer in enumerate(made)}

    def layer_of(self, span: Span) -> int:
        """Index of the layer that a span with bytes lies in."""
        if span.part is not MemoryKind.KEPT:
            return self._number[span.part, ""]
        kind = self._kinds[span.op]
        return self._number[span.part, kind if (span.part, kind) in self._number else OTHER]
