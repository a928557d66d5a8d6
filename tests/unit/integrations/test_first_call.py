"""plan_at_first_call: plans the call that is really made, leaves what others put around the forward, gives the model back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from planner import BudgetError, InfeasibleBudgetError, plan_at_first_call
from planner.integrations.first_call import FirstCall
from planner.runtime.install import PlannedForward

QUICK = {"costs": "estimate", "progress": False, "check": False}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.float().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_equal(found, expected):
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def planned_calls(model):
    return sum(module.num_planned_calls for module in vars(model)["forward"].planned)


def test_the_first_call_in_training_runs_planned_and_earlier_calls_do_not():
    model, x, tables = network(), torch.randn(64, 16), []
    twin = copy.deepcopy(model)
    plan_at_first_call(model, 1.0, log=tables.append, **QUICK)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    model.train()
    assert isinstance(model.forward, FirstCall) and not tables
    assert_equal(gradients(model, x), gradients(twin, x))
    assert isinstance(model.forward, PlannedForward) and planned_calls(model) == 1
    assert len(tables) == 1 and tables[0].startswith("budget")


@pytest.mark.parametrize("progress", [True, False])
def test_a_job_without_a_terminal_is_told_what_it_waits_for(progress, capsys):
    model, x = network(), torch.randn(64, 16)
    plan_at_first_call(model, 1.0, log=list, **{**QUICK, "progress": progress})
    for _ in range(2):
        model(x).sum().backward()
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in said] == ([["planner:", "capture"], ["planner:", "solve"]] if progress else [])


def test_a_smaller_batch_runs_planned_too():
    model, x = network(), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    plan_at_first_call(model, 1.0, log=list, **QUICK)
    for batch in (x, x[:7]):
        assert_equal(gradients(model, batch), gradients(twin, batch))
    assert planned_calls(model) == 2


@pytest.mark.parametrize("is_wrapped_before", [False, True])
def test_an_autocast_put_around_the_forward_stays(is_wrapped_before):
    def wrap(module):
        module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)

    model, x, tables = network(), torch.randn(64, 16), []
    twin = copy.deepcopy(model)
    wrap(twin)
    if is_wrapped_before:
        wrap(model)
    first = plan_at_first_call(model, 1.0, log=tables.append, **QUICK)
    if not is_wrapped_before:
        wrap(model)
    outer = vars(model)["forward"]
    for _ in range(3):
        found = gradients(model, x)
        assert found[0].dtype is torch.bfloat16
        assert_equal(found, gradients(twin, x))
    assert len(tables) == 1 and (vars(model)["forward"] is outer) is not is_wrapped_before
    first.stop()
    assert_equal(gradients(model, x), gradients(twin, x))
    assert not isinstance(model.forward, FirstCall | PlannedForward)


def test_stop_gives_the_model_back():
    for calls in (0, 1):
        model, x = network(), torch.randn(64, 16)
        first = plan_at_first_call(model, 1.0, log=list, **QUICK)
        for _ in range(calls):
            gradients(model, x)
        assert "forward" in vars(model)
        first.stop()
        assert "forward" not in vars(model)


def test_of_two_the_later_one_plans_and_nothing_stays():
    model, x = network(), torch.randn(64, 16)
    earlier = plan_at_first_call(model, 0.9, log=lambda table: pytest.fail("both planned"), **QUICK)
    with pytest.warns(UserWarning, match="the later one plans it"):
        later = plan_at_first_call(model, 1.0, log=lambda table: None, **QUICK)
    gradients(model, x)
    assert planned_calls(model) == 1
    later.stop()
    earlier.stop()
    assert "forward" not in vars(model)


def test_what_cannot_be_planned_trains_as_before_and_says_why():
    model, x = network(), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    plan_at_first_call(model, 1, log=list, **QUICK)
    with pytest.warns(UserWarning, match="Sequential trains unplanned.*InfeasibleBudgetError: Raise the budget to 27.19 KiB"):
        found = gradients(model, x)
    assert_equal(found, gradients(twin, x))
    assert "forward" not in vars(model)


def test_strict_is_an_error_and_the_model_is_as_it_was():
    model = network()
    plan_at_first_call(model, 1, strict=True, **QUICK)
    with pytest.raises(InfeasibleBudgetError):
        model(torch.randn(64, 16))
    assert "forward" not in vars(model)


def test_mistakes_are_told_where_they_are_made():
    with pytest.raises(BudgetError):
        plan_at_first_call(network(), "20 potatoes")
    with pytest.raises(TypeError, match="effort"):
        plan_at_first_call(network(), 1.0, efort=3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_made_before_the_first_call_is_a_model_of_its_own(copied):
    model, x = network(), torch.randn(64, 16)
    first = plan_at_first_call(model, 1.0, log=list, **QUICK)
    other = copied(model)
    with torch.no_grad():
        other[0].weight.zero_()
    assert not torch.equal(other(x), model(x)) and torch.equal(other(x), network_of(other)(x))
    first.stop()


def network_of(model):
    made = network()
    made.load_state_dict(model.state_dict())
    return made


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_a_distributed_model_wraps_is_planned(one_process):
    model, x = network(), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    plan_at_first_call(wrapped, 1.0, log=list, **QUICK)
    for _ in range(2):
        assert_equal(gradients(wrapped, x), gradients(twin, x))
    assert planned_calls(model) == 2


def test_a_sharded_model_trains_as_before_and_says_why(one_process):
    model, x = network(), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    for module in (model, twin):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    plan_at_first_call(model, 1.0, **QUICK)
    with pytest.warns(UserWarning, match="trains unplanned.*InputError.*before they are sharded"):
        out = model(x)
    assert torch.equal(out, twin(x))
    out.sum().backward()
    assert "forward" not in vars(model)


def test_data_parallel_trains_as_before_and_says_why():
    model, x = nn.DataParallel(network()), torch.randn(64, 16)
    plan_at_first_call(model, 1.0, **QUICK)
    with pytest.warns(UserWarning, match="DataParallel trains unplanned.*InputError.*a process for each device"):
        assert torch.equal(model(x), model.module(x))
