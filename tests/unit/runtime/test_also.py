"""Several calls planned together, by also= and sizes=: told apart in statistics and warnings; one budget holds them all."""

import re

import pytest
import torch
from torch import nn

from planner import CaptureError, InfeasibleBudgetError, MismatchWarning, plan


class Scaled(nn.Module):
    """With a switch among its arguments, a second tensor, and a tensor that Python holds."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), torch.ones(8)

    def forward(self, x, y=None, is_signed=True):
        h = torch.tanh(self.layer(x) * self.scale)
        return (h if is_signed else h.abs()) + (0 if y is None else y)


def test_calls_of_the_same_shapes_are_told_apart():
    """A discriminator's calls: on data, and on samples whose gradient goes on to the generator."""
    x = torch.randn(4, 8)
    sampled = x.clone().requires_grad_()
    module = plan(Scaled(), "1MiB", (x,), costs="estimate", progress=False, also=[((sampled,), {}), ((x[:2],), {})])
    for call in (x, sampled, sampled, x[:2]):
        module(call).sum().backward()
    on_data = ": input 0 is float32[4, 8] strides (8, 1) on cpu"
    assert module.stats().sizes == ((f"(4, 8){on_data}", 1), (f"(4, 8){on_data}, requires_grad", 2), ("(2, 8)", 1))


def test_calls_that_differ_in_other_arguments_are_told_apart():
    x = torch.randn(4, 8)
    also = [((x, x), {}), ((x, None, False), {})]
    module = plan(Scaled(), "1MiB", (x, None, True), costs="estimate", progress=False, also=also)
    module(x, None, False)
    (first, _), (second, _), (third, count) = module.stats().sizes
    assert len({first, second, third}) == 3 and "input 1 is float32[4, 8]" in second
    assert "is True" in first and "is False" in third and count == 1


def test_a_tensor_that_python_holds_is_named_by_what_differs():
    x = torch.randn(4, 8)
    model = Scaled()
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    model.scale = torch.ones(8, requires_grad=True)
    with pytest.warns(MismatchWarning, match=r"unplanned: scale\.requires_grad is True, planned for False"):
        module(x)
    model.scale = torch.ones(8).as_subclass(type("Marked", (torch.Tensor,), {}))
    with pytest.warns(MismatchWarning, match=r"unplanned: the class of scale is Marked, planned for Tensor"):
        module(x)


@pytest.mark.parametrize("budget", [0.3, "300B", 0.7])
@pytest.mark.parametrize("rows", [5, 6, 40])
def test_a_budget_that_is_named_holds_all_calls(budget, rows):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)])
    options = {"costs": "estimate", "progress": False, "also": [((torch.randn(rows, 8),), {}), ((torch.randn(3, 8),), {})]}
    with pytest.raises(InfeasibleBudgetError, match=r"^Raise the budget to [^(]* \(\d+ bytes\)") as caught:
        plan(model, budget, (torch.randn(4, 8),), **options)
    named = re.match(r"[^(]* \((\d+) bytes\)(?:, ([\d.]+) of the plain step's peak)?", str(caught.value))
    for enough in filter(None, named.groups()):
        enough = float(enough) if "." in enough else int(enough)
        assert plan(model, enough, (torch.randn(4, 8),), **options).alternatives


@pytest.mark.parametrize("budget", [0.3, 0.8, 1.0])
def test_a_budget_that_is_named_holds_all_sizes(budget):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)])
    args = torch.randn(4, 8)
    sizes = [((torch.randn(rows, 8),), {}) for rows in (12, 40, 20)]
    options = {"costs": "estimate", "progress": False, "dynamic": True, "sizes": sizes}
    with pytest.raises((InfeasibleBudgetError, CaptureError), match=r"^Raise the budget to [^(]* \(\d+ bytes\)") as caught:
        plan(model, budget, (args,), **options)
    enough = int(re.findall(r"\((\d+) bytes\)", str(caught.value))[0])
    assert len(plan(model, enough, (args,), **options).stats().sizes) == 4


@pytest.mark.parametrize(("budget", "error"), [(1.0, CaptureError), ("300B", InfeasibleBudgetError)])
@pytest.mark.parametrize("where", ["also", "sizes"])
def test_a_call_that_cannot_be_captured_keeps_its_own_error(budget, error, where):
    x, wrong = torch.randn(4, 8), torch.randn(4, 7)
    message = {CaptureError: "correct the model or the example call", InfeasibleBudgetError: "^Raise the budget to"}[error]
    with pytest.raises(error, match="cannot be planned: correct" if (where, budget) == ("sizes", 1.0) else message):
        plan(Scaled(), budget, (x,), costs="estimate", progress=False, dynamic=True, **{where: [((wrong,), {})]})


def test_a_budget_that_is_named_holds_calls_that_share_their_arguments():
    """The same tuple with another keyword."""
    args = (torch.randn(64, 8),)
    options = {"costs": "estimate", "progress": False, "also": [(args, {"is_signed": False})]}
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(Scaled(), "1KB", args, {"is_signed": True}, **options)
    enough = int(re.findall(r"\((\d+) bytes\)", str(caught.value))[0])
    assert plan(Scaled(), enough, args, {"is_signed": True}, **options).alternatives


def test_a_fraction_is_of_the_first_calls_peak_also_where_another_call_does_not_fit():
    x = torch.randn(4, 8)
    larger = [((x.clone().requires_grad_(),), {})]
    with pytest.raises(InfeasibleBudgetError, match=r"^Raise the budget to [^(]* \(\d+ bytes\): budget 1 of") as caught:
        plan(Scaled(), 1.0, (x,), costs="estimate", progress=False, also=larger)
    enough = int(re.findall(r"\((\d+) bytes\)", str(caught.value))[0])
    assert plan(Scaled(), enough, (x,), costs="estimate", progress=False, also=larger).alternatives


def test_a_call_that_differs_in_requires_grad_alone_is_named_by_it():
    x = torch.randn(4, 8)
    module = plan(Scaled(), 1.0, (x,), costs="estimate", progress=False)
    with pytest.warns(MismatchWarning, match=r"unplanned: input 0\.requires_grad is True, planned for False\. To plan both"):
        module(x.clone().requires_grad_())
    module.layer.weight.requires_grad_(False)
    with pytest.warns(MismatchWarning, match=r"unplanned: layer\.weight\.requires_grad is False, planned for True"):
        module(x)
