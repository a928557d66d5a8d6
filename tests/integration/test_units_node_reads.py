"""Code around units that looks at autograd's graph: hooks on nodes, names of nodes, what autograd notes on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planner import CaptureError, InputError, plan_units
from tests.support.training import assert_same

BUDGET = "1MiB"


def doubled(gradients: tuple[Any, ...], _: Any = None) -> tuple[Any, ...]:
    """A hook's result: twice the gradients."""
    return tuple(gradient if gradient is None else gradient * 2 for gradient in gradients)


def hooks_the_node(y: torch.Tensor) -> torch.Tensor:
    y.grad_fn.register_hook(doubled)
    return y


def hooks_the_node_before(y: torch.Tensor) -> torch.Tensor:
    y.grad_fn.register_prehook(doubled)
    return y


def hooks_a_node_behind(y: torch.Tensor) -> torch.Tensor:
    node = y.grad_fn
    while node.next_functions and len(node.next_functions) == 1:  # the trial's own nodes have one each
        node = node.next_functions[0][0]
    node.register_hook(doubled)
    return y


def hooks_a_node_behind_its_own(y: torch.Tensor) -> torch.Tensor:
    return hooks_a_node_behind(y * 1)


def hooks_an_edge(y: torch.Tensor) -> torch.Tensor:
    torch.autograd.graph.get_gradient_edge(y).node.register_prehook(doubled)
    return y


def reads_the_name(y: torch.Tensor) -> torch.Tensor:
    return y * len(y.grad_fn.name())


def reads_the_version(y: torch.Tensor) -> torch.Tensor:
    return y * (1 + y._version)


def reads_the_position(y: torch.Tensor) -> torch.Tensor:
    return y * (1 + y.output_nr)


def reads_the_base(y: torch.Tensor) -> torch.Tensor:
    return y if y._base is None else y * 3


def hooks_its_own_node(y: torch.Tensor) -> torch.Tensor:
    z = y * 1
    z.grad_fn.register_hook(doubled)
    return z


class Block(nn.Module):
    """Its result is a view, written in place once."""

    def __init__(self, looks: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.up, self.down, self.looks = nn.Linear(16, 64), nn.Linear(64, 16), looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu_(self.up(x)))
        y = y.mul_(2).view(-1, 16)
        return y if self.looks is None else self.looks(y)


class Looks(nn.Module):
    """Code around a unit that is a module itself."""

    def __init__(self, looks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.looks = looks

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.looks(y)


class Net(nn.Module):
    """`kind`: of the first unit and of what looks at its result."""

    def __init__(self, looks: Callable[[torch.Tensor], torch.Tensor], *, inside: bool = False, kind: str = "function") -> None:
        super().__init__()
        self.first: nn.Module = Block(looks if inside else None)
        if kind == "children":  # whose last one makes the tensor that the first unit returns
            self.first = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
        self.last = Block()
        self.looks = (lambda y: y) if inside else Looks(looks) if kind == "module" else looks
        if kind == "hook":
            self.first.register_forward_hook(lambda _module, _args, out: looks(out))
            self.looks = lambda y: y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.looks(self.first(x))).square().sum()


LOOKS = [
    *(hooks_the_node, hooks_the_node_before, hooks_a_node_behind, hooks_a_node_behind_its_own, hooks_an_edge),
    *(reads_the_name, reads_the_version, reads_the_position, reads_the_base),
]


def trained(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of two steps, one after the other."""
    found = []
    for _ in range(2):
        model.zero_grad()
        model(x).backward()
        found += [p.grad.clone() for p in model.parameters()]
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["function", "module", "children", "hook"])
@pytest.mark.parametrize("looks", LOOKS, ids=lambda looks: looks.__name__)
def test_a_unit_is_left_whose_graph_is_looked_at(looks: Callable[[torch.Tensor], torch.Tensor], kind: str) -> None:
    torch.manual_seed(0)
    model, eager, x = Net(looks, kind=kind), Net(looks, kind=kind), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match=r"first.*part of autograd's graph"):
        plan_units(eager, BUDGET, (x,), units=["first", "last"], progress=False)
    units = plan_units(model, BUDGET, (x,), progress=False)
    assert "last" in units.planned and "first" not in units.planned
    assert_same(trained(eager, x), trained(model, x))


def test_units_are_planned_around_nodes_of_code_outside_of_them() -> None:
    torch.manual_seed(0)
    model, eager, x = Net(hooks_its_own_node), Net(hooks_its_own_node), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, BUDGET, (x,), progress=False)
    assert sorted(units.planned) == ["first", "last"]
    assert_same(trained(eager, x), trained(model, x))


def test_what_a_unit_reads_of_its_own_tensors_is_its_own_matter() -> None:
    torch.manual_seed(0)
    model, eager = Net(reads_the_version, inside=True), Net(reads_the_version, inside=True)
    eager.load_state_dict(model.state_dict())
    x = torch.randn(64, 16)
    units = plan_units(model, BUDGET, (x,), units=["first", "last"], progress=False)
    assert sorted(units.planned) == ["first", "last"]
    assert_same(trained(eager, x), trained(model, x))


def follows_a_way_of_its_own(y: torch.Tensor) -> torch.Tensor:
    node = y.grad_fn
    for step in (0, 0, 1):  # of the view, of the product, of the layer: its input
        node = node.next_functions[step][0]
    return y * len(node.name())


def test_code_that_fails_on_further_nodes_is_named() -> None:
    model, x = Net(follows_a_way_of_its_own), torch.randn(64, 16)
    model(x)
    with pytest.raises(CaptureError, match=r"next_functions.* raises \w+: .*planner\.plan"):
        plan_units(model, BUDGET, (x,), progress=False)


class UnderHooks(nn.Module):
    """Calls its second block under hooks on saved tensors."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks, self.context = nn.ModuleList(Block() for _ in range(3)), context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        with self.context():
            x = self.blocks[1](x)
        return self.blocks[2](x).square().sum()


CONTEXTS: dict[str, Callable[[], Any]] = {
    "rounded": lambda: torch.autograd.graph.saved_tensors_hooks(torch.Tensor.half, torch.Tensor.float),
    "on the host": torch.autograd.graph.save_on_cpu,
    "not allowed": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none, please"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_units_are_planned_around_hooks_on_saved_tensors(name: str) -> None:
    torch.manual_seed(0)
    model, eager, x = UnderHooks(CONTEXTS[name]), UnderHooks(CONTEXTS[name]), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, BUDGET, (x,), progress=False)
    assert sorted(name for name in units.planned if not name.startswith("blocks.1")) == ["blocks.0", "blocks.2"]
    assert "saved_tensors_hooks" in units.left["blocks.1.up"]
    assert_same(trained(eager, x), trained(model, x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.first(x))
        return h, self.second(h)


class ByTwo(nn.Module):
    """Differentiates one result of a block in the forward, the other in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.last = Two(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        a, b = self.two(x)
        (gradient,) = torch.autograd.grad(a.sum(), x, retain_graph=True)
        return self.last(b + gradient).square().sum()


def test_a_unit_is_left_whose_results_get_gradients_in_two_backwards() -> None:
    torch.manual_seed(0)
    model, eager, x = ByTwo(), ByTwo(), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, BUDGET, (x,), progress=False)
    assert "last" in units.planned and "two" not in units.planned
    assert_same(trained(eager, x), trained(model, x))


class Gated(nn.Module):
    """A block that the backward runs, too, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.gate(x)
        h.register_hook(lambda gradient: gradient * self.gate(gradient))
        return self.last(h).square().sum()


def test_a_block_that_the_backward_runs_without_gradients_is_a_unit() -> None:
    torch.manual_seed(0)
    model, eager, x = Gated(), Gated(), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, BUDGET, (x,), progress=False)
    assert sorted(units.planned) == ["gate", "last"]
    assert_same(trained(eager, x), trained(model, x))


class Wrong(nn.Module):
    """Asks whether there is a node, and fails by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        assert y.grad_fn is not None
        return (y @ torch.ones(3, 3)).sum()


def test_an_error_of_the_models_own_is_told_as_such() -> None:
    with pytest.raises(InputError, match="correct the model or the example call"):
        plan_units(Wrong(), BUDGET, (torch.randn(64, 16),), progress=False)
