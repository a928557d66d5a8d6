"""plan(..., criterion=...): a loss outside of the model is part of the plan, exact in bits and bytes from the first step."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import InputError, MismatchWarning, apply, install, plan, verify
from planner.profiler.memory import logical_peak
from tests.support.training import assert_same


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))
        self.embed, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50)
        self.norm = nn.BatchNorm1d(32)
        self.factor = 1.0

    def forward(self, ids):
        h = F.dropout(F.gelu(self.inner(self.embed(ids))), 0.2, self.training)
        return self.head(self.norm((h * self.scale).flatten(0, 1)).view(h.shape) * self.factor)


class Segmentation(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def transposed_cross_entropy(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets)


def per_pixel(logits, targets, *, smoothing=0.0):
    return F.cross_entropy(logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), targets, label_smoothing=smoothing)


class Weighted(nn.Module):
    """A loss with a parameter, a buffer and a mode of its own."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("weights", torch.linspace(0.5, 1.5, 50))

    def forward(self, logits, targets):
        loss = F.cross_entropy(logits.flatten(0, 1) / self.temperature, targets.flatten(), weight=self.weights)
        return loss if self.training else loss * 2


CASES = {
    "function": (LanguageModel, (4, 6), transposed_cross_entropy),
    "module": (LanguageModel, (4, 6), Weighted),
    "lambda": (LanguageModel, (4, 6), lambda logits, targets: F.cross_entropy(logits.mT, targets)),
    "partial": (Segmentation, None, functools.partial(per_pixel, smoothing=0.1)),
}


def built(name):
    torch.manual_seed(0)
    build, shape, criterion = CASES[name]
    criterion = criterion() if isinstance(criterion, type) else criterion
    if shape is None:
        return build(), criterion, torch.randn(2, 3, 16, 12), torch.randint(0, 8, (2 * 16 * 12,))
    return build(), criterion, torch.randint(0, 50, shape), torch.randint(0, 50, shape)


def names_of(module):
    return list(module.state_dict()), [n for n, _ in module.named_parameters()], [n for n, _ in module.named_buffers()]


def resident(module, *tensors):
    return sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers(), *tensors))


def trained(step, parameters, buffers, steps=3):
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    seen = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for _ in range(steps):
            loss, output = step()
            loss.backward()
            seen += [loss.detach().clone(), output.detach().clone(), *(p.grad.clone() for p in parameters)]
            optimizer.step()
            optimizer.zero_grad()
        seen.append(torch.get_rng_state())
    return [*seen, *(b.clone() for b in buffers)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("budget", [1.0, 0.85])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_outside_of_the_model_is_planned_with_it(name, budget, caplog):
    model, criterion, x, y = built(name)
    twin, twin_criterion = copy.deepcopy(model), copy.deepcopy(criterion)
    names = names_of(model)
    module = plan(model, budget, (x,), criterion=criterion, criterion_args=(y,), costs="estimate", progress=False, effort=2.0)
    assert names == names_of(module)
    own = [criterion.temperature] if isinstance(criterion, nn.Module) else []
    twins_own = [twin_criterion.temperature] if own else []

    def eager():
        output = twin(x)
        return twin_criterion(output, y), output

    expected = trained(eager, [*twin.parameters(), *twins_own], twin.buffers())
    with caplog.at_level(logging.INFO, "planner"):
        found = trained(lambda: module(x, criterion_args=(y,)), [*model.parameters(), *own], model.buffers())
    assert_same(expected, found)
    assert not [record for record in caplog.records if record.name == "planner.runtime"]  # no other backward was needed


@pytest.mark.parametrize("name", ["function", "partial"])
def test_the_measured_peak_is_within_the_budget(name):
    model, criterion, x, y = built(name)
    module = plan(model, 0.9, (x,), criterion=criterion, criterion_args=(y,), progress=False, effort=2.0)
    for _ in range(2):
        module.zero_grad()
        peak = resident(module, x, y) + logical_peak(lambda: module(x, criterion_args=(y,))[0].backward(), module.device)
        assert peak <= module.plan.budget_bytes


@pytest.mark.parametrize("name", ["function", "module"])
def test_evaluation_and_other_calls_run_the_model_and_the_loss(name):
    model, criterion, x, y = built(name)
    module = plan(model, 1.0, (x,), criterion=criterion, criterion_args=(y,), costs="estimate", progress=False)
    twin, twin_criterion = copy.deepcopy(model).eval(), copy.deepcopy(criterion)
    if isinstance(criterion, nn.Module):
        twin_criterion.eval()
    module.eval()
    assert not model.training and not module.training
    with torch.no_grad():
        loss, output = module(x, criterion_args=(y,))
    assert_same([twin_criterion(twin(x), y), twin(x)], [loss, output])
    with torch.no_grad():
        assert torch.equal(twin(x), module(x))
    module.train()
    assert model.training
    model.eval()
    assert torch.equal(module(x, criterion_args=(y,))[1], twin.eval()(x))


def test_changes_of_the_model_are_noticed():
    model, criterion, x, y = built("function")
    module = plan(model, 1.0, (x,), criterion=criterion, criterion_args=(y,), costs="estimate", progress=False, strict=False)
    model.factor = 2.0
    with pytest.warns(MismatchWarning, match="factor"):
        module(x, criterion_args=(y,))


def test_copies_pickles_and_saved_plans(tmp_path):
    model, criterion, x, y = built("function")
    module = plan(model, 0.9, (x,), criterion=criterion, criterion_args=(y,), costs="estimate", progress=False)
    module.plan.save(tmp_path / "plan.json")
    again = apply(type(module.plan).load(tmp_path / "plan.json"), model, (x,), criterion=criterion, criterion_args=(y,))
    losses = []
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        model.load_state_dict(model.state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(1)
            losses.append(each(x, criterion_args=(y,))[0].detach())
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    report = verify(module, (x,), {"criterion_args": (y,)})
    assert report.exact, report


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"criterion_args": (1,)}, "without criterion"),
        ({"criterion": F.mse_loss, "criterion_args": torch.zeros(3)}, "tuple"),
        ({"criterion": F.mse_loss}, "tuple"),
        ({"criterion": nn.MSELoss, "criterion_args": (1,)}, "class MSELoss"),
        ({"criterion": 3, "criterion_args": (1,)}, "not an int"),
        ({"criterion": F.mse_loss, "criterion_args": (1,), "loss": 0}, "loss="),
        ({"criterion": lambda out, y: out.detach().sum(), "criterion_args": (1,)}, "does not require grad"),
    ],
)
def test_what_cannot_be_a_criterion_is_refused(options, complaint):
    with pytest.raises(InputError, match=complaint):
        plan(nn.Linear(3, 3), 1.0, (torch.randn(2, 3),), costs="estimate", progress=False, **options)


def test_a_forward_with_such_an_argument_of_its_own_is_refused():
    class Taken(nn.Linear):
        def forward(self, x, criterion_args=()):
            return super().forward(x)

    with pytest.raises(InputError, match="own forward takes criterion_args"):
        plan(Taken(3, 3), 1.0, (torch.randn(2, 3),), criterion=F.mse_loss, criterion_args=(torch.zeros(2, 3),))


def test_install_refuses_what_returns_something_else():
    model, criterion, x, y = built("function")
    module = plan(model, 1.0, (x,), criterion=criterion, criterion_args=(y,), costs="estimate", progress=False)
    with pytest.raises(InputError, match="criterion"):
        install(model, module)
