"""Equal blocks captured once: the graph of whole capture, node for node, or whole capture itself."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from examples import gpt2, llama, vit
from planner import Plan, plan
from planner.tracer.capture import capture
from planner.tracer.target_device import TargetDevice
from tests.support import unit_traps_tensors  # noqa: F401  # adds its traps
from tests.support.joints import difference, units_off
from tests.support.text import unwrapped
from tests.support.unit_traps import TRAPS, plain_blocks
from tests.support.zoo.check import build

EXAMPLES = {
    "gpt2": lambda: gpt2.build(layers=2, width=32, heads=2, length=32, batch=4, vocabulary=64),
    "llama": lambda: llama.build(layers=2, width=64, heads=4, length=32, batch=4, vocabulary=64),
    "vit": lambda: vit.build(layers=2, width=32, heads=2, pixels=32, patch=8, batch=16, classes=10),
}
autocast = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])


def captured_both_ways(model: nn.Module, args: Any, kwargs: Any, autocast: bool) -> tuple[Any, Any]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with units_off():
            whole = capture(model, args, kwargs)
        assert whole.repeats == {}
        return whole, capture(model, args, kwargs)


CASES = [(name, False) for name in TRAPS] + [(name, True) for name, (_, units) in TRAPS.items() if units]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("name", "autocast"), CASES, ids=[f"{name}-{'bf16' if low else 'fp32'}" for name, low in CASES])
def test_a_trap_gives_the_graph_of_whole_capture(name: str, autocast: bool) -> None:
    made, units = TRAPS[name]
    model, x = made()
    whole, once = captured_both_ways(model, (x,), {}, autocast)
    assert difference(whole, once) == ""
    if not autocast:
        assert tuple(len(names) for names in once.repeats.values()) == units


@pytest.mark.one_in(6)
@autocast
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_give_the_graph_of_whole_capture(name: str, autocast: bool) -> None:
    whole, once = captured_both_ways(*EXAMPLES[name](), autocast)
    assert difference(whole, once) == ""
    assert [len(names) for names in once.repeats.values()] == [2]


def test_a_difference_in_one_scalar_is_seen() -> None:
    (one, x), (other, _) = (TRAPS["a_scalar_argument_differs"][0](), TRAPS["plain_blocks"][0]())
    assert difference(capture(one, (x,)), capture(other, (x,))) != ""


def trained(model: nn.Module, call: nn.Module, args: Any, kwargs: Any, autocast: bool) -> list[torch.Tensor]:
    """Everything that three steps compute."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(*args, **kwargs)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()
        leaves = pytree.tree_leaves(out if isinstance(out, torch.Tensor) else dict(out))
        found += [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found += [tensor.clone() for tensor in (*model.buffers(), torch.get_rng_state())]
        optimizer.step()
    return found + [parameter.detach().clone() for parameter in model.parameters()]


def exact(model: nn.Module, args: Any, kwargs: Any, autocast: bool) -> dict[str, Any]:
    """Assert that a plan trains as the model does; what its capture says of repeats."""
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        planned = plan(model, 0.7, args, kwargs, costs="estimate", progress=False, effort=1)
        repeats = capture(plain, args, kwargs).repeats
    ours = trained(model, planned, args, kwargs, autocast)
    theirs = trained(plain, plain, args, kwargs, autocast)
    assert len(ours) == len(theirs)
    assert [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(one, other)] == []
    return dict(repeats)


@pytest.mark.one_in(10)
@autocast
@pytest.mark.parametrize("name", [*EXAMPLES, "hand-written", "running_statistics"])
def test_three_steps_have_the_bits_of_the_model(name: str, autocast: bool) -> None:
    if name in EXAMPLES:
        model, args, kwargs = EXAMPLES[name]()
        model.config.problem_type = "single_label_classification" if name == "vit" else None  # its first forward sets it
    else:
        model, x = TRAPS["plain_blocks" if name == "hand-written" else name][0]()
        args, kwargs = (x,), {}
    assert exact(model, args, kwargs, autocast)


def test_repeats_name_the_units_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = TRAPS["half_of_the_blocks_are_frozen"][0]()
    with caplog.at_level(logging.INFO, "planner.tracer"):
        joint = capture(model, (x,))
    assert joint.repeats == {"Block": ("blocks.0", "blocks.1"), "Block (2)": ("blocks.2", "blocks.3")}
    assert "Net: 2 equal blocks captured once: blocks.0 and blocks.1" in caplog.messages


def test_the_log_says_why_a_block_is_captured_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    model, x = TRAPS["python_reads_a_tensor_inside"][0]()
    with caplog.at_level(logging.INFO, "planner.tracer"):
        capture(model, (x,))
    assert "Net: blocks.0 is captured by itself: Python reads a tensor's value in it" in caplog.messages


def test_opaque_blocks_are_no_units() -> None:
    model, x = TRAPS["plain_blocks"][0]()
    joint = capture(model, (x,), opaque=["blocks.1.dropout"])
    assert joint.repeats == {"Block": ("blocks.0", "blocks.2", "blocks.3")}
    with units_off():
        assert difference(capture(model, (x,), opaque=["blocks.1.dropout"]), joint) == ""


def test_a_model_for_an_absent_device_has_units() -> None:
    with torch.device("meta"):
        model, x = plain_blocks(), torch.empty(4, 6, 16)
    there = TargetDevice("H100-80GB", (9, 0))
    with units_off():
        whole = capture(model, (x,), target=there)
    once = capture(model, (x,), target=there)
    assert difference(whole, once) == ""
    assert [len(names) for names in once.repeats.values()] == [4]


def test_other_sizes_and_other_backwards_are_those_of_the_model() -> None:
    model, x = TRAPS["plain_blocks"][0]()
    plain = copy.deepcopy(model)
    planned = plan(model, 0.9, (x,), costs="estimate", progress=False, dynamic=True, effort=1)
    for given in (x[:3], torch.randn(4, 5, 16), x):
        found = []
        for module, of in ((planned, model), (plain, plain)):
            torch.manual_seed(1)
            of.zero_grad()
            out = module(given)
            out.backward(torch.tensor(2.0))
            found.append([out, *(parameter.grad for parameter in of.parameters())])
        assert all(map(torch.equal, *found))


class Windows(nn.Module):
    """Writes a slice: traced as a copy into it, whose result keeps the storage of the whole, and a scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3, 40))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.mask * 2
        rows[1:, 4:12].copy_(self.linear(x[1:]))
        return rows.square().sum()


def test_a_second_capture_has_the_storages_of_the_first() -> None:
    model, x = Windows(), torch.randn(3, 8)
    first, second = capture(model, (x,)), capture(model, (x,))
    assert difference(first, second) == ""
    sizes = [node.meta["val"].untyped_storage().nbytes() for node in first.graph.nodes if "copy" in str(node.target)]
    assert set(sizes) == {3 * 40 * 4}


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["longformer", "beit"])
def test_a_second_capture_of_the_zoo_is_the_first(name: str) -> None:
    model, args, kwargs = build(name)
    with units_off():
        assert difference(capture(model, args, kwargs), capture(model, args, kwargs)) == ""


def test_a_plan_says_what_was_captured_once(tmp_path):
    model, args, kwargs = gpt2.build(layers=4, width=32, heads=2, length=16, batch=2, vocabulary=32)
    made = plan(model, 1.0, args, kwargs, costs="estimate", check=False, progress=False).plan
    assert made.provenance.repeats == (("GPT2Block", 4),)
    assert "4 GPT2Block captured once" in unwrapped(str(made))
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
