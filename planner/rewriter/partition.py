"""Joint + Schedule -> a forward graph and a backward graph (fx), in which every recompute is an explicit node.

Kernels are written in the schedule's order; views are made where they are read. The code that fx generates deletes every name
after its last use, which frees the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner.errors import PlannerError, ScheduleError
from planner.graph.accumulation import STAGE_END
from planner.graph.graph import Graph, Kind
from planner.graph.schedule import Schedule, check
from planner.kernels import custom
from planner.kernels.batch_norm import unread_in_recompute, updates_statistics
from planner.rewriter.sums import separable
from planner.tracer.joint import Joint
from planner.tracer.lower import backward_is_fixed
from planner.tracer.storage import Storages, items

_CLONE = torch.ops.aten.clone.default
ORIGIN = "planner_origin"
"""Metadata of every node of both graphs: name of the joint graph's node that it was written for."""


@dataclass(frozen=True, slots=True)
class PartitionedStep:
    """A training step as a forward graph and a backward graph.

    Attributes:
        forward: placeholders are the joint graph's inputs in order, without gradients of outputs; results are the joint graph's
            results, then the saved activations.
        backward: placeholders are the saved activations, then the inputs in `saved_inputs`, then the gradients of outputs;
            results are the gradients in the joint graph's order.
        saved: names of the saved activations (storages).
        saved_inputs: names of the inputs that the backward reads.
        output_gradients: positions of the results whose gradients the backward takes, in its order.
        aliased: per result: it shares its storage with an input or an earlier result.
        roots: per result, the name of its storage.
        exposed: saved activations that are also results and that the backward reads only to recompute. Eager does not save
            them, so the caller may write into them.
        spare: names of further inputs, from which another backward may recompute more.
        stage_ends: where the schedule ends stages of the backward: numbers of leading nodes of `backward`; empty where it does
            not say.
        separable: gradients whose terms can be returned one by one; see rewriter/sums.py.
    """

    forward: fx.Graph
    backward: fx.Graph
    saved: tuple[str, ...]
    saved_inputs: tuple[str, ...]
    output_gradients: tuple[int, ...]
    aliased: tuple[bool, ...]
    roots: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    stage_ends: tuple[int, ...] = ()
    separable: Mapping[str, int] = field(default_factory=dict)


def partition(joint: Joint, graph: Graph, schedule: Schedule) -> PartitionedStep:
    """Write a schedule as two graphs.

    Args:
        joint: the captured step.
        graph: `lower(joint)`.
        schedule: valid for `graph` (checked).

    Raises:
        ScheduleError: the schedule cannot run on the graph, or moves backward ops whose order matters.
    """
    check(graph, schedule)
    if backward_is_fixed(joint):
        _check_captured_order(graph, schedule)
    nodes = {node.name: node for node in joint.graph.nodes}
    storages = Storages(joint.graph)
    boundary = schedule.boundary(graph)
    rerun = frozenset(schedule.steps[t] for t in schedule.recomputes())
    results = [nodes[name] for name in joint.results]
    gradients = [nodes[name] for _, name in joint.gradients]

    saved, read = _crossing(graph, schedule, boundary, [storages.root[node] for node in gradients])
    given_before = [given.node for given in joint.inputs if given.kind is not Kind.TANGENT]
    saved_inputs = tuple(name for name in given_before if storages.root[nodes[name]] in read)
    ran: set[int] = set()
    before = _Writer(joint, graph, storages, rerun)
    for name in given_before:
        before.take(nodes[name], name)
    before.run_all(schedule.steps[:boundary], ran)
    before.finish([before.get(node) for node in results] + [before.root(nodes[name]) for name in saved])

    after = _Writer(joint, graph, storages, rerun)
    for name in saved:
        after.take(nodes[name], f"saved_{name}")
    for name in saved_inputs:
        after.take(nodes[name], name)
    handed = [given for given in joint.inputs if given.kind is Kind.TANGENT]
    for given in handed:
        after.take(nodes[given.node], given.node)
    after.run_all(schedule.steps[boundary:], ran)
    after.finish([after.get(node) for node in gradients])
    roots = [storages.root[node] for node in results]
    aliased = tuple(nodes[root].op == "placeholder" or root in roots[:i] for i, root in enumerate(roots))
    exposed = _exposed(graph, saved, roots)
    reread = {name for op in graph.ops[: graph.num_forward_ops] if op.recomputable for name in op.reads}
    mutated = {given.node for given in joint.inputs if given.mutated}
    spare = tuple(n for n in given_before if storages.root[nodes[n]] in reread and n not in {*saved_inputs, *mutated})
    return PartitionedStep(
        before.out,
        after.out,
        saved,
        saved_inputs,
        tuple(int(given.key) for given in handed),
        aliased,
        tuple(roots),
        exposed,
        spare,
        after.stage_ends,
        separable(joint, graph, schedule),
    )


def _exposed(graph: Graph, saved: Sequence[str], results: Collection[str]) -> tuple[str, ...]:
    read = {name for i in graph.backward_ops for name in graph.ops[i].reads}
    return tuple(name for name in saved if name in results and name not in read)


def _check_captured_order(graph: Graph, schedule: Schedule) -> None:
    """Raise ScheduleError where a backward op runs for the first time after a later one."""
    latest = -1
    for i in dict.fromkeys(schedule.steps):
        if graph.num_forward_ops <= i < latest:
            moved, past = graph.ops[i].name, graph.ops[latest].name
            raise ScheduleError(
                f"the schedule runs {moved} after {past}, but this model's backward draws random numbers or writes into "
                "tensors, so that its order must be the captured one. Make the plan again with planner.plan."
            )
        latest = max(latest, i)


def _crossing(graph: Graph, schedule: Schedule, boundary: int, results: list[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """(Activations of the forward that the backward reads or returns, everything of the forward that it reads or returns)."""
    read: dict[str, None] = {}
    written: set[str] = set()
    for i in schedule.steps[boundary:]:
        op = graph.ops[i]
        read.update((name, None) for name in op.reads if name not in written)
        written.update(op.writes)
    read.update((name, None) for name in results if name not in written)
    saved = tuple(sorted((n for n in read if graph.value[n].kind is Kind.ACTIVATION), key=lambda n: graph.producer[n]))
    return saved, frozenset(read)


class _Writer:
    """Writes one of the two graphs; maps each node of the joint graph to the node that now holds its value."""

    def __init__(self, joint: Joint, graph: Graph, storages: Storages, rerun: frozenset[int]) -> None:
        self.out = fx.Graph()
        self._joint, self._graph, self._storages = joint, graph, storages
        self._rerun = {graph.ops[i].name for i in rerun}
        self._now: dict[fx.Node, fx.Node] = {}
        self._views: dict[str, list[fx.Node]] = {}
        self._nodes = {node.name: node for node in joint.graph.nodes}
        self._gradients: dict[str, list[fx.Node]] = {}
        self._ends: list[int] = []
        self.stage_ends: tuple[int, ...] = ()
        """The number of nodes up to the end of each stage; `finish` sets it."""
        for _, name in joint.gradients:
            self._gradients.setdefault(storages.root[self._nodes[name]], []).append(self._nodes[name])

    def take(self, node: fx.Node, name: str) -> None:
        """Make `node`'s value an input of this graph."""
        self._now[node] = self.out.placeholder(name.replace(".", "_"))
        self._now[node].meta = {**node.meta, ORIGIN: node.name}

    def root(self, node: fx.Node) -> fx.Node:
        """The node that holds the whole storage `node` names."""
        return self._now[node]

    def get(self, node: fx.Node) -> fx.Node:
        """The node that holds `node`'s value; a view is made here if there is none."""
        if node not in self._now:
            if not self._storages.is_view(node):
                raise PlannerError(
                    f"internal error: {node.name} is read before it is computed; please report it with the model"
                )
            self._now[node] = self._copy(node, node.name)
            if node in self._storages.root:
                self._views.setdefault(self._storages.root[node], []).append(node)
            else:  # a view with several results: dropped with its base
                base = next(self._storages.root[arg] for arg in node.all_input_nodes if arg in self._storages.root)
                self._views.setdefault(base, []).append(node)
        return self._now[node]

    def run_all(self, steps: Sequence[int], ran: set[int]) -> None:
        """Write steps of a schedule. `ran`: the ops that have run before; grows."""
        for i in steps:
            op = self._graph.ops[i]
            if op.kernel == STAGE_END:
                self.end_stage()
            else:
                self.run(self._nodes[op.name], again=i in ran)
                ran.add(i)

    def run(self, node: fx.Node, *, again: bool = False) -> None:
        """Write one execution of the kernel `node`.

        Args:
            again: a recompute: it ran before, in this graph or in the forward graph.
        """
        if node.target is custom.rng_state and not self._is_replayed(node):
            return
        previous = self._set_rng(node) if again and node.name in self._joint.rng_states else None
        for name, _ in self._storages.writes[node]:
            for view in self._views.pop(name, ()):
                del self._now[view]
        cloned = unread_in_recompute(node) if again and updates_statistics(node) else ()
        blind = {arg: self._call(_CLONE, (self.get(arg),), node) for arg in cloned}
        for arg, clone in blind.items():
            clone.meta["val"] = arg.meta["val"]
        suffix = "_recomputed" if again else ""
        copy = self._copy(node, node.name + suffix, blind)
        self._now[node] = copy
        for item in items(node):
            if self._storages.root.get(item) in {name for name, _ in self._storages.writes[node]}:
                self._now[item] = self._copy(item, item.name + suffix)
        for name, _ in self._storages.writes[node]:
            for gradient in self._gradients.get(name, ()):
                self.get(gradient)  # made here, so that it is returned with its stage
        if previous is not None:
            self._call(custom.swap_rng_state, (previous, self._joint.device), node)

    def end_stage(self) -> None:
        """What was written since the last stage ended is a stage of the backward."""
        self._ends.append(len(self.out.nodes))

    def finish(self, results: list[fx.Node]) -> None:
        """End the graph with its results; unused getitems are removed, which would hold their tensors longer."""
        written = list(self.out.nodes)
        self.out.output(tuple(results))
        for node in reversed(written):
            if node.op == "call_function" and not node.users and _is_getitem(node):
                self.out.erase_node(node)
        left = set(self.out.nodes)
        self.stage_ends = tuple(sum(node in left for node in written[:end]) for end in self._ends)
        self.out.lint()

    def _copy(self, node: fx.Node, name: str, replaced: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        known = replaced or {}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: known.get(arg) or self.get(arg))
        copy = self.out.create_node("call_function", node.target, args, kwargs, name=name)
        copy.meta = {**node.meta, ORIGIN: node.name}
        return copy

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], kernel: fx.Node) -> fx.Node:
        """A call that is not in the joint graph, needed by `kernel`."""
        call = self.out.call_function(target, args)
        call.meta[ORIGIN] = kernel.name
        return call

    def _is_replayed(self, state: fx.Node) -> bool:
        return any(name == state.name and kernel in self._rerun for kernel, name in self._joint.rng_states.items())

    def _set_rng(self, node: fx.Node) -> fx.Node:
        state = self._nodes[self._joint.rng_states[node.name]]
        return self._call(custom.swap_rng_state, (self.get(state), self._joint.device), node)


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
