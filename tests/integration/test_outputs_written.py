"""What the caller writes in place between forward and backward: the same bits as eager, or an error that names the tensor."""

import copy

import pytest
import torch
from torch import nn

from planner import BackwardError, plan
from tests.support.training import assert_same


class Outputs(nn.Module):
    """A loss, and outputs whose values eager's backward does not read, reads, or holds as a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 16)
        self.register_buffer("shift", torch.ones(64))

    def forward(self, x):
        h = self.a(x)
        w = torch.tanh(torch.tanh(h + self.shift) * 2.0)
        v = torch.sigmoid(self.b(w))
        return self.c(torch.sigmoid(v * 3.0)).sum(), h, w, h[..., :8], v.detach()


OUTPUTS = {"not saved by eager": 1, "saved by eager": 2, "view": 3, "detached": 4}


@pytest.fixture(scope="module")
def recomputing():
    torch.manual_seed(0)
    model, x = Outputs(), torch.randn(64, 8, 16)
    module = plan(model, 0.92, (x,), loss=0, costs="estimate", progress=False)
    assert module.plan.solution.schedule.recomputes()
    return module, model, x


def gradients(model, module, x, write):
    """Gradients of a step in which something is written before backward, or the error."""
    model.zero_grad()
    outputs = module(x)
    with torch.no_grad():
        write(model, x, outputs)
    try:
        outputs[0].backward()
    except RuntimeError as error:
        return error
    return [p.grad.clone() for p in model.parameters()]


def compare(recomputing, write):
    """The same gradients, or an error of ours. Eager's and ours are returned, "" where there is none."""
    module, model, x = copy.deepcopy(recomputing[0]), None, recomputing[2].clone()
    twin, model = copy.deepcopy(module.original), module.original
    expected, found = gradients(twin, twin, x.clone(), write), gradients(model, module, x, write)
    if isinstance(found, list):
        assert isinstance(expected, list), f"eager refuses: {expected}"
        assert_same(expected, found)
        return "", ""
    assert isinstance(found, BackwardError)
    return "" if isinstance(expected, list) else str(expected), str(found)


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_may_be_written_into_where_eager_allows_it(recomputing, output):
    by_eager, refused = compare(recomputing, lambda model, x, outputs: outputs[OUTPUTS[output]].mul_(3.0))
    assert bool(by_eager) == bool(refused)
    assert not refused or f"'[{OUTPUTS[output]}]'" in refused


@pytest.mark.parametrize("name", ["b.weight", "c.weight", "shift"])
def test_a_parameter_or_buffer_written_before_the_backward_that_reads_it_is_named(recomputing, name):
    _, refused = compare(recomputing, lambda model, x, outputs: model.state_dict()[name].mul_(2.0))
    assert name in refused and "inplace" in refused


@pytest.mark.parametrize("name", ["a.weight", "c.bias"])
def test_a_parameter_that_no_backward_reads_may_be_written_before_it(recomputing, name):
    assert compare(recomputing, lambda model, x, outputs: model.state_dict()[name].mul_(2.0)) == ("", "")


def test_an_input_written_before_backward_is_exact_or_named(recomputing):
    _, refused = compare(recomputing, lambda model, x, outputs: x.zero_())
    assert "input 0" in refused


class FirstLayer(nn.Module):
    """Eager's backward never reads the first weight: recomputing its output does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(torch.sigmoid(layer(x)) * 2.0)
        return x.sum()


def test_a_parameter_that_only_recomputation_reads_is_named():
    model, x = FirstLayer(), torch.randn(256, 32)
    module = plan(model, 0.6, (x,), costs="estimate", progress=False)
    assert module.plan.solution.schedule.recomputes()
    loss = module(x)
    with torch.no_grad():
        model.layers[0].weight.mul_(2.0)
        model.layers[1].weight.mul_(1.0)
    with pytest.raises(BackwardError, match=r"layers\.\d\.weight was modified"):
        loss.backward()


def test_recomputing_from_a_written_output_that_exceeds_the_budget_is_refused():
    """The output can only be recomputed beside the one that the caller holds, which the budget has no place for."""

    class Tight(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(16, 64, bias=False), nn.Linear(64, 16)

        def forward(self, x):
            h = self.a(x)
            w = torch.tanh(torch.tanh(h + 1.0) * 2.0)
            return self.c(torch.sigmoid(w * 3.0)).sum(), h

    torch.manual_seed(0)
    model, x = Tight(), torch.randn(64, 8, 16)
    module = plan(model, 0.8, (x,), loss=0, costs="estimate", progress=False)
    assert module.plan.solution.schedule.recomputes()
    twin = copy.deepcopy(model)
    for each in (twin, module):  # untouched, it trains
        each(x)[0].backward()
    assert_same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    loss, h = module(x)
    with torch.no_grad():
        h.mul_(3.0)
    with pytest.raises(BackwardError, match=r"'\[1\]' was modified in place .*more than the budget"):
        loss.backward()


VIEWS = {
    "view": lambda h: h.view(-1, 8),
    "transposed": lambda h: h.transpose(0, 1),
    "slice": lambda h: h[:, 1:5],
    "select": lambda h: h[2],
    "diagonal": lambda h: h.diagonal(),
}
WRITES = {
    "by autograd": lambda out: out.mul_(3.0),
    "without it": lambda out: out.detach().add_(1.0),
    "a part of it": lambda out: out[0].zero_(),
}


class ViewOut(nn.Module):
    """Returns a view of an activation; the backward reads the activation itself or not."""

    def __init__(self, view, is_read):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.view, self.is_read = view, is_read

    def forward(self, x):
        h = self.a(torch.tanh(self.b(x)))
        return self.c(torch.tanh(h) if self.is_read else h + 1.0).square().sum(), self.view(h)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_an_output_that_is_a_view_may_be_written_into_where_eager_allows_it(view, write, is_read):
    def gradients_of(module, model):
        model.zero_grad()
        loss, out = module(x)
        try:
            WRITES[write](out)
            (loss + out.square().sum()).backward()
        except RuntimeError as error:  # BackwardError is one
            return error
        return [p.grad for p in model.parameters()]

    torch.manual_seed(0)
    model, x = ViewOut(VIEWS[view], is_read), torch.randn(6, 8)
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False, loss=lambda out: list(out))
    expected, found = gradients_of(twin, twin), gradients_of(planned, model)
    if isinstance(expected, list):
        assert_same(expected, found)
    else:
        assert isinstance(found, BackwardError)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).t()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_written_view_is_known_where_it_is_gone_by_the_backward(is_kept):
    module, x, kept = plan(Transposed(), 1.0, (torch.randn(5, 8),), costs="estimate", progress=False), torch.randn(5, 8), []

    def loss():
        out = module(x)
        out.mul_(2.0)
        kept.extend([out] * is_kept)
        return out.contiguous().square().sum()

    with pytest.raises(BackwardError, match=r"was modified in place, and its gradient has strides \(5, 1\)"):
        loss().backward()
