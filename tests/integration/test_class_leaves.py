"""Tensors without history that the forward makes and that require grad: planned inside of it, refused where they are left.

Autograd fills their `.grad`, which nobody sees unless the tensor is returned or left somewhere.
"""

import pytest
import torch
from torch import nn

from planner import plan
from tests.support.members import GUARDED, check, ids, inside, member, sampled

REFUSED = frozenset({"refused"})
OUT = "self.c(self.b(h))"
LEAF = "h.detach().requires_grad_()"
NUMBER = "torch.tensor(0.5, requires_grad=True)"


def made(name, value, use="h = h * leaf"):
    return member(name, f"leaf = {value}\n{use}")


MADE = [
    made("a number", NUMBER),
    made("a list of one", "torch.tensor([0.5], requires_grad=True)"),
    made("a number, later", "torch.tensor(0.5).requires_grad_()"),
    made("as_tensor", "torch.as_tensor([0.5]).requires_grad_()"),
    made("new_tensor", "h.new_tensor([0.5], requires_grad=True)"),
    made("torch.Tensor", "torch.Tensor([0.5]).requires_grad_()"),
    made("zeros", "torch.zeros(1, requires_grad=True)"),
    made(
        "a sum that begins with it",
        "torch.tensor([0.0], requires_grad=True)",
        "for _ in range(2):\n    leaf = leaf + h.mean()\nh = h + leaf",
    ),
    made("an activation", LEAF),
    made("an activation's data", "h.data.requires_grad_()"),
    made("a copy of it", "h.detach().clone().requires_grad_()"),
]


@pytest.mark.parametrize("of", sampled(MADE))
def test_inside_of_the_forward_it_is_planned(of):
    check(of)


RETURNED = [
    member("alone", out=f"({OUT}, torch.zeros(1, requires_grad=True))"),
    member("twice in a list", "leaf = torch.zeros(1, requires_grad=True)", out=f"({OUT}, [leaf, leaf])"),
    member("an activation", "leaf = h.detach().requires_grad_()", out=f"({OUT}, leaf)"),
    member("of Python's numbers", out=f"({OUT}, torch.tensor([0.5, 1.0], requires_grad=True))"),
]


@pytest.mark.parametrize("of", RETURNED, ids=ids(RETURNED))
def test_returned_and_used_nowhere_else_it_is_planned(of):
    check(of)


class Placeholder(nn.Module):
    """Returns a loss, and a second one that is nothing yet."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x).square().sum(), torch.zeros(1, requires_grad=True)


def test_the_gradient_of_a_returned_one_is_filled():
    model, x = Placeholder(), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), loss=0, progress=False)
    found = []
    for module in (model, planned):
        module.zero_grad()
        loss, other = module(x)
        (loss + 3 * other.sum()).backward()
        found.append((module.up.weight.grad.clone(), other.grad, torch.tensor(other.is_leaf)))
    assert planned.num_planned_calls == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def left(name, place="", value=LEAF, init="", **fields):
    text = f"leaf = {value}\nh = h * leaf\n{place}"
    return member(name, text, init=init, allowed=REFUSED, word="requires grad and has no history", planned_from=None, **fields)


LEFT = [
    left("attribute", "self.leaf = leaf"),
    left("attribute, a number", "self.leaf = leaf", NUMBER),
    left("attribute, new memory", "self.leaf = leaf", "torch.zeros(8, requires_grad=True)"),
    left("attribute, unused", "self.leaf = torch.zeros(8, requires_grad=True)"),
    left("the input's", "self.leaf = leaf", "x[:, :8].detach().requires_grad_()"),
    left("list item", "self.s[0] = leaf", init="self.s = [None]"),
    left("dict item", "self.s['leaf'] = leaf", init="self.s = {}"),
    left("appended", "self.s.append(leaf)", init="self.s = collections.deque(maxlen=1)"),
    left("child's attribute", "self.a.leaf = leaf"),
    left("returned", out=f"({OUT}, leaf)"),
    left("returned in a list", out=f"[{OUT}, [leaf]]"),
]


@pytest.mark.parametrize("of", sampled(LEFT))
def test_left_where_its_gradient_can_be_read_it_is_refused(of):
    check(of)


SPLIT = "h = h + (h > 0).nonzero().shape[0]\n"


@pytest.mark.parametrize("place", ["self.leaf = leaf", "self.s.append(leaf)"])
def test_left_by_a_submodule_that_runs_as_it_is_it_is_refused(place):
    text = f"{SPLIT}leaf = (h * 1).detach().requires_grad_()\nh = h * leaf\n"
    check(inside(member("kept nowhere", text)))
    of = member("left", text + place, init="self.s = []", allowed=REFUSED, word="leaves it in Python state", planned_from=None)
    check(inside(of, REFUSED))


def reset(name, forward, rows="16, 8", **fields):
    """A buffer that gets an activation, with its graph, and that the next forward puts zeros in place of."""
    return member(
        name, forward, init=f"self.register_buffer('m', torch.zeros({rows}))", allowed=GUARDED, planned_from=1, **fields
    )


RESET = [
    reset(
        "zeros like it", "self.m = torch.zeros_like(self.m)\nfor _ in range(2):\n    self.m = self.m * 0.5 + h\nh = h + self.m"
    ),
    reset(
        "empty at first",
        "s = torch.zeros_like(self.m)\nif s.shape != h.shape:\n    s = torch.zeros_like(h)\nself.m = h + s",
        "0",
    ),
    reset("its shape", "h = h + torch.ones(self.m.shape)\nself.m = h"),
    reset("new zeros", "h = h + self.m.new_zeros(8)\nself.m = h.relu()"),
]


@pytest.mark.parametrize("of", sampled(RESET))
def test_a_buffer_that_an_activation_is_put_into(of):
    check(of)
