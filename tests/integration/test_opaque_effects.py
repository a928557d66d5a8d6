"""What a submodule that runs as it is does beside its kernels: writes elsewhere, keeps tensors, replaces buffers."""

from __future__ import annotations

import contextvars
import copy
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from planner import BackwardError, CaptureError, MismatchWarning, plan
from planner.errors import OpaqueModuleError
from tests.support.observe import state_of

GLOBAL = types.SimpleNamespace()
UNSET: contextvars.ContextVar[int] = contextvars.ContextVar("UNSET", default=0)


class Record:
    """An object, and a class, that hold state."""

    total = torch.zeros(3)
    calls = 0

    def __init__(self) -> None:
        self.total, self.calls = torch.zeros(3), 0


def fresh() -> None:
    """Set everything outside of the model to its first value."""
    vars(GLOBAL).update(tensor=torch.zeros(8), array=np.zeros(3), items=[0], table={"k": 0}, record=Record())
    Record.total, Record.calls = torch.zeros(3), 0
    Writer.tensor, Writer.array, Writer.items, Writer.table = torch.zeros(8), np.zeros(3), [0], {"t": torch.zeros(2)}


class Writer(nn.Module):
    """Does `effect` in its forward, beside an LSTM's work."""

    tensor: torch.Tensor
    array: np.ndarray
    items: list[int]
    table: dict[str, torch.Tensor]

    def __init__(self, effect: str) -> None:
        super().__init__()
        self.core, self.effect = nn.LSTM(8, 8, batch_first=True), compile(effect, "<effect>", "exec")
        self.own_array, self.own, self.nested = np.zeros(3), torch.zeros(3), {"t": torch.zeros(2), "l": [torch.zeros(2)]}
        self.register_buffer("buffer", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.core(x)[0]
        exec(self.effect, globals(), {"self": self, "h": h})
        return torch.tanh(h)


EFFECTS = {
    "global tensor": "GLOBAL.tensor.add_(1)",
    "view of a global tensor": "GLOBAL.tensor[1:].add_(1)",
    "detached": "GLOBAL.tensor.detach().add_(1)",
    "data": "GLOBAL.tensor.data.add_(1)",
    "out": "torch.add(GLOBAL.tensor, 1, out=GLOBAL.tensor)",
    "item": "GLOBAL.tensor[0] = h.detach().mean()",
    "through numpy": "GLOBAL.tensor.numpy()[0] += 1",
    "global array": "GLOBAL.array[0] += 1",
    "global list": "GLOBAL.items.append(1)",
    "global dict": "GLOBAL.table['k'] += 1",
    "object": "GLOBAL.record.calls += 1; GLOBAL.record.total.add_(1)",
    "class": "Record.calls += 1; Record.total.add_(1)",
    "tensor of its class": "self.tensor.add_(1)",
    "array of its class": "self.array[0] += 1",
    "list of its class": "type(self).items.append(1)",
    "dict of its class": "self.table['t'].add_(1)",
    "own array": "self.own_array += 1",
    "own tensor": "self.own.mul_(2).add_(1)",
    "own tensor through numpy": "self.own.numpy()[0] += 1",
    "nested": "self.nested['t'].add_(1); self.nested['l'][0].add_(1)",
    "buffer in place": "self.buffer.mul_(0.9).add_(h.detach().mean((0, 1)))",
    "buffer, new": "self.buffer = 0.9 * self.buffer + h.detach().mean((0, 1))",
    "decayed": "self.tensor.mul_(0.9).add_(h.detach().mean((0, 1)))",
}


def outside(model: nn.Module) -> dict[str, str]:
    """Everything that the effects change."""
    classes = {kind.__name__: {k: v for k, v in vars(kind).items() if k[:1] != "_"} for kind in (Writer, Record)}
    held = {name: {k: v for k, v in value.items() if not callable(v)} for name, value in classes.items()}
    return state_of((model, vars(GLOBAL), held, GLOBAL.record.calls, GLOBAL.record.total), "state", __name__)


def built(effect: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Writer(effect), nn.Linear(8, 8)).train()


def planned_quietly(model, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan(model, options.pop("budget", 1 << 20), (x,), progress=False, costs="estimate", **options)


def trained(module: nn.Module, model: nn.Module, steps: int = 3) -> list[dict[str, str]]:
    seen = []
    for i in range(steps):
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(i))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MismatchWarning)
            module(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
        model.zero_grad()
        seen.append(outside(model))
    return seen


NAMED = [(effect, ("1",)) for effect in EFFECTS.values()]
FOUND = [
    (EFFECTS[name], ()) for name in ("global list", "class", "list of its class", "through numpy", "buffer, new", "decayed")
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("effect", "opaque"), NAMED + FOUND, ids=[*EFFECTS, *(f"found-{i}" for i in range(len(FOUND)))])
def test_effects_are_eagers_and_planning_leaves_none(effect, opaque):
    fresh()
    model = built(effect)
    expected = trained(model, model)
    fresh()
    model = built(effect)
    before = outside(model)
    planned = planned_quietly(model, torch.randn(4, 5, 8), opaque=opaque)
    assert outside(model) == before
    assert not opaque or not any(
        spec.repeatable for spec in planned.step.joint.opaque_calls.values()
    )  # recomputed, it would do it twice
    assert trained(planned, model) == expected


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_kernels_may_run_twice_and_keep_their_lists_of_weights(kind):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.core, self.after = nn.Linear(8, 8), kind(8, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x):
            return self.after(self.core(self.before(x))[0])

    model = Net()
    held, refs = model.core._flat_weights, model.core._flat_weight_refs
    planned = plan(model, 1.0, (torch.randn(4, 5, 8),), progress=False, costs="estimate")
    assert all(spec.repeatable for spec in planned.step.joint.opaque_calls.values())
    planned(torch.randn(4, 5, 8)).sum().backward()
    assert model.core._flat_weights is held and model.core._flat_weight_refs is refs
    assert all(one is other for one, other in zip(held, model.core.parameters(), strict=True))


def test_weights_that_a_part_collects_are_the_models_own():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.used = nn.GRU(8, 8, batch_first=True), None

        def forward(self, x):
            self.used = (self.core.weight_ih_l0, [self.core.bias_ih_l0], {"k": self.core.bias_hh_l0})
            return self.core(x)[0]

    model = nn.Sequential(nn.Linear(8, 8), Part())
    planned = planned_quietly(model, torch.randn(4, 5, 8), opaque=("1",))
    planned(torch.randn(4, 5, 8)).sum().backward()
    first, (second,), third = model[1].used
    core = model[1].core
    assert first is core.weight_ih_l0 and second is core.bias_ih_l0 and third["k"] is core.bias_hh_l0


class Keeping(nn.Module):
    """Carries a tensor with its graph from call to call, and leaves others for the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kept, self.aux, self.items = nn.Linear(8, 8), torch.zeros(()), None, []

    def forward(self, x):
        h = self.a(x) + self.kept
        self.kept = h.mean() * 0.5 if not self.items else self.kept.detach()
        self.aux = h.square().mean()
        return torch.tanh(h)


@pytest.mark.parametrize("called_before", [False, True])
def test_graphs_that_a_part_carries_on_are_refused(called_before):
    model, x = nn.Sequential(nn.Linear(8, 8), Keeping(), nn.Linear(8, 8)), torch.randn(4, 8)
    if called_before:
        model(x)
    with pytest.raises((OpaqueModuleError, CaptureError), match="1, which runs as it is, reads a tensor that requires grad"):
        planned_quietly(model, x, opaque=("1",))


def test_a_graph_that_appears_on_a_part_later_is_refused():
    model, x = nn.Sequential(nn.Linear(8, 8), Keeping(), nn.Linear(8, 8)), torch.randn(4, 8)
    model[1].items.append(0)
    planned = planned_quietly(model, x, opaque=("1",))
    planned(x).sum().backward()
    model[1].kept = model[0](x).mean()
    with pytest.raises(OpaqueModuleError, match="an earlier call left:"):
        planned(x)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_gradient_that_arrives_inside_of_a_part_is_refused(needs_grad):
    model, x = nn.Sequential(Keeping(), nn.Linear(8, 8)), torch.randn(4, 8).requires_grad_(needs_grad)
    model[0].items.append(0)
    planned = planned_quietly(model, x, opaque=("0",))
    loss = planned(x).sum() + model[0].aux
    with pytest.raises(BackwardError, match="kept of its inside"):
        loss.backward()


def test_weights_of_another_module_are_refused_where_a_part_reads_them():
    other = nn.Linear(8, 8)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.others = nn.Linear(8, 8), [other]

        def forward(self, x):
            return torch.tanh(self.others[0](self.a(x)))

    with pytest.raises(CaptureError, match="neither an argument nor one of its parameters"):
        planned_quietly(nn.Sequential(nn.Linear(8, 8), Part()), torch.randn(4, 8), opaque=("1",))


CHANGES = {
    "number": lambda core: setattr(core, "scale", 5.0),
    "dictionary": lambda core: core.table.update(k=3.0),
    "another tensor": lambda core: setattr(core, "shift", torch.full((8,), 2.0)),
    "tensor in place": lambda core: core.shift.add_(1),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("core", [lambda: nn.GRU(8, 8, batch_first=True), lambda: nn.Linear(8, 8)], ids=["opaque", "traced"])
def test_attributes_of_a_part_that_others_read_are_guarded(core, change):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.core = nn.Linear(8, 8), core()
            self.core.scale, self.core.table, self.core.shift = 2.0, {"k": 1.0}, torch.ones(8)

        def forward(self, x):
            h = self.core(self.before(x))
            h = h[0] if isinstance(h, tuple) else h
            self.core.left = h.square().mean()
            return torch.tanh(h * self.core.scale * self.core.table["k"] + self.core.shift)

    model, x = Net(), torch.randn(4, 5, 8)
    model(x)
    planned = planned_quietly(model, x)
    assert torch.equal(planned(x), model(x))
    change(model.core)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MismatchWarning)
        assert torch.equal(planned(x), model(x))


def test_running_statistics_survive_the_planning_of_a_part_that_writes_elsewhere():
    class Part(nn.Module):
        mean = torch.zeros(8)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            h = self.norm(self.a(x)) - type(self).mean
            type(self).mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            return h

    model, x = nn.Sequential(nn.Linear(8, 8), Part(), nn.Linear(8, 8)), torch.randn(16, 8)
    model(x)
    before, mean = copy.deepcopy(model.state_dict()), Part.mean.clone()
    planned_quietly(model, x)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert torch.equal(Part.mean, mean)


def test_a_context_variable_without_a_value_stays_without_one():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Linear(8, 8), 4.0

        def forward(self, x):
            self.scale *= 0.5
            UNSET.set(UNSET.get() + 1)
            return self.a(x) * self.scale * UNSET.get()

    planned_quietly(nn.Sequential(nn.Linear(8, 8), Part(), nn.Linear(8, 8)), torch.randn(4, 8))
    assert UNSET.get(None) is None


def test_planning_writes_nothing_into_tensors_that_are_as_they_were():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(4, 8)
    versions = [x._version, *(parameter._version for parameter in model.parameters())]
    planned_quietly(model, x)
    assert [x._version, *(parameter._version for parameter in model.parameters())] == versions


class Summed(nn.Module):
    """What enters the LSTM has another reader, whose gradient comes first, and lies otherwise in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.core, self.conv = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True), nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(x))
        return self.core(h)[0] + self.conv(h.transpose(1, 2).contiguous()).transpose(1, 2)


def test_a_gradient_that_is_added_to_inside_a_part_keeps_the_layout_of_the_sum():
    torch.manual_seed(0)
    model, x, strides = Summed(), torch.randn(4, 5, 8, requires_grad=True), []
    planned = planned_quietly(model, x, budget=1 << 30, opaque=["core"])
    [entered] = [n for n in planned.step.joint.graph.nodes if n.target is torch.ops.aten.tanh_backward.default]
    h = torch.tanh(model.inner(x))
    h.register_hook(lambda grad: strides.append(grad.stride()))
    (model.core(h)[0] + model.conv(h.transpose(1, 2).contiguous()).transpose(1, 2)).sum().backward()
    assert entered.args[0].meta["val"].stride() == strides[0] != (40, 8, 1)


class Told(nn.Module):
    """An LSTM that writes into what it is given beside its input, from its second call on where `late`."""

    def __init__(self, write: str, late: bool) -> None:
        super().__init__()
        self.core, self.write, self.late, self.calls = (
            nn.LSTM(8, 8, batch_first=True),
            compile(write, "<write>", "exec"),
            late,
            0,
        )

    def forward(self, x: torch.Tensor, given: object) -> torch.Tensor:
        h = self.core(x)[0]
        if not self.late:
            exec(self.write, globals(), {"given": given, "h": h})
        return h


class Telling(nn.Module):
    def __init__(self, make: str, write: str, late: bool = False) -> None:
        super().__init__()
        self.layer, self.told, self.make, self.kept = nn.Linear(8, 8), Told(write, late), compile(make, "<make>", "eval"), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = eval(self.make, globals(), {"self": self, "x": x})
        return (self.told(torch.tanh(self.layer(x)), given) * max(len(given), 1)).square().mean()


RUN_AS_IT_IS = {"opaque": ["told"], "costs": "estimate", "progress": False}
GIVEN = {
    "number into a new dictionary": ("{}", "given['n'] = float(h.detach().mean())"),
    "tensor into a new dictionary": ("{}", "given['n'] = h.mean()"),
    "tensor replaced": ("{'x': x}", "given['x'] = h"),
    "number into a list": ("[x]", "given.append(2)"),
    "into a list in a dictionary": ("{'l': []}", "given['l'].append(2)"),
    "taken out": ("{'n': 1, 'k': 2}", "given.pop('n')"),
    "into a dictionary of the model": ("self.kept", "given['n'] = 1"),
}


@pytest.mark.parametrize(("make", "write"), GIVEN.values(), ids=GIVEN.keys())
def test_what_it_writes_into_its_arguments_is_refused(make: str, write: str) -> None:
    with pytest.raises(CaptureError, match="told runs as it is, but writes into a list or dictionary that it is given"):
        plan(Telling(make, write), 1.0, (torch.randn(2, 4, 8),), **RUN_AS_IT_IS, check=False)


def test_what_it_writes_into_its_arguments_later_is_an_error() -> None:
    model, x = Telling("[x]", "given.append(2)", late=True), torch.randn(2, 4, 8)
    planned = plan(model, 1.0, (x,), **RUN_AS_IT_IS, audit=False)
    planned(x).backward()
    assert planned.num_planned_calls == 1
    model.told.late = False
    with pytest.raises(OpaqueModuleError, match="writes into a list or dictionary"):
        planned(x)
