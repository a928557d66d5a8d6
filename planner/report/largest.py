"""What holds most at a step of a schedule: equal values of equal blocks as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from planner.graph.graph import Graph, purpose_of
from planner.graph.live import MemoryKind, Span, spans
from planner.graph.modules import fold, kinds_of, place_of
from planner.graph.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Group:
    """Values alike but for the number of their block.

    Attributes:
        name: of the first of them; what comes from outside is called after its kind.
        place: their modules, as one path; "" for what comes from outside.
        part: what they are for.
        nbytes: of each.
        count: how many they are; what comes from outside is one, however many tensors it is.
    """

    name: str
    place: str
    part: MemoryKind
    nbytes: int
    count: int


def largest(graph: Graph, schedule: Schedule, step: int, count: int) -> list[Group]:
    """What holds most at a step, the largest sum first."""
    alike: defaultdict[Hashable, list[Span]] = defaultdict(list)
    kinds = kinds_of(map(place_of, graph.ops))
    for span in spans(graph, schedule):
        if span.start <= step <= span.end and span.nbytes:
            alike[_likeness(graph, span, kinds)].append(span)
    groups = [_group(found) for found in alike.values()]
    return sorted(groups, key=lambda group: (-group.count * group.nbytes, group.place, group.name))[:count]


def _likeness(graph: Graph, span: Span, kinds: Mapping[str, str]) -> Hashable:
    """What a span has in common with those of equal blocks: kernel, which of its outputs (or its workspace), kind and bytes.

    Of graphs that were not captured, which name no kernels, the kind of module.
    """
    if span.op < 0:
        return _given_name(span), span.part
    op = graph.ops[span.op]
    number = op.writes.index(span.name) if span.name in op.writes else None
    return op.kernel or kinds[span.place], number, span.part, span.nbytes


def _group(found: list[Span]) -> Group:
    first = found[0]
    if first.op < 0:
        return Group(_given_name(first), "", first.part, sum(span.nbytes for span in found), 1)
    places = ", ".join(fold(dict.fromkeys((span.place for span in found), first.nbytes)))
    return Group(first.name, places, first.part, first.nbytes, len(found))


def _given_name(span: Span) -> str:
    """What comes from outside is called after its kind; bytes that are set aside, after what they are for."""
    return purpose_of(span.name) if span.part is MemoryKind.RESERVED else span.part.value
