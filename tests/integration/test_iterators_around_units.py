"""Iterators that a model's code holds where no copy of the model has its own: planning reads copies, or refuses."""

from __future__ import annotations

import contextvars
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from planner import CaptureError, PlannerError, plan, plan_units
from tests.support.training import assert_same

Take = Callable[[], float]


def numbers() -> Iterator[float]:
    yield from itertools.count(1.0)


def in_a_closure(it: Any) -> Take:
    return lambda: next(it)


def in_a_default(it: Any) -> Take:
    return lambda step=it.__next__: step()


def in_a_keyword_default(it: Any) -> Take:
    def take(*, held: Any = it) -> float:
        return next(held)

    return take


def in_a_list(it: Any) -> Take:
    return lambda held=[it]: next(held[0])


def as_a_method(it: Any) -> Take:
    return it.__next__


def in_a_partial(it: Any) -> Take:
    return functools.partial(next, it)


def behind_a_map(it: Any) -> Take:
    doubled = map(float, it)
    return lambda: next(doubled)


def in_a_class(it: Any) -> Take:
    class Source:
        items = it

    return lambda: next(Source.items)


def in_the_class_of_an_object(it: Any) -> Take:
    class Source:
        items = it

    source = Source()
    return lambda: next(source.items)


def in_slots(it: Any) -> Take:
    class Source:
        __slots__ = ("items",)

    source = Source()
    source.items = it
    return lambda: next(source.items)


def in_a_special_method(it: Any) -> Take:
    class Source:
        def __getitem__(self, _: int) -> float:
            return next(it)

    source = Source()
    return lambda: source[0]


def in_a_callable(it: Any) -> Take:
    class Source:
        def __call__(self) -> float:
            return next(it)

    return Source()


def in_a_property(it: Any) -> Take:
    class Source:
        value = property(lambda self: next(it))

    source = Source()
    return lambda: source.value


def in_a_context_variable(it: Any) -> Take:
    variable = contextvars.ContextVar("variable")
    variable.set(it)
    return lambda: next(variable.get())


def in_a_global_variable(it: Any) -> Take:
    global NUMBERS
    NUMBERS = it
    return lambda: next(NUMBERS)


def in_a_global_function(it: Any) -> Take:
    global TAKE
    TAKE = lambda: next(it)
    return lambda: TAKE()


def in_another_python_module(it: Any) -> Take:
    home = types.ModuleType("home_of_numbers")
    home.numbers = it
    return lambda: next(home.numbers)


SHARED = [in_a_global_variable, in_a_global_function]
PLACES = [
    *(in_a_class, in_the_class_of_an_object, in_slots, in_a_special_method, in_a_callable, in_a_property),
    *(in_a_context_variable, in_another_python_module),
    *(in_a_closure, in_a_default, in_a_keyword_default, in_a_list, as_a_method, in_a_partial, behind_a_map),
]


class Net(nn.Module):
    def __init__(self, take: Take) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.take = nn.Linear(16, 64), nn.Linear(64, 16), take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) * self.take()).square().sum()


@pytest.mark.parametrize("how", [plan, plan_units], ids=lambda how: how.__name__)
@pytest.mark.parametrize("place", [*PLACES, *SHARED], ids=lambda place: place.__name__)
def test_a_generator_is_not_used_up(place: Callable[[Any], Take], how: Callable[..., object]) -> None:
    it = numbers()
    model, x = Net(place(it)), torch.randn(64, 16)
    shared = model.take
    with pytest.raises(PlannerError, match=r"iterator|cannot be copied"):
        how(model, "1MiB", (x,), progress=False)
    assert model.take is shared
    assert next(it) == 1.0 and model.take() == 2.0


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support will be removed from itertools")
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_units_are_planned_around_copies_of_other_iterators(place: Callable[[Any], Take]) -> None:
    model, eager = (Net(place(itertools.cycle([1.0, 2.0, 3.0]))) for _ in range(2))
    x = torch.randn(64, 16)
    plan_units(model, "1MiB", (x,), progress=False)
    for _ in range(3):
        for run in (model, eager):
            run.zero_grad()
            run(x).backward()
        assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support will be removed from itertools")
@pytest.mark.parametrize("place", SHARED, ids=lambda place: place.__name__)
def test_iterators_of_global_variables_are_not_used_up(place: Callable[[Any], Take]) -> None:
    it = itertools.cycle([1.0, 2.0, 3.0])
    model = Net(place(it))
    plan_units(model, "1MiB", (torch.randn(64, 16),), progress=False)
    assert [model.take(), next(it)] == [1.0, 2.0]


def test_two_functions_that_share_an_iterator_have_it_again() -> None:
    it = numbers()
    model = Net(lambda: next(it))
    model.other = lambda: next(it)
    with pytest.raises(CaptureError, match="iterator"):
        plan_units(model, "1MiB", (torch.randn(64, 16),), progress=False)
    assert [model.take(), model.other()] == [1.0, 2.0]


def test_a_class_has_its_own_iterators_again() -> None:
    class WithPool(Net):
        pool: ClassVar[dict[str, Any]] = {"numbers": itertools.cycle([1.0, 2.0])}
        single: ClassVar[Any] = itertools.cycle([1.0, 2.0])
        draw: ClassVar[Any] = functools.partial(next, itertools.cycle([1.0, 2.0]))

    model = WithPool(lambda: next(model.pool["numbers"]) * next(model.single) * model.draw())
    before = WithPool.pool["numbers"], WithPool.single, WithPool.draw
    plan_units(model, "1MiB", (torch.randn(64, 16),), progress=False)
    assert (WithPool.pool["numbers"], WithPool.single, WithPool.draw) == before
    assert [model.take(), model.take()] == [1.0, 8.0]
