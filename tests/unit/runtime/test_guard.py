"""What the capture held fixed is compared at each call: a change that may change results is a mismatch, which is named."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples import gpt2
from planner import CaptureError, MismatchWarning, plan
from planner.tracer.capture import capture
from tests.support.models import Wrapped
from tests.support.training import assert_same, trajectory


class Steered(nn.Module):
    """Branches on plain attributes, its own and a configuration's; counts nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)
        self.scale, self.twice, self.unused = 2.0, False, 7
        self.config = SimpleNamespace(activation="gelu", name="steered")

    def forward(self, x):
        x = getattr(F, self.config.activation)(self.first(x)) * self.scale
        x = self.drop(self.second(x))
        return self.second(x) if self.twice else x


def made():
    torch.manual_seed(0)
    model = Wrapped(Steered()).train()
    return model, plan(model, 1.0, (torch.randn(4, 8),), costs="estimate", progress=False)


X = torch.linspace(-1, 1, 32).reshape(4, 8)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "scale", 3.0), "body.scale is 3.0, planned for 2.0"),
        (lambda m: setattr(m, "twice", True), "body.twice"),
        (lambda m: setattr(m, "scale", torch.ones(8)), "body.scale"),
        (lambda m: delattr(m, "scale") or setattr(type(m), "scale", 3.0), "body.scale is 3.0"),
        (lambda m: setattr(m.drop, "p", 0.5), "body.drop.p is 0.5"),
        (lambda m: setattr(m.config, "activation", "relu"), "body.config.activation is 'relu'"),
        (lambda m: setattr(m, "second", nn.Linear(8, 8)), "a submodule was replaced"),
        (lambda m: m.add_module("third", nn.Linear(8, 8)), "a submodule was replaced"),
        (lambda m: m.first.register_forward_hook(lambda *_: None), "a submodule has a new hook"),
        (lambda m: m.first.register_full_backward_hook(lambda *_: None), "a submodule has a new hook"),
        (lambda m: m.first.eval(), "training mode"),
        (lambda m: m.first.weight.requires_grad_(False), "body.first.weight"),
        (lambda m: m.first.double(), "body.first.weight"),
    ],
)
def test_a_change_that_steers_is_a_miss_that_names_it(change, named):
    model, module = made()
    assert not module.mismatch((X,), {})
    try:
        change(model.body)
        assert named in str(module.mismatch((X,), {}))
    finally:
        if hasattr(Steered, "scale"):
            del Steered.scale


def test_a_miss_runs_what_the_model_has_become():
    model, module = made()
    model.body.scale = 3.0
    twin = copy.deepcopy(model)
    with pytest.warns(MismatchWarning, match="scale"):
        assert_same(trajectory(twin, (X,), {}), trajectory(module, (X,), {}))
    model.body.scale = 2.0
    assert not module.mismatch((X,), {})


def test_what_no_code_of_the_model_names_may_change():
    model, module = made()
    model.body.unused, model.body.note = 8, "text"
    model.body.config.later = object()
    model.register_forward_hook(lambda *_: None)
    assert not module.mismatch((X,), {})


def test_keywords_may_come_in_any_order():
    model, _ = made()
    labels = torch.randn(4, 8)
    module = plan(model, 1.0, kwargs={"x": X, "labels": labels}, costs="estimate", progress=False)
    assert not module.mismatch((), {"labels": labels, "x": X})
    assert "structure" in str(module.mismatch((), {"x": X}))


class Counting(nn.Module):
    """Counts its calls in a plain attribute; `uses` says whether the count matters."""

    def __init__(self, uses, limit=10**9):
        super().__init__()
        self.layer, self.calls, self.uses, self.limit = nn.Linear(8, 8), 0, uses, limit

    def forward(self, x):
        self.calls = min(self.calls + 1, self.limit)
        return self.layer(x) * (self.calls if self.uses else 1)


def test_a_count_that_matters_is_refused_and_the_model_left_as_it_was():
    model = Counting(uses=True).train()
    with pytest.raises(CaptureError, match=r"attribute calls \(\d before, \d after\)"):
        capture(model, (X,))
    assert model.calls == 0


def test_a_count_that_matters_in_a_submodule_counts_on_as_it_is():
    model = Wrapped(Counting(uses=True)).train()
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert model.body.calls == 0
    assert module.plan.provenance.opaque == ("body",)
    assert_same(trajectory(copy.deepcopy(model), (X,), {}), trajectory(module, (X,), {}))
    assert model.body.calls == 3


def test_a_count_that_nobody_uses_is_planned():
    model = Wrapped(Counting(uses=False)).train()
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert_same(trajectory(copy.deepcopy(model), (X,), {}), trajectory(module, (X,), {}))


def test_a_first_call_that_differs_may_be_run_before_planning():
    model = Wrapped(Counting(uses=True, limit=2)).train()
    model(X), model(X)
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert_same(trajectory(copy.deepcopy(model), (X,), {}), trajectory(module, (X,), {}))


def test_saving_a_transformers_model_is_no_miss_and_another_attention_is(tmp_path):
    model, args, kwargs = gpt2.build(layers=1, width=16, heads=2, length=8, vocabulary=16)
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False)
    model.save_pretrained(tmp_path)
    assert not module.mismatch(args, kwargs)
    model.config.output_hidden_states = True
    assert "config.output_hidden_states is True, planned for False" in str(module.mismatch(args, kwargs))
    model.config.output_hidden_states = False
    assert not module.mismatch(args, kwargs)
    model.transformer.gradient_checkpointing = True
    assert "gradient_checkpointing" in str(module.mismatch(args, kwargs))


def test_a_call_in_evaluation_that_installs_a_librarys_hooks_is_no_miss():
    model, args, kwargs = gpt2.build(layers=1, width=16, heads=2, length=8, vocabulary=16)
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False)
    model.eval()
    with torch.no_grad():
        model(**kwargs, output_hidden_states=True)
    model.train()
    assert not module.mismatch(args, kwargs)


class Compares(nn.Module):
    """Python reads whether two tensors are equal, in the open and inside of torch.cov."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, y):
        h = self.layer(x)
        if torch.equal(x[:, :2], y):
            h = h * 2
        if torch.equal(x, y):
            h = h * 3
        return (torch.corrcoef(h) + torch.cov(h)).square().mean()


def test_comparisons_of_tensors_are_read_anew_in_every_call():
    torch.manual_seed(0)
    model, equal = Compares(), X[:, :2].clone()
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, (X, equal), costs="estimate", progress=False)
    assert_same(trajectory(twin, (X, equal), {}), trajectory(planned, (X, equal), {}))
    with pytest.warns(MismatchWarning, match=r"the value read at test_guard.py:\d+ is False, planned for True") as said:
        found = planned(X, equal + 1)
    assert [warning.filename for warning in said] == [__file__]
    assert torch.equal(found, twin(X, equal + 1)) and torch.equal(planned(X, equal), twin(X, equal))


def test_a_warning_points_at_the_line_that_calls_the_model():
    _, planned = made()
    with pytest.warns(MismatchWarning) as said:
        nn.Sequential(nn.Identity(), planned)(X[:2])  # through torch's own modules
    assert [warning.filename for warning in said] == [__file__]
