import operator
import subprocess
import sys

import pytest
import torch

from planner.kernels.calls import footprint_bytes, kernel_key, make_inputs
from tests.support.nodes import aten, call, different_calls
from tests.support.paths import ROOT


def test_key_ignores_names_and_values():
    one = call(aten.mm.default, torch.rand(4, 8), torch.rand(8, 3))
    two = call(aten.mm.default, torch.zeros(4, 8), torch.ones(8, 3))
    two.name = "another"
    assert kernel_key(one) == kernel_key(two)


def test_key_tells_apart_what_costs_differently():
    keys = [kernel_key(node) for node in different_calls()]
    assert len(set(keys)) == len(keys)


def test_aligned_offset_is_the_same_kernel():
    aligned = call(aten.neg.default, torch.rand(48)[16:])
    assert kernel_key(aligned) == kernel_key(call(aten.neg.default, torch.rand(32)))


def test_key_is_stable_across_processes():
    code = (
        "from planner.kernels.calls import kernel_key\n"
        "from tests.support.nodes import different_calls\n"
        "print(*map(kernel_key, different_calls()), sep='\\n')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout.splitlines() == [kernel_key(node) for node in different_calls()]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(3, 5),
        torch.rand(5, 3).t(),
        torch.rand(1, 5).expand(4, 5),
        torch.rand(6, 10)[1::2, 3:],
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.rand(()),
        torch.rand(0, 3),
        torch.rand(9000, dtype=torch.bfloat16),
        torch.rand(7, dtype=torch.complex64),
        torch.arange(7),
        torch.tensor([True, False, True]),
    ],
)
def test_inputs_look_like_the_fake_ones(tensor):
    (made,), kwargs = make_inputs(call(aten.neg.default, tensor))
    assert kwargs == {}
    assert (made.shape, made.stride(), made.dtype, made.device) == (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    assert type(made) is torch.Tensor
    assert made.data_ptr() % 64 == tensor.storage_offset() * tensor.element_size() % 64


def test_input_values_are_harmless():
    floats, ints, bools = make_inputs(call(aten.where.self, torch.rand(9999), torch.arange(9), torch.ones(99) > 0))[0]
    assert floats.min() >= 0.1 and floats.max() <= 1 and floats.unique().numel() > 1000
    assert not ints.any()
    assert bools.any() and not bools.all()


def test_same_argument_is_the_same_tensor():
    x = torch.rand(4)
    (one, other), _ = make_inputs(call(aten.add.Tensor, x, x))
    assert one is other
    (listed,), _ = make_inputs(call(aten.cat.default, [x, torch.rand(4), x]))
    assert listed[0] is listed[2] and listed[0].data_ptr() != listed[1].data_ptr()
    assert type(listed) is list


def test_a_generator_state_can_be_set():
    (state,), _ = make_inputs(call(torch.set_rng_state, torch.get_rng_state()))
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_leave_the_generator_alone():
    before = torch.get_rng_state()
    make_inputs(call(aten.neg.default, torch.zeros(100)))
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_argument_is_named():
    node = call(aten.neg.default, torch.rand(2))
    del node.args[0].meta["val"]
    with pytest.raises(ValueError, match="argument arg_0 of neg_default"):
        make_inputs(node)


def test_footprint_counts_memory_not_elements():
    node = call(aten.add.Tensor, torch.rand(1, 100).expand(50, 100), torch.rand(50, 100))
    node.meta["val"] = torch.empty(50, 100, device="meta")
    assert footprint_bytes(node) == 4 * (100 + 5000 + 5000)


def test_a_state_of_draws_is_what_the_drawing_kernel_made_of_it():
    """CUDA keeps the seed of dropout within attention on the host, its fake tensor says otherwise: made up, it crashed."""
    with torch.library._scoped_library("kernel_test", "DEF") as library:
        library.define("attend(Tensor x) -> (Tensor, Tensor)", tags=[torch.Tag.nondeterministic_seeded])
        library.impl("attend", lambda x: (x.clone(), torch.tensor(7)), "CPU")
        attend = torch.ops.kernel_test.attend.default
        node = call(attend, torch.rand(3))
        node.meta["val"] = (torch.empty(3, device="meta"), torch.empty((), dtype=torch.int64, device="meta"))
        graph = node.graph
        out, seed = (graph.call_function(operator.getitem, (node, i)) for i in range(2))
        out.meta["val"], seed.meta["val"] = node.meta["val"]
        backward = graph.call_function(aten.mul.Tensor, (out, seed))
        (made, state), _ = make_inputs(backward)
        assert made.shape == (3,) and state.item() == 7, "other integers are 0"
