"""examples/first_call.py: what a framework wraps around the forward before the first call stays there."""

import copy

import torch
from torch import nn

from examples.first_call import plan_at_first_call


def test_an_autocast_put_around_the_forward_stays() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    plan_at_first_call(model, 1.0, costs="estimate", progress=False)
    for module in (model, twin):
        module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
    for _ in range(3):
        out, expected = model(x), twin(x)
        assert out.dtype is expected.dtype is torch.bfloat16
        out.sum().backward()
        expected.sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_nothing_is_left_where_nothing_was_wrapped() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU()), torch.randn(4, 16)
    found = []
    plan_at_first_call(model, 1.0, done=lambda planned, args, kwargs: found.append(planned), costs="estimate", progress=False)
    model(x)
    model(x)
    assert len(found) == 1
    assert type(model.forward).__name__ == "PlannedForward"
