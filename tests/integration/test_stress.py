"""Long runs and accidents: many schedules, many steps, threads, errors in the middle of a step."""

import copy
import gc
import random
import threading
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner import plan
from planner.rewriter.stages import cut_stages
from tests.support import models
from tests.support.planned import captured, rewritten
from tests.support.strategies import scatter
from tests.support.training import assert_same, loss_of, trajectory

NUM_SCHEDULES = 10_000


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.MODELS)
def test_ten_thousand_random_schedules_train_bit_exactly(name):
    """Ten thousand over all models."""
    _, args, kwargs, _, graph, expected = captured(name)
    rng = random.Random(name)
    num_recomputing = 0
    for _ in range(-(-NUM_SCHEDULES // len(models.MODELS))):
        schedule = scatter(graph, rng, keep=rng.random())
        num_recomputing += bool(schedule.recomputes())
        assert_same(expected, trajectory(rewritten(name, schedule, num_stages=rng.randint(1, 6)), args, kwargs))
    assert num_recomputing > 100


def recomputing(name):
    """A planned module in which much runs again, its call, and what a step of it must give."""
    _, args, kwargs, _, graph, expected = captured(name)
    schedule = scatter(graph, random.Random(1), keep=0.2)
    assert schedule.recomputes()
    return rewritten(name, schedule), args, kwargs, expected


def live_tensors():
    """Number of live tensors, and the bytes of their storages."""
    gc.collect()
    found = [held for held in gc.get_objects() if type(held) in (torch.Tensor, nn.Parameter)]
    storages = {}
    for tensor in found:
        with suppress(RuntimeError):  # a trace's tensor without data, which another test may hold
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return len(found), sum(storages.values())


@pytest.mark.parametrize("name", ["attention", pytest.param("convolution", marks=pytest.mark.zoo)])
def test_a_thousand_steps_leak_nothing(name):
    module, args, kwargs, _ = recomputing(name)
    counts = []
    for step in range(1000):
        loss_of(module(*args, **kwargs)).backward()
        module.zero_grad()
        if step % 333 == 0:
            counts.append((*live_tensors(), len(gc.get_objects())))
    tensors, nbytes, objects = zip(*counts[1:], strict=True)
    assert len(set(tensors)) == 1 and len(set(nbytes)) == 1
    assert max(objects) - min(objects) < 50  # the test's own


class FailingAt(TorchDispatchMode):
    """Lets `count` kernels run, then the memory is out."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count -= 1
        if self.count < 0:
            raise torch.OutOfMemoryError("no memory for this kernel")
        return func(*args, **(kwargs or {}))


class Effects(nn.Module):
    """Leaves a tensor, writes into its argument, and has code in the backward."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 32), nn.Linear(32, 8), None

    def forward(self, given):
        h = torch.tanh(self.up(given["x"]))
        h.register_hook(lambda gradient: gradient * 2)
        self.last, given["h"] = h.mean(), h
        given["kept"].append(h.detach())
        return self.down(h).sum()


def test_a_step_leaves_no_tensor_to_the_garbage_collection():
    """What only a cycle holds counts until the next collection: the peak would depend on when that comes."""
    model = Effects()
    make = lambda: {"x": torch.randn(16, 8), "kept": []}
    planned = plan(model, 1.0, (make(),), progress=False)
    for i in range(5):  # an audit at the second one
        planned.zero_grad()
        gc.collect()
        gc.disable()
        try:
            given = make()
            (planned(given) + model.last).backward()
            del given
            model.last = None
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            held = [item for item in gc.garbage if isinstance(item, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert i == 0 or not held  # the first step may capture a backward of other gradients
    assert planned.num_planned_calls == 5


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_out_of_memory_anywhere_in_a_step_leaves_the_module_usable(name, monkeypatch):
    module, args, kwargs, expected = recomputing(name)
    planned_under = module.step.key.switches
    monkeypatch.setattr(
        "planner.runtime.guards.call.global_switches", lambda: planned_under
    )  # to which a dispatch mode is another
    counter = FailingAt(10**9)
    twin = copy.deepcopy(module)
    with counter:
        loss_of(twin(*args, **kwargs)).backward()
    total = 10**9 - counter.count
    del twin
    before = live_tensors()
    failed_in_backward = 0
    for count in range(0, total, max(1, total // 24)):
        twin = copy.deepcopy(module)
        buffers = [buffer.clone() for buffer in twin.buffers()]
        torch.manual_seed(3)
        started = after_forward = torch.get_rng_state()
        loss = None
        with pytest.raises(torch.OutOfMemoryError), FailingAt(count):
            loss = loss_of(twin(*args, **kwargs))
            after_forward = torch.get_rng_state()
            loss.backward()
        if loss is not None:
            failed_in_backward += 1
            assert torch.equal(torch.get_rng_state(), after_forward)  # not that of a recompute
        del loss
        torch.set_rng_state(started)
        twin.zero_grad()
        for buffer, content in zip(twin.buffers(), buffers, strict=True):
            buffer.copy_(content)  # a forward that failed may have written them, as eager's would
        assert_same(expected, trajectory(twin, args, kwargs))
        del twin, buffers, started, after_forward
    assert failed_in_backward >= 8
    after = live_tensors()
    assert after[0] <= before[0] and after[1] <= before[1]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("where", ["forward hook", "tensor hook", "parameter hook"])
def test_an_exception_of_the_users_leaks_nothing_and_the_next_step_is_exact(where):
    twin, args, kwargs, expected = recomputing("attention")

    def fail(*_):
        raise KeyError("mine")

    counts = []
    for _ in range(4):
        with torch.random.fork_rng():
            handle = None
            if where == "forward hook":
                handle = twin.register_forward_hook(fail)
            elif where == "parameter hook":
                handle = next(p for p in twin.parameters() if p.requires_grad).register_hook(fail)
            with pytest.raises(KeyError, match="mine"):
                loss = loss_of(twin(*args, **kwargs))
                if where == "tensor hook":
                    loss.register_hook(fail)
                loss.backward()
            loss = None
            if handle is not None:
                handle.remove()
        twin.zero_grad()
        counts.append(live_tensors())
    assert counts[1] == counts[2] == counts[3]
    assert_same(expected, trajectory(twin, args, kwargs))


def test_two_models_train_in_two_threads():
    made = {}
    for name in ("convolution", "reused"):
        torch.manual_seed(0)
        if name == "convolution":
            model, args, _ = models.build("convolution")
        else:
            layer = nn.Linear(32, 32)
            model, args = models.Wrapped(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)), (torch.randn(64, 32),)
        made[name] = plan(model.train(), 0.97, args, costs="estimate", progress=False), args
    alone = {name: trajectory(copy.deepcopy(module), args, {}, steps=20) for name, (module, args) in made.items()}
    found = {}

    def train(name):
        module, args = made[name]
        found[name] = trajectory(module, args, {}, steps=20)

    threads = [threading.Thread(target=train, args=(name,)) for name in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in made:
        assert_same(alone[name][:-1], found[name][:-1])  # the last is the random state, which threads share


def stepped_in_backward(module, args, kwargs):
    """Weights after three steps by hooks that use and drop each gradient as it comes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            optimizer = torch.optim.SGD([parameter], 0.1)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for _ in range(3):
            loss_of(module(*args, **kwargs)).backward()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("name", models.MODELS)
def test_an_optimizer_inside_the_backward_changes_nothing_that_is_still_read(name):
    model, args, kwargs, _, graph, _ = captured(name)
    expected = stepped_in_backward(copy.deepcopy(model), args, kwargs)
    schedule = scatter(graph, random.Random(0), keep=0.3)
    assert_same(expected, stepped_in_backward(rewritten(name, schedule, num_stages=99), args, kwargs))


@pytest.mark.parametrize("by", ["itself", "a view"])
def test_a_gradient_waits_until_nothing_reads_its_parameter(by):
    """The weight's gradient is complete before the input's, which still reads the weight."""
    aten = torch.ops.aten
    graph = torch.fx.Graph()
    x, weight, grad = (graph.placeholder(name) for name in ("x", "weight", "grad"))
    seen = weight if by == "itself" else graph.call_function(aten.t.default, (weight,))
    of_weight = graph.call_function(aten.mm.default, (grad, x))
    of_bias = graph.call_function(aten.sum.dim_IntList, (grad, [0]))
    of_input = graph.call_function(aten.mm.default, (grad, seen))
    graph.output((of_weight, of_bias, of_input))
    stages = cut_stages(graph, 3, ["weight", "bias", "x"])
    assert [stage.gradients for stage in stages] == [(1,), (0, 2)]  # autograd would not visit a stage without one
    assert [stage.gradients for stage in cut_stages(graph, 3)] == [(0,), (1,), (2,)]
