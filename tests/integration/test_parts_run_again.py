"""A submodule that runs as it is, and again in the backward: it finds the Python state that it found, or that is an error."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from planner import BackwardError, plan

SETTINGS = {"k": 2.0}
HOOKS: list[Any] = []


class Shifting(nn.Module):
    """What a class holds."""

    shift = 2.0

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class Configured(Shifting):
    """Reads state in several places, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 48), nn.Linear(48, 16), nn.Dropout(0.3)
        self.factor, self.items, self.record = 2.0, [2.0], types.SimpleNamespace(k=2.0, t=torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.factor * self.items[0] * self.record.k * self.record.t * SETTINGS["k"]
        return self.down(self.drop(torch.relu(self.shifted(self.up(x) * factor))))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.parts, self.last = nn.Linear(16, 16), nn.ModuleList(Configured() for _ in range(4)), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        for part in self.parts:
            h = torch.tanh(part(h))
        return self.last(h).square().mean()


CHANGED = {
    "mode": "model.eval()",
    "attribute": "part.factor = 3.0",
    "item": "part.items[0] = 3.0",
    "of an object": "part.record.k = 3.0",
    "tensor": "part.record.t.mul_(2)",
    "another tensor": "part.record.t = torch.zeros(1)",
    "of a submodule": "part.drop.p = 0.6",
    "method": "part.drop.forward = lambda x: x",
    "hook": "part.up.register_forward_hook(lambda module, args, out: out * 2)",
    "new attribute": "part.unread = 1",
    "of a class": "Shifting.shift = 3.0",
    "method of a class": "Shifting.shifted = lambda self, x: x * 3",
    "hook for all modules": "HOOKS.append(nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2))",
    "global variable": "SETTINGS['k'] = 3.0",
}


@pytest.fixture
def settings_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Changes of global variables, classes and hooks are taken back."""
    monkeypatch.setitem(SETTINGS, "k", 2.0)
    monkeypatch.setattr(Shifting, "shift", Shifting.shift)
    monkeypatch.setattr(Shifting, "shifted", Shifting.shifted)
    yield
    while HOOKS:
        HOOKS.pop().remove()


def trained_late(module: nn.Module, model: Parts, change: str) -> list[torch.Tensor]:
    """Gradients, where the change comes between the forward and the backward."""
    torch.manual_seed(3)
    loss = module(torch.linspace(-1, 1, 256 * 128).reshape(256, 8, 16))
    for part in model.parts:
        exec(change, globals(), {"part": part, "model": model})
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.one_in(6)
@pytest.mark.usefixtures("settings_as_before")
@pytest.mark.parametrize("change", ["", *CHANGED.values()], ids=["nothing", *CHANGED])
def test_a_part_that_runs_again_finds_what_it_found(change: str) -> None:
    torch.manual_seed(0)
    model, x = Parts(), torch.randn(256, 8, 16)
    twin, opaque = copy.deepcopy(model), [f"parts.{i}" for i in range(4)]
    planned = plan(model, 0.7, (x,), costs="estimate", progress=False, check=False, opaque=opaque, effort=0.3)
    schedule, ops = planned.plan.solution.schedule, planned.plan.graph.ops
    assert any(ops[schedule.steps[t]].name.startswith("opaque_forward") for t in schedule.recomputes())
    if change:
        with pytest.raises(BackwardError, match="changed between the forward and its backward"):
            trained_late(planned, model, change)
    else:
        assert all(map(torch.equal, trained_late(planned, model, change), trained_late(twin, twin, change)))
    assert planned.num_planned_calls == 1
