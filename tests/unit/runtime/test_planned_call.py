"""What Python and trainers look up in the class of a planned module is what its model's class has."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

from planner import BackwardError, CheckpointedModule, plan

QUICK = {"costs": "estimate", "progress": False, "check": False}
X = torch.randn(4, 8)


class Net(nn.Module):
    """A model as libraries write them: a labels argument, a train() of its own, attributes that trainers ask for."""

    main_input_name = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.config = nn.Linear(8, 8), nn.BatchNorm1d(8), {"width": 8}

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        return (self.norm(self.first(pixels)) * scale).square().mean()

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.norm.eval()
        return self

    def can_generate(self) -> bool:
        return False


@pytest.fixture
def planned() -> CheckpointedModule:
    return plan(Net().train(), 1.0, (X,), **QUICK)


@pytest.mark.parametrize("copied", [lambda one: one, copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_it_has_the_signatures_and_attributes_of_the_model(planned, copied):
    made = copied(planned)
    assert isinstance(made, CheckpointedModule) and repr(made).startswith("CheckpointedNet(")
    for found, expected in ((made.forward, made.original.forward), (type(made).forward, Net.forward)):
        assert inspect.signature(found) == inspect.signature(expected)
    assert inspect.signature(made) == inspect.signature(made.original)
    assert made.main_input_name == "pixels" and made.config == {"width": 8} and not made.can_generate()
    assert not hasattr(made, "generate")


def test_two_planned_modules_have_signatures_of_their_own(planned):
    other = plan(nn.Sequential(nn.Linear(8, 8)), 1.0, (X,), **QUICK)
    assert [*inspect.signature(other.forward).parameters] == ["input"]
    assert [*inspect.signature(planned.forward).parameters] == ["pixels", "labels", "scale"]


def test_methods_of_a_module_that_the_model_overrides_are_the_models(planned):
    assert planned.train() is planned and planned.training and planned.original.training and not planned.norm.training
    assert planned.eval() is planned and not planned.original.training


def test_methods_that_the_model_does_not_override_return_the_planned_module(planned):
    assert planned.to(torch.float32) is planned and planned.requires_grad_() is planned


def test_a_planned_call_is_still_one(planned):
    assert torch.equal(planned(X), planned.original(X)) and planned.num_planned_calls == 1


def test_its_own_class_can_be_set(planned):
    planned.__class__ = type("Sharded", (type(planned),), {})
    assert type(planned).__name__ == "Sharded" and isinstance(planned, CheckpointedModule)


def own_class(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor | None:
    return out * 2 if isinstance(module, Net) else None


def own_class_first(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
    return (args[0] * 2,) if isinstance(module, Net) else None


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (modules.register_module_forward_hook, own_class),
        (modules.register_module_forward_pre_hook, own_class_first),
        (modules.register_module_full_backward_pre_hook, lambda module, g: (g[0] * 2,) if isinstance(module, Net) else None),
    ],
)
def test_hooks_of_all_modules_are_given_the_model(register, hook):
    net = Net()
    planned, results = plan(net, 1.0, (X,), **QUICK), []
    net.register_forward_hook(lambda module, args, out: out * 3)
    handle = register(hook)
    try:
        for module in (net, planned):
            net.zero_grad()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out = module(X.clone().requires_grad_())
            out.backward()
            results.append((out.detach(), net.first.weight.grad))
    finally:
        handle.remove()
    assert len(said) == 1 and "global module hooks" in str(said[0].message)
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:.*forwards wait")
def test_a_step_that_is_differentiated_again_in_its_own_backward_is_an_error():
    """By a hook; afterwards the model trains as before."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), progress=False, num_stages=6)
    loss = planned(x).sum()
    handle = model[3].weight.register_hook(lambda _: torch.autograd.grad(loss, model[0].weight, retain_graph=True) and None)
    with pytest.raises(BackwardError, match="differentiated again inside of its own backward"):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    planned(x).sum().backward()
    expected = torch.autograd.grad(planned.original(x).sum(), list(model.parameters()))
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), expected, strict=True))
