"""Passes that replace single kernels: the graph before and after, side by side."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from planner.graph.graph import Kind
from planner.graph.source import NOWHERE, Source
from planner.tracer.passes.draw_as_eager import draw_as_eager
from planner.tracer.passes.drop_copies import drop_copies
from planner.tracer.passes.drop_dead_code import drop_dead_code
from planner.tracer.passes.drop_detach import drop_detach
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.passes.lift_constants import lift_constants
from planner.tracer.passes.merge_casts import merge_casts
from planner.tracer.passes.read_old_statistics import read_old_statistics
from tests.support.graph_text import check_pass, traced_graph

aten = torch.ops.aten


def square() -> torch.Tensor:
    return torch.ones(3, 3)


def test_detach_and_alias_go():
    traced = traced_graph(lambda x: aten.mul(aten.detach(aten.sin(x)), aten.alias(x)), [square()])
    check_pass(
        drop_detach,
        traced,
        """
        %0 = input                 | %0 = input
        %1 = sin(%0)               | %1 = sin(%0)
        %2 = detach(%1)            |
        %3 = alias(%0)             |
        %4 = mul.Tensor(%2, %3)    | %2 = mul.Tensor(%1, %0)
        return %4                  | return %2
        """,
    )


def test_a_copy_that_nobody_overwrites_goes():
    check_pass(
        drop_copies,
        traced_graph(lambda x: aten.cos(aten.clone(aten.sin(x))), [square()]),
        """
        %0 = input        | %0 = input
        %1 = sin(%0)      | %1 = sin(%0)
        %2 = clone(%1)    |
        %3 = cos(%2)      | %2 = cos(%1)
        return %3         | return %2
        """,
    )


def test_copies_that_are_returned_or_smaller_than_their_storage_stay():
    def function(x):
        wave = aten.sin(x)
        returned, row = aten.clone(wave), aten.clone(aten.select(wave, 0, 0))
        return aten.cos(wave), returned, aten.cos(row)

    check_pass(
        drop_copies,
        traced_graph(function, [square()]),
        """
        %0 = input                    | %0 = input
        %1 = sin(%0)                  | %1 = sin(%0)
        %2 = clone(%1)                | %2 = clone(%1)
        %3 = select.int(%1, 0, 0)     | %3 = select.int(%1, 0, 0)
        %4 = clone(%3)                | %4 = clone(%3)
        %5 = cos(%1)                  | %5 = cos(%1)
        %6 = cos(%4)                  | %6 = cos(%4)
        return %5, %2, %6             | return %5, %2, %6
        """,
    )


def test_dropout_draws_bytes_and_scales_them_in_a_kernel_of_its_own():
    traced = traced_graph(
        lambda x: aten.mul(x, aten.div.Scalar(aten.bernoulli.p(aten.empty_like(x), 0.9), 0.9)), [torch.ones(2, 3)]
    )
    check_pass(
        draw_as_eager,
        traced,
        """
        %0 = input                     | %0 = input
        %1 = empty_like(%0)            | %1 = empty_like(%0)
        %2 = bernoulli.p(%1, 0.9)      | %2 = planner.bernoulli(0.9, [2, 3], [3, 1], uint8, cpu)
        %3 = div.Scalar(%2, 0.9)       | %3 = planner.noise(%2, 0.9, float32)
        %4 = mul.Tensor(%0, %3)        | %4 = mul.Tensor(%0, %3)
        return %4                      | return %4
        """,
    )


def test_dead_kernels_go_but_random_draws_and_error_checks_stay():
    def function(x):
        aten.sin(x)
        aten.rand_like(x)
        aten._assert_async(aten.all(aten.gt(x, 0)))
        return aten.cos(x)

    check_pass(
        drop_dead_code,
        traced_graph(function, [square()]),
        """
        %0 = input                    | %0 = input
        %1 = sin(%0)                  |
        %2 = rand_like(%0)            | %1 = rand_like(%0)
        %3 = gt.Scalar(%0, 0)         | %2 = gt.Scalar(%0, 0)
        %4 = all(%3)                  | %3 = all(%2)
        %5 = _assert_async(%4)        | %4 = _assert_async(%3)
        %6 = cos(%0)                  | %5 = cos(%0)
        return %6                     | return %5
        """,
    )


def test_a_tensor_held_by_the_graph_becomes_an_input():
    held = torch.arange(3.0)
    traced = traced_graph(lambda x: aten.add(x, held), [square()], mode="real")
    check_pass(
        lift_constants,
        traced,
        """
        %0 = input                   | %0 = input
        %1 = attribute               | %1 = input
        %2 = add.Tensor(%0, %1)      | %2 = add.Tensor(%1, %0)
        return %2                    | return %2
        """,
    )
    ((placeholder, tensor),) = traced.constants.items()
    assert torch.equal(tensor, held)
    assert (traced.inputs[placeholder].kind, traced.inputs[placeholder].key) == (Kind.BUFFER, "constant:0")


def test_the_backward_of_batch_norm_is_given_the_old_statistics():
    def function(x, weight, mean, var, grad):
        out = aten._native_batch_norm_legit_functional(x, weight, None, mean, var, True, 0.1, 1e-5)
        back = aten.native_batch_norm_backward(
            grad, x, weight, out[3], out[4], out[1], out[2], True, 1e-5, [True, False, False]
        )
        return out[0], back[0]

    channels = [torch.ones(3) for _ in range(3)]
    traced = traced_graph(function, [torch.ones(2, 3), *channels, torch.ones(2, 3)])
    (backward,) = traced.graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default)
    _, _, mean, var, _ = traced.graph.find_nodes(op="placeholder")
    before = backward.args[3:5]
    read_old_statistics(traced)
    assert backward.args[3:5] == (mean, var) != before
    assert backward.args[5:7] != (mean, var)


def casts_of_one_weight() -> tuple[TracedGraph, list[fx.Node]]:
    """The weight is cast at both of its uses, and the gradients of both are cast back before they are added."""
    cast = {"dtype": torch.bfloat16}

    def function(weight, tangent):
        first, second = aten._to_copy(weight, **cast), aten._to_copy(weight, **cast)
        one, other = aten.mul(tangent, first), aten.mul(tangent, second)
        back = {"dtype": torch.float32}
        return aten.mul(first, second), aten.add(aten._to_copy(one, **back), aten._to_copy(other, **back))

    traced = traced_graph(
        function,
        [square(), square().bfloat16()],
        roles=[("output", 0), ("gradient", "param", "w")],
        inputs_are=[(Kind.PARAM, ("param", "w")), (Kind.TANGENT, ("tangent", 0))],
    )
    casts = [node for node in traced.graph.nodes if node.target is aten._to_copy.default]
    for node, number in zip(casts, (1, 2, 1, 2), strict=True):
        node.meta["seq_nr"] = number  # a backward kernel has the number of its forward kernel
    return traced, casts


MERGED = """
    %0 = input                                | %0 = input
    %1 = input                                | %1 = input
    %2 = _to_copy(%0, dtype=bfloat16)         | %2 = _to_copy(%0, dtype=bfloat16)
    %3 = _to_copy(%0, dtype=bfloat16)         |
    %4 = mul.Tensor(%1, %2)                   | %3 = mul.Tensor(%1, %2)
    %5 = mul.Tensor(%1, %3)                   | %4 = mul.Tensor(%1, %2)
    %6 = mul.Tensor(%2, %3)                   | %5 = mul.Tensor(%2, %2)
    %7 = _to_copy(%4, dtype=float32)          | %6 = _to_copy(%3, dtype=float32)
    %8 = _to_copy(%5, dtype=float32)          | %7 = _to_copy(%4, dtype=float32)
                                              | %8 = add.Tensor(%3, %4)
                                              | %9 = _to_copy(%8, dtype=float32)
    %9 = add.Tensor(%7, %8)                   | %10 = add.Tensor(%6, %7)
    return %6, %9                             | return %5, %9
    """


def test_casts_by_autocast_in_one_context_become_one():
    traced, casts = casts_of_one_weight()
    traced.casts.update(dict.fromkeys(casts[:2], 0))
    source = Source("layer", "model.py", 3)
    traced.sources[casts[2]] = traced.sources[casts[3]] = source
    check_pass(merge_casts, traced, MERGED)
    made = traced.results[1]
    assert traced.source(made) == source, "a new node comes from where the one that it replaces came from"
    assert traced.source(traced.results[0]) == NOWHERE


@pytest.mark.parametrize("contexts", [{}, {0: 0, 1: 1}], ids=["the user's", "of two contexts"])
def test_other_casts_stay(contexts):
    traced, casts = casts_of_one_weight()
    traced.casts.update({casts[i]: context for i, context in contexts.items()})
    before = "\n".join(f"{row.split('|')[0]} | {row.split('|')[0]}" for row in MERGED.strip().splitlines())
    check_pass(merge_casts, traced, before)
