"""A traced joint graph -> Joint: the normal form that lowering and rewriting rely on (described in tracer/joint.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.tracer.call import CallSpec
from planner.tracer.joint import Joint, Output
from planner.tracer.passes.draw_as_eager import draw_as_eager
from planner.tracer.passes.drop_copies import drop_copies
from planner.tracer.passes.drop_dead_code import drop_dead_code
from planner.tracer.passes.drop_detach import drop_detach
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.passes.lift_constants import lift_constants
from planner.tracer.passes.merge_casts import merge_casts
from planner.tracer.passes.order_forward import order_forward
from planner.tracer.passes.own_gradients import own_gradients
from planner.tracer.passes.read_old_statistics import read_old_statistics
from planner.tracer.passes.refuse_unplannable import refuse_unplannable
from planner.tracer.passes.restore_raising_kernels import restore_raising_kernels
from planner.tracer.passes.save_rng_states import save_rng_states
from planner.tracer.passes.set_gradient_layouts import set_gradient_layouts
from planner.tracer.passes.split_host_reads import split_host_reads
from planner.tracer.passes.write_mutations import write_mutations
from planner.tracer.passes.write_opaque_kernels import write_opaque_kernels


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass, and why it has its place in the order."""

    run: Callable[[TracedGraph], None]
    why_here: str


PASSES = (
    Pass(lift_constants, "first: a constant is an input like any other to all that follow"),
    Pass(split_host_reads, "before anything is rewritten: the guards compute what Python read from the graph as it was traced"),
    Pass(refuse_unplannable, "after split_host_reads: only what stays in the step must be plannable"),
    Pass(restore_raising_kernels, "before order_forward, which needs forward_checks"),
    Pass(drop_detach, "before the passes that match chains of kernels: a detach in between would hide them"),
    Pass(set_gradient_layouts, "before the passes that compare strides"),
    Pass(write_opaque_kernels, "before merge_casts, which reads the sums of gradients that this one leaves"),
    Pass(merge_casts, "before drop_dead_code, which removes the casts that are left over"),
    Pass(draw_as_eager, "before drop_dead_code: what dropout's draws no longer read is removed"),
    Pass(drop_copies, "before write_mutations: there are no writes yet, so a copy equals its original"),
    Pass(read_old_statistics, "before write_mutations, which would see the backward read the new statistics"),
    Pass(drop_dead_code, "after all rewrites of single kernels, and before the order is decided by what is left"),
    Pass(order_forward, "before all passes that need to know where the forward ends"),
    Pass(write_mutations, "after order_forward: a write goes after the forward's last read"),
    Pass(own_gradients, "after write_mutations: a copy must not come before the write that ends the forward"),
    Pass(save_rng_states, "last: the position of random kernels is final"),
)


def normalize(traced: TracedGraph, call: CallSpec, outputs: tuple[Output, ...]) -> Joint:
    """Bring a traced graph into normal form.

    Args:
        traced: taken over and changed.
        call: how calls of the model map onto the graph.
        outputs: one per output leaf of the model.

    Raises:
        CaptureError: the graph holds something that cannot be planned exactly (named).
    """
    for one in PASSES:
        one.run(traced)
    graph = traced.graph
    graph.lint()
    nodes, returned = list(graph.nodes), traced.results
    last = traced.last_forward
    return Joint(
        graph=graph,
        inputs=tuple(traced.inputs[node] for node in graph.find_nodes(op="placeholder")),
        outputs=outputs,
        results=tuple(node.name for node in returned[: traced.num_results]),
        gradients=tuple((traced.inputs[node], returned[i].name) for node, i in traced.gradients),
        uses={node.name: traced.uses.get(node, 0) for node, _ in traced.gradients},
        rng_states={node.name: state.name for node, state in traced.rng_states.items()},
        num_forward_nodes=nodes.index(last) + 1 if last is not None else 0,
        constants={node.name: tensor for node, tensor in traced.constants.items()},
        guards=traced.guards,
        host_reads=traced.host_reads,
        call=call,
        sources={node.name: traced.source(node) for node in nodes},
        device=traced.device,
        opaque_calls=traced.calls,
        saved_handles=frozenset(node.name for node in traced.saved_handles),
    )
