"""Passes that order the graph and add nodes to it: the graph before and after, side by side."""

from __future__ import annotations

import torch
from torch import fx

from planner.graph.graph import Kind
from planner.tracer.passes.normalize import PASSES
from planner.tracer.passes.order_forward import order_forward
from planner.tracer.passes.own_gradients import own_gradients
from planner.tracer.passes.save_rng_states import save_rng_states
from planner.tracer.passes.write_mutations import write_mutations
from tests.support.graph_text import check_pass, traced_graph

aten = torch.ops.aten

INPUTS = [(Kind.PARAM, ("param", "w")), (Kind.BUFFER, ("buffer", "b")), (Kind.TANGENT, ("tangent", 0))]


def tensors() -> list[torch.Tensor]:
    return [torch.ones(2, 3) for _ in INPUTS]


def last_call(traced) -> fx.Node:
    return [node for node in traced.graph.nodes if node.op == "call_function"][-1]


def test_the_forward_comes_before_the_first_kernel_that_reads_an_incoming_gradient():
    def function(weight, buffer, tangent):
        gradient = aten.mul(tangent, buffer)
        return aten.sin(aten.mul(weight, buffer)), gradient

    roles = [("output", 0), ("gradient", "param", "w")]
    traced = traced_graph(function, tensors(), roles=roles, inputs_are=INPUTS)
    check_pass(
        order_forward,
        traced,
        """
        %0 = input                  | %0 = input
        %1 = input                  | %1 = input
        %2 = input                  | %2 = input
        %3 = mul.Tensor(%2, %1)     | %3 = mul.Tensor(%0, %1)
        %4 = mul.Tensor(%0, %1)     | %4 = sin(%3)
        %5 = sin(%4)                | %5 = mul.Tensor(%2, %1)
        return %5, %3               | return %4, %5
        """,
    )
    assert traced.last_forward is traced.results[0]


def test_a_buffer_is_written_behind_its_last_read_and_the_backward_reads_a_copy_of_the_old_value():
    def function(weight, buffer, tangent):
        new = aten.add(buffer, 1)
        out = aten.mul(weight, buffer)
        return out, new, aten.mul(tangent, buffer)

    roles = [("output", 0), ("mutation", "buffer", "b"), ("gradient", "param", "w")]
    traced = traced_graph(function, tensors(), roles=roles, inputs_are=INPUTS)
    order_forward(traced)
    check_pass(
        write_mutations,
        traced,
        """
        %0 = input                   | %0 = input
        %1 = input                   | %1 = input
        %2 = input                   | %2 = input
        %3 = add.Tensor(%1, 1)       | %3 = add.Tensor(%1, 1)
        %4 = mul.Tensor(%0, %1)      | %4 = mul.Tensor(%0, %1)
                                     | %5 = clone(%1)
                                     | %6 = copy_(%1, %3)
        %5 = mul.Tensor(%2, %1)      | %7 = mul.Tensor(%2, %5)
        return %4, %3, %5            | return %4, %7
        """,
    )
    assert traced.last_forward is not None and traced.last_forward.target is aten.copy_.default
    assert traced.roles == [roles[0], roles[2]]
    assert [given.mutated for given in traced.inputs.values()] == [False, True, False]


def test_the_backward_of_batch_norm_needs_no_copy_of_statistics_that_it_does_not_read():
    def function(x, weight, mean, var, tangent):
        out = aten._native_batch_norm_legit_functional(x, weight, None, mean, var, True, 0.1, 1e-5)
        back = aten.native_batch_norm_backward(tangent, x, weight, mean, var, out[1], out[2], True, 1e-5, [True, False, False])
        return out[0], out[3], out[4], back[0]

    given = [torch.ones(2, 3), torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(2, 3)]
    kinds = [(Kind.PARAM, ("param", "x")), (Kind.PARAM, ("param", "w")), (Kind.BUFFER, ("buffer", "m"))]
    kinds += [(Kind.BUFFER, ("buffer", "v")), (Kind.TANGENT, ("tangent", 0))]
    roles = [("output", 0), ("mutation", "buffer", "m"), ("mutation", "buffer", "v"), ("gradient", "param", "x")]
    traced = traced_graph(function, given, roles=roles, inputs_are=kinds)
    order_forward(traced)
    write_mutations(traced)
    assert len(traced.graph.find_nodes(op="call_function", target=aten.copy_.default)) == 2
    assert not traced.graph.find_nodes(op="call_function", target=aten.clone.default)


def test_a_gradient_that_shares_a_storage_or_has_other_strides_is_copied():
    def function(weight, buffer, tangent):
        gradient = aten.mul(tangent, weight)
        turned = aten.t(aten.clone(aten.t(gradient), memory_format=torch.contiguous_format))
        return aten.mul(weight, buffer), gradient, turned

    roles = [("output", 0), ("gradient", "param", "w"), ("gradient", "buffer", "b")]
    traced = traced_graph(function, tensors(), roles=roles, inputs_are=INPUTS)
    order_forward(traced)
    check_pass(
        own_gradients,
        traced,
        """
        %0 = input                                              | %0 = input
        %1 = input                                              | %1 = input
        %2 = input                                              | %2 = input
        %3 = mul.Tensor(%0, %1)                                 | %3 = mul.Tensor(%0, %1)
        %4 = mul.Tensor(%2, %0)                                 | %4 = mul.Tensor(%2, %0)
        %5 = t(%4)                                              | %5 = t(%4)
        %6 = clone(%5, memory_format=contiguous_format)         | %6 = clone(%5, memory_format=contiguous_format)
        %7 = t(%6)                                              | %7 = t(%6)
                                                                | %8 = planner.laid_out(%7, [2, 3], [3, 1])
        return %3, %4, %7                                       | return %3, %4, %8
        """,
    )


def test_a_gradient_that_is_an_input_is_copied_first_in_the_backward():
    roles = [("output", 0), ("gradient", "param", "w")]
    traced = traced_graph(lambda w, b, t: (aten.add(w, b), t), tensors(), roles=roles, inputs_are=INPUTS)
    order_forward(traced)
    check_pass(
        own_gradients,
        traced,
        """
        %0 = input                    | %0 = input
        %1 = input                    | %1 = input
        %2 = input                    | %2 = input
        %3 = add.Tensor(%0, %1)       | %3 = add.Tensor(%0, %1)
                                      | %4 = planner.laid_out(%2, [2, 3], [3, 1])
        return %3, %2                 | return %3, %4
        """,
    )


def test_the_generators_state_is_saved_before_every_draw_of_the_forward_only():
    def function(weight, buffer, tangent):
        out = aten.mul(weight, aten.rand_like(buffer))
        return out, aten.mul(tangent, aten.rand_like(out))

    roles = [("output", 0), ("gradient", "param", "w")]
    traced = traced_graph(function, tensors(), roles=roles, inputs_are=INPUTS)
    order_forward(traced)
    check_pass(
        save_rng_states,
        traced,
        """
        %0 = input                    | %0 = input
        %1 = input                    | %1 = input
        %2 = input                    | %2 = input
                                      | %3 = planner.rng_state(cpu)
        %3 = rand_like(%1)            | %4 = rand_like(%1)
        %4 = mul.Tensor(%0, %3)       | %5 = mul.Tensor(%0, %4)
        %5 = rand_like(%4)            | %6 = rand_like(%5)
        %6 = mul.Tensor(%2, %5)       | %7 = mul.Tensor(%2, %6)
        return %4, %6                 | return %5, %7
        """,
    )
    ((kernel, state),) = traced.rng_states.items()
    assert kernel.prev is state


def test_every_pass_is_in_the_list_once_and_in_the_file_of_its_name():
    names = [one.run.__name__ for one in PASSES]
    assert len(set(names)) == len(names)
    assert [one.run.__module__.rpartition(".")[2] for one in PASSES] == names
