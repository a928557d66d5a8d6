"""install: the user's own model trains planned; copies, files, eval and everything else about it stay as they were."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from planner import InputError, MismatchError, MismatchWarning, install, plan, uninstall
from planner.graph.schedule import keep_all
from tests.support import models
from tests.support.training import assert_same, trajectory


def planned(model, args, kwargs, budget=0.9, **options):
    return plan(model, budget, args, kwargs, costs="estimate", progress=False, **options)


@pytest.fixture
def attention():
    return models.build("attention")


def test_installed_model_trains_bit_equal_and_planned(attention):
    model, args, kwargs = attention
    expected = trajectory(copy.deepcopy(model), args, kwargs)
    module = planned(model, args, kwargs)
    assert module.plan.solution.schedule != keep_all(module.plan.graph)
    install(model, module, strict=True)
    assert_same(expected, trajectory(model, args, kwargs))  # strict: a step that ran unplanned would be an error
    out = model(*args, **kwargs)
    assert type(out["loss"].grad_fn).__name__ == "_ForwardBackward"


def test_everything_else_stays(attention):
    model, args, kwargs = attention
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    signature = inspect.signature(model.forward)
    twin = copy.deepcopy(model)
    install(model, planned(model, args, kwargs))
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
    assert inspect.signature(model.forward) == signature
    model.eval(), twin.eval()
    with torch.no_grad():
        assert torch.equal(model(*args, **kwargs)["out"], twin(*args, **kwargs)["out"])
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    model.train()
    model(*args, **kwargs)
    assert called == [1]


def test_uninstall_leaves_no_trace(attention):
    model, args, kwargs = attention
    before = dict(vars(model))
    module = planned(model, args, kwargs)
    install(model, module)
    install(model, module)  # again: it replaces, and does not nest
    uninstall(model)
    assert vars(model) == before
    uninstall(model)


def test_a_forward_set_on_the_instance_comes_back():
    model, args, kwargs = models.build("convolution")
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    own = model.forward
    install(model, planned(model, args, kwargs))
    assert model.forward is not own
    model.eval()
    model(*args, **kwargs)
    uninstall(model)
    assert model.forward is own


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_its_own_parameters(attention, how):
    model, args, kwargs = attention
    expected = trajectory(copy.deepcopy(model), args, kwargs)
    install(model, planned(model, args, kwargs), strict=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_same(expected, trajectory(twin, args, kwargs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_functional_call_uses_the_tensors_it_is_given(attention):
    model, args, kwargs = attention
    weights = {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}
    torch.manual_seed(1)
    expected = torch.func.functional_call(model, weights, args, kwargs)["loss"]
    install(model, planned(model, args, kwargs))
    torch.manual_seed(1)
    with pytest.warns(MismatchWarning, match="planned for"):  # plain tensors require no grad: not what was planned
        found = torch.func.functional_call(model, weights, args, kwargs)["loss"]
    assert torch.equal(expected, found)


def test_plans_of_several_shapes_live_side_by_side(attention):
    model, args, kwargs = attention
    other = (torch.randn(3, *args[0].shape[1:]),)
    twin = copy.deepcopy(model)
    modules = [planned(model, args, kwargs), planned(model, other, kwargs)]
    install(model, *modules, strict=True)
    for call in (args, other, args):
        assert_same(trajectory(copy.deepcopy(twin), call, kwargs), trajectory(copy.deepcopy(model), call, kwargs))
    with pytest.raises(MismatchError, match="none of its 2 plans"):
        model(torch.randn(5, *args[0].shape[1:]))


def test_planning_an_installed_model_again_plans_the_model(attention):
    model, args, kwargs = attention
    first = planned(model, args, kwargs)
    install(model, first)
    again = planned(model, args, kwargs)
    assert again.plan.graph == first.plan.graph
    assert model.forward is not None and "forward" in vars(model)


def test_strict_plan_refuses_other_training_calls_and_lets_evaluation_run(attention):
    model, args, kwargs = attention
    module = planned(model, args, kwargs, strict=True)
    with pytest.raises(MismatchError, match="input 0"):
        module(torch.randn(3, 5, 8))
    module.eval()
    with torch.no_grad():
        module(*args, **kwargs)


def test_wrong_arguments_are_named(attention):
    model, args, kwargs = attention
    with pytest.raises(InputError, match="at least one"):
        install(model)
    with pytest.raises(InputError, match="not a Wrapped"):
        install(model, model)
    with pytest.raises(InputError, match="another Wrapped object"):
        install(copy.deepcopy(model), planned(model, args, kwargs))


def test_what_is_put_around_the_forward_later_is_entered_once_a_call():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(16, 8)
    twin = copy.deepcopy(model)
    autocast = torch.autocast("cpu", torch.bfloat16)  # one instance, as accelerate does it
    with autocast:
        install(model, planned(model, (x,), {}, 1.0, dynamic=True), strict=True)
    for module in (model, twin):
        module.forward = autocast(module.forward)
    outer = model.forward
    for batch in (x, x[:5]):
        assert torch.equal(model(batch), twin(batch))
        assert not torch.is_autocast_enabled("cpu") and model.forward is outer


def test_calls_that_one_of_two_dynamic_plans_ran_count_as_planned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    few, many = (planned(model, (torch.randn(rows, 8),), {}, 1.0, dynamic=True) for rows in (4, 16))
    install(model, few, many)
    for rows in (4, 16, 8, 2, 5):
        model(torch.randn(rows, 8)).sum().backward()
    assert (few.num_planned_calls, many.num_planned_calls) == (2, 3)
    assert few.num_unplanned_calls == many.num_unplanned_calls == 0
    model[1].eval()
    with pytest.warns(MismatchWarning, match="training mode of 1"):
        model(torch.randn(4, 8))
    assert few.num_unplanned_calls == many.num_unplanned_calls == 1
