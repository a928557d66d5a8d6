"""Which places of Python state hold one container: the same after planned calls as after the model's own."""

import copy
import warnings

import pytest
import torch
from torch import nn

from planner import PlannerError, plan


class Model(nn.Module):
    def __init__(self, leave):
        super().__init__()
        self.linear, self.leave = nn.Linear(8, 8), leave
        self.one = self.other = None
        self.kept, self.history, self.config = {}, [], {"k": [1.0]}

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        self.leave(self, h.detach())
        return h.sum()


def first_call(leave):
    def run(module, h):
        if module.one is None:
            leave(module, h)

    return run


def two_attributes(module, h):
    module.one = [1, 2]
    module.other = module.one


def three_places(module, h):
    module.one = module.other = module.kept["l"] = [1, 2]


def in_a_tuple(module, h):
    module.one = [1, 2]
    module.other = (module.one,)


def in_a_list(module, h):
    module.one = {"x": 1}
    module.other = [module.one]


def an_item_and_an_attribute(module, h):
    made = module.kept["x"] = [1]
    module.one = made


def two_items(module, h):
    made = module.kept["x"] = [1]
    module.kept["y"] = (made,)
    module.one = made


def of_tensors(module, h):
    module.one = module.kept["x"] = [h.mean(), 1]
    module.other = [module.one, module.kept["x"]]


def one_that_is_there(module, h):
    module.other = module.history


def one_that_is_there_in_a_new_one(module, h):
    module.other = [module.history, {"c": module.config}]


def with_tensors(module, h):
    module.other = (module.config, h.mean())


def inside_of_what_is_there(module, h):
    module.other = [module.config["k"], h.mean()]


def one_that_grows(module, h):
    module.history.append(h.mean())
    module.other = [module.history]


def one_that_grows_after(module, h):
    module.other = {"h": module.history}
    module.history.append(h.mean())


EVERY = (
    two_attributes,
    three_places,
    in_a_tuple,
    in_a_list,
    an_item_and_an_attribute,
    two_items,
    of_tensors,
    one_that_is_there,
    one_that_is_there_in_a_new_one,
    with_tensors,
    inside_of_what_is_there,
    one_that_grows,
    one_that_grows_after,
)
FIRST = EVERY[:7]


def sharing(model):
    """The state as text, each container with a number of its own."""
    numbers = {}

    def text(value):
        if not isinstance(value, (list, dict, tuple)):
            return round(value.item(), 4) if isinstance(value, torch.Tensor) else value
        if isinstance(value, tuple):
            return f"({', '.join(str(text(item)) for item in value)})"
        if id(value) in numbers:
            return f"#{numbers[id(value)]}"
        numbers[id(value)] = len(numbers)
        items = value.values() if isinstance(value, dict) else value
        return f"#{numbers[id(value)]}[{', '.join(str(text(item)) for item in items)}]"

    return text((model.one, model.other, model.kept, model.history, model.config))


def check(leave, between=lambda model: None, num_calls=4):
    torch.manual_seed(0)
    eager = Model(leave)
    model, x = copy.deepcopy(eager), torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            planned = plan(model, "1MiB", (x,), progress=False)
        except PlannerError as error:
            assert "fault of the planner" not in str(error)
            return None
        for _ in range(num_calls):
            for module in (eager, planned):
                module(x).backward()
            eager.zero_grad(), model.zero_grad()
            assert sharing(model) == sharing(eager)
            between(eager), between(model)
    return planned


@pytest.mark.parametrize("leave", EVERY)
def test_each_call_leaves_it(leave):
    planned = check(leave)
    assert planned is not None and planned.num_unplanned_calls <= 1  # the first one


@pytest.mark.parametrize("leave", FIRST)
def test_the_first_call_leaves_it(leave):
    planned = check(first_call(leave))
    assert planned is not None and planned.num_unplanned_calls == 0


def grow(model):
    """What the training loop may write there."""
    for value in (model.one, model.other):
        if isinstance(value, list):
            value.append(5)
        elif isinstance(value, dict):
            value[len(value)] = 5


@pytest.mark.parametrize("leave", [*map(first_call, FIRST), *EVERY])
def test_the_loop_writes_into_it(leave):
    check(leave, grow)


def test_what_the_first_call_alone_writes_stays_as_the_loop_left_it():
    """Nobody reads `other`: later calls do not write it again."""

    def leave(module, h):
        if module.one is None:
            module.one, module.other = 1, [1, 2]

    planned = check(leave, lambda model: model.other.append(3))
    assert planned.num_unplanned_calls == 0 and planned.original.other == [1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("value", [[1, 2], (1, [2]), {"k": 1}, torch.tensor(2.0), 2.0])
def test_the_first_call_sets_what_nobody_reads(value):
    """Beside a flag by which later calls know that it has been."""

    def leave(module, h):
        if module.one is None:
            module.one, module.other = 1, copy.copy(value)

    planned = check(leave)
    assert planned.original.other is not None
