"""Python state that a forward reaches in its own way: after planning, or a refusal, the model computes what eager does."""

import functools
import random
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from planner import CaptureError, PlannerError, plan, plan_units


class Holder:
    v = 2.0


class Net(nn.Module):
    """Scales by what `number` returns."""

    def __init__(self, prepare: Callable[["Net"], None], number: Callable[["Net"], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.number = number
        prepare(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) * self.number(self)).sum()


def items() -> Iterator[float]:
    yield from map(float, range(40))


def held(value: Callable[[], object]) -> Callable[[Net], None]:
    return lambda net: setattr(net, "held", value())


def new_function(net: Net) -> None:
    exec("def function(): pass", scope := {})
    net.function = scope["function"]


def counted(net: Net) -> float:
    net.function.n = getattr(net.function, "n", 0) + 1
    return float(net.function.n)


def drawn(seeds: np.random.SeedSequence) -> float:
    return float(seeds.generate_state(1)[0] % 97)


def in_list(net: Net) -> None:
    net.others = [nn.Sequential(nn.Linear(16, 16))]


def counted_inside(net: Net) -> float:
    inner = net.others[0][0]
    inner.n = getattr(inner, "n", 0) + 1
    return float(inner.n)


def normalizing(net: Net) -> None:
    net.others = [nn.Sequential(nn.BatchNorm1d(16))]


def normalized(net: Net) -> torch.Tensor:
    """By running statistics that the forward updates, and reads."""
    norm = net.others[0][0]
    return norm(torch.ones(4, 16) + norm.running_mean).detach().sum() + norm.running_mean.sum() + 1


def counted_behind_a_reference(net: Net) -> float:
    held = net.reference()
    held.n = getattr(held, "n", 0) + 1
    return float(held.n)


def with_reference(net: Net) -> None:
    net.holder = Holder()
    net.reference = weakref.ref(net.holder)


def new_partial(net: Net) -> None:
    net.function = functools.partial(int)


def referred(net: Net) -> None:
    net.holder = Holder()
    net.held = weakref.proxy(net.holder)


class Counting:
    """A descriptor that counts its reads."""

    def __init__(self) -> None:
        self.n = 0

    def __get__(self, _net: Net | None, _kind: type) -> float:
        self.n += 1
        return float(self.n)


class Counted(Net):
    number_of_reads = Counting()


def memory(net: Net) -> None:
    net.tensor = torch.ones(4)
    net.held = net.tensor.numpy


def written_by_a_kernel(array: np.ndarray) -> float:
    return float(torch.from_numpy(array).add_(1).sum())


def written_by_numpy(net: Net) -> float:
    array = net.held()
    array += 1
    return float(array.sum())


CASES = {
    "bound method of a random generator": (held(lambda: random.Random(3).random), lambda net: net.held()),
    "bound method of a list": (held(lambda: [*items()].pop), lambda net: net.held()),
    "bound method of an iterator": (held(lambda: iter([*items()]).__next__), lambda net: net.held()),
    "bound method of a tensor": (memory, written_by_numpy),
    "array that a tensor's kernel writes": (held(lambda: np.ones(4, "f4")), lambda net: written_by_a_kernel(net.held)),
    "seeds that others are made of": (held(lambda: np.random.SeedSequence(3)), lambda net: drawn(net.held.spawn(1)[0])),
    "a generator that makes others": (held(lambda: np.random.default_rng(3)), lambda net: net.held.spawn(1)[0].random()),
    "the seeds of a generator": (
        held(lambda: np.random.default_rng(3)),
        lambda net: drawn(net.held.bit_generator.seed_seq.spawn(1)[0]),
    ),
    "bit generator": (held(lambda: np.random.PCG64(3)), lambda net: float(net.held.random_raw() % 7)),
    "what is sent to a generator": (held(items), lambda net: net.held.send(None)),
    "attribute that a function gets": (new_function, counted),
    "attribute in a module in a module in a list": (in_list, counted_inside),
    "weight of a module in a module in a list": (in_list, lambda net: float(net.others[0][0].weight.detach().sum().abs() > 9)),
    "attribute that a partial gets": (new_partial, counted),
    "running statistics of a module in a module in a list": (normalizing, normalized),
    "weak proxy": (referred, lambda net: net.held.v),
    "attribute of an object behind a weak reference": (with_reference, counted_behind_a_reference),
}


@pytest.mark.parametrize("in_units", [False, True])
@pytest.mark.parametrize(("prepare", "number"), CASES.values(), ids=CASES.keys())
def test_the_model_computes_what_eager_does(prepare, number, in_units: bool) -> None:
    x = torch.randn(64, 16)
    model, eager = Net(prepare, number), Net(prepare, number)
    try:
        if in_units:
            plan_units(model, 1.0, (x,), progress=False)
            run = model
        else:
            run = plan(model, 0.99, (x,), progress=False)
    except PlannerError as error:
        assert "fault of the planner" not in str(error) and "GuardedIterator" not in str(error)
        run = model
    assert [run(x).item() for _ in range(3)] == [eager(x).item() for _ in range(3)]


def test_a_descriptor_that_counts() -> None:
    x = torch.randn(64, 16)
    use = lambda net: net.number_of_reads
    model = Counted(lambda _: None, use)
    with pytest.raises(CaptureError, match=r"changes its attribute .*n "):
        plan(model, 0.99, (x,), progress=False)
    assert vars(Counted)["number_of_reads"].n == 0


def test_a_tensor_of_a_module_in_a_list_is_an_input() -> None:
    """A trace puts its own tensor there, and takes it back."""
    x = torch.randn(64, 16)
    use = lambda net: net.others[0][0].weight.detach().sum()
    model = Net(in_list, use)
    weight = model.others[0][0].weight
    planned = plan(model, 0.99, (x,), progress=False)
    assert model.others[0][0].weight is weight
    with torch.no_grad():
        weight.mul_(2)
    assert planned(x).item() == Net(in_list, lambda net: 2 * use(net))(x).item()
    assert planned.num_planned_calls == 1
