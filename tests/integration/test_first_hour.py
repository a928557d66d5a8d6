"""The mistakes of a first hour: read as they are meant, or an error that begins with the cure; the model is untouched."""

import functools

import pytest
import torch
from torch import nn

from planner import (
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    InputError,
    Plan,
    apply,
    apply_units,
    install,
    plan,
    plan_children,
    plan_units,
    verify,
)
from planner.profiler.optimizer import state_bytes
from tests.support.untouched import assert_untouched, refused, snapshot

X = torch.randn(16, 6)
QUICK = {"costs": "estimate", "progress": False, "check": False}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2))


def begins_with(cure, error, *call, **options):
    """The first ten words hold the cure."""
    message = str(refused(error, None, *call, **options))
    assert cure in " ".join(message.split()[: 10 + len(cure.split())]), message
    return message


# The example call


def test_a_tensor_is_a_call_of_one_argument():
    model = net()
    planned = plan(model, "100%", X, **QUICK)
    assert planned.plan.graph == plan(model, 1.0, (X,), **QUICK).plan.graph
    assert verify(planned, X, rounds=0).exact
    assert apply(planned.plan, model, X, progress=False).mismatch((X,), {}) is None


class Batched(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["x"])


@pytest.mark.parametrize("batch", [{"x": X}, functools.partial(dict, x=X)()], ids=["dict", "made"])
def test_a_batch_in_place_of_args(batch):
    begins_with(
        "pass kwargs=batch for model(**batch), or args=(batch,) for model(batch)", InputError, Batched(6, 2), 1.0, batch
    )
    assert plan(Batched(6, 2), 1.0, (batch,), **QUICK)


def test_a_batch_of_a_tokenizer():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input": X})
    begins_with("pass kwargs=batch", InputError, nn.Linear(6, 2), 1.0, batch)
    assert plan(nn.Linear(6, 2), 1.0, kwargs=batch, **QUICK)


def test_a_loader_in_place_of_a_batch():
    loader = torch.utils.data.DataLoader(X)
    assert "args is a DataLoader" in begins_with(
        "give the example call's positional arguments as a tuple, args=(x,)", InputError, net(), 1.0, loader
    )


class Forwards(nn.Module):
    """Raises in a line of its own."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 2)

    def forward(self, x, labels=None):
        if x.dim() == 3:
            raise ValueError("two dimensions, please")
        hidden = self.embedding(x) if x.dim() == 1 else x
        return self.head(hidden)


@pytest.mark.parametrize(
    ("args", "kwargs", "own"),
    [
        ((torch.randn(4, 5),), {}, r"at head test_first_hour.py:\d+ raises RuntimeError: mat1 and mat2 shapes"),
        ((torch.randn(4, 5, 6),), {}, r"at test_first_hour.py:\d+ raises ValueError: two dimensions, please"),
        ((torch.randn(4),), {}, r"at embedding test_first_hour.py:\d+ raises RuntimeError: Expected tensor .* Long"),
        ((torch.ones(4, 6, dtype=torch.int64),), {}, "raises RuntimeError: mat1 and mat2 must have the same dtype"),
        ((X, X, X), {}, "raises TypeError: .*takes from 2 to 3 positional arguments but 4 were given"),
        ((X,), {"targets": X}, "raises TypeError: .*unexpected keyword argument 'targets'"),
    ],
    ids=["shape", "own check", "integers as floats", "floats as integers", "too many", "unknown keyword"],
)
def test_what_the_model_itself_raises(args, kwargs, own):
    model = Forwards()
    error = refused(CaptureError, own, model, 1.0, args, kwargs)
    assert str(error).startswith("correct the model or the example call: model(*args, **kwargs) ")
    assert error.is_models_own and "plan_children" not in str(error)
    with pytest.raises(type(error.__cause__)) as plainly:
        model(*args, **kwargs)
    assert str(plainly.value) == str(error.__cause__)


COUNTS = torch.zeros(6)


class WritesThenFails(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mean, self.held = torch.zeros(6), {"seen": [torch.zeros(6)]}
        self.register_buffer("runs", torch.zeros(6))

    def forward(self, x):
        for tensor in (self.mean, self.held["seen"][0], COUNTS, self.runs, x):
            tensor += 1
        return super().forward(x) + torch.zeros(5, 5)


def test_what_a_failing_forward_writes_is_restored():
    model, x = WritesThenFails(6, 6), torch.zeros(6)
    assert refused(CaptureError, "must match the size", model, 1.0, (x,)).is_models_own
    assert not any(tensor.any() for tensor in (model.mean, model.held["seen"][0], COUNTS, model.runs, x))


class Picks(nn.Linear):
    def forward(self, x):
        hidden = super().forward(x)
        return hidden[hidden > 0].sum()


def test_what_the_planner_cannot_capture_is_not_the_models_own_error():
    assert not refused(CaptureError, "shape depends on the data", Picks(6, 2), 1.0, (X,)).is_models_own


# The budget


@pytest.mark.parametrize(
    ("text", "meant"),
    [("0.9", 0.9), ("90%", 0.9), (" 90 % ", 0.9), ("1.0", 1.0), ("24g", "24GiB"), ("24 GB", 24 * 10**9), ("800M", 800 * 2**20)],
)
def test_budgets_as_people_write_them(text, meant):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(4)])
    assert plan(model, text, (X,), **QUICK).plan.budget_bytes == plan(model, meant, (X,), **QUICK).plan.budget_bytes


@pytest.mark.parametrize("budget", ["150%", "1.5", 60.0, "0%"])
def test_a_fraction_above_one(budget):
    begins_with("write the budget as 0.6 or '60%'", BudgetError, net(), budget, (X,))


@pytest.mark.parametrize("budget", ["24 gigabytes", "0,6", "much"])
def test_a_budget_that_cannot_be_read(budget):
    begins_with("write the budget as '24GiB'", BudgetError, net(), budget, (X,))


@pytest.mark.parametrize("budget", [(X,), X, {"x": X}, net()], ids=["tuple", "tensor", "dict", "model"])
def test_the_arguments_in_another_order(budget):
    begins_with("name the arguments, budget='24GiB' and args=(x,)", BudgetError, net(), budget, "1GiB")


@pytest.mark.parametrize("budget", [24, "60", "300B"])
def test_a_budget_below_the_parameters(budget):
    message = begins_with("Raise the budget to", InfeasibleBudgetError, net(), budget, (X,))
    assert ("a number without a unit is bytes" in message) is (budget != "300B")


def test_reserved_bytes_are_no_fraction():
    begins_with("write the reserve as '24GiB'", BudgetError, net(), 1.0, (X,), reserve="0.5")


# The state of things


@pytest.mark.parametrize(
    ("mode", "cure"),
    [(torch.no_grad, "plan outside of torch.no_grad()"), (torch.inference_mode, "plan outside of torch.inference_mode()")],
)
def test_under_no_grad(mode, cure):
    model = net()
    with mode():
        begins_with(cure, InputError, model, 1.0, (X,))


def test_inference_tensors():
    with torch.inference_mode():
        x, model = torch.randn(4, 6), net()
    begins_with("make tensor input 0 outside of torch.inference_mode()", InputError, net(), 1.0, (x,))
    with pytest.raises(InputError, match=r"^make 0\.weight outside of torch\.inference_mode\(\)"):
        plan(model, 1.0, (X,), **QUICK)


def test_eval_mode():
    begins_with("call model.train() first", InputError, net().eval(), 1.0, (X,))


def test_a_batch_on_another_device():
    begins_with("move the batch to the model's device, .to('cpu')", InputError, net(), 1.0, (X.to("meta"),))


def test_nothing_that_trains():
    begins_with("call requires_grad_() on the parameters", InputError, net().requires_grad_(False), 1.0, (X,))


def test_planned_already():
    planned = plan(net(), 1.0, (X,), **QUICK)
    begins_with("plan the original, model.original", InputError, planned, 1.0, (X,))
    begins_with("plan the original, model.0.original", InputError, nn.Sequential(planned), 1.0, (X,))
    assert plan(planned.original, 1.0, (X,), **QUICK).plan.graph == planned.plan.graph


def test_installed_already():
    model = net()
    first = plan(model, 1.0, (X,), **QUICK)
    install(model, first)
    second = plan(model, 1.0, (X,), **QUICK)
    assert second.plan.graph == first.plan.graph and second.original is model
    install(model, second)
    model(X).sum().backward()
    assert (first.num_planned_calls, second.num_planned_calls) == (0, 1)


def test_compiled_already():
    model = net()
    begins_with(
        "plan what torch.compile was given, model._orig_mod", InputError, torch.compile(model, backend="eager"), 1.0, (X,)
    )
    begins_with("model.0._orig_mod", InputError, nn.Sequential(torch.compile(model, backend="eager")), 1.0, (X,))
    model[0].compile(backend="eager")
    begins_with("plan before compile()", InputError, model, 1.0, (X,))


def test_data_parallel():
    begins_with("use a process for each device", InputError, nn.DataParallel(net()), 1.0, (X,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [plan_units, plan_children])
def test_units_of_a_model_that_does_not_train(function):
    quick = {"costs": "estimate", "progress": False}
    with pytest.raises(InputError, match=r"^call model\.train\(\) first"):
        function(net().eval(), 1.0, X, **quick)
    with torch.no_grad(), pytest.raises(InputError, match=r"^plan outside of torch\.no_grad\(\)"):
        function(net(), 1.0, X, **quick)
    with pytest.raises(InputError, match=r"^pass kwargs=batch"):
        function(net(), 1.0, {"input": X}, **quick)


def test_the_plan_of_units_by_the_name_of_its_file(tmp_path):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)) for _ in range(2)], nn.Linear(6, 2))
    planned = plan_units(model, "100%", X, costs="estimate", effort=0.5, progress=False)
    planned.save(tmp_path / "units.json")
    assert planned.verify(X).exact
    assert apply_units(str(tmp_path / "units.json"), model, X, progress=False).plan.units == planned.plan.units
    with pytest.raises(InputError, match=r"^give planned\.plan, or the name of its file"):
        apply_units(planned, model, X)


# Plans and optimizers


def test_a_plan_by_the_name_of_its_file(tmp_path):
    model = net()
    made = plan(model, 1.0, (X,), **QUICK).plan
    made.save(tmp_path / "plan.json")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert apply(path, model, (X,), progress=False, check=False).plan == Plan.load(path)


def test_a_planned_module_in_place_of_its_plan():
    planned = plan(net(), 1.0, (X,), **QUICK)
    for wrong in (planned, planned.original):
        with pytest.raises(InputError, match=r"^pass (its plan, )?apply\((module\.)?plan, model, args\)"):
            apply(wrong, net(), (X,))


def held(optimizer):
    states = optimizer.state.values()
    return sum(tensor.nbytes for state in states for tensor in state.values() if isinstance(tensor, torch.Tensor))


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "foreach": functools.partial(torch.optim.Adam, foreach=True, amsgrad=True),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "plain": functools.partial(torch.optim.SGD, lr=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=torch.tensor(0.1), capturable=False),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_is_counted_before_and_after_its_first_step(make):
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    optimizer = make(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # takes the place of optimizer.step
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("stepped"))
    before = snapshot(model)
    predicted = state_bytes(model, optimizer)
    assert_untouched(before, model)
    assert not optimizer.state and predicted == state_bytes(model, optimizer)
    optimizer._optimizer_step_pre_hooks.clear()
    model[0](X).sum().backward()  # one group has no gradients yet
    optimizer.step()
    assert state_bytes(model, optimizer) == predicted
    model(X).sum().backward()
    optimizer.step()
    assert state_bytes(model, optimizer) == held(optimizer) == predicted


def test_an_optimizer_in_a_plan():
    model = net()
    half = [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[2].parameters(), momentum=0.9)]
    reserved = lambda optimizer: (
        plan(model, 1.0, (X,), optimizer=optimizer, **QUICK).plan.graph.value["(optimizer state)"].nbytes
    )
    assert reserved(half[0]) == 2 * 4 * (6 * 16 + 16) + 2 * 4
    assert reserved(half) == reserved(half[0]) + 4 * (16 * 2 + 2)


def test_an_optimizer_of_another_model():
    other = torch.optim.Adam(net().parameters())
    begins_with("give the optimizer of this model", InputError, net(), 1.0, (X,), optimizer=other)


def test_an_optimizer_whose_state_cannot_be_counted():
    model = net()
    closure = torch.optim.LBFGS(model.parameters())
    begins_with("set its bytes aside with reserve='2GiB'", InputError, model, 1.0, (X,), optimizer=closure)
