"""Models whose root is unlike most: a container with a forward of its own, one whose parameters are scalars."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import CaptureError, plan, verify

QUICK = {"costs": "estimate", "progress": False, "effort": 1.0}


class Counted(nn.Module):
    """A search for a submodule that does not end is an error."""

    lookups = 0

    def get_submodule(self, target: str) -> nn.Module:
        self.lookups += 1
        assert self.lookups < 10_000, "the search for a submodule to leave uncaptured does not end"
        return super().get_submodule(target)


def read_as_numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() + 1)


class List(Counted, nn.ModuleList):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x) * read_as_numbers(x)


class Dict(Counted, nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self["layer"](x) * read_as_numbers(x)


class Sequential(Counted, nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * read_as_numbers(x)


CONTAINERS = {
    "list": lambda: List([nn.Linear(4, 4)]),
    "dictionary": lambda: Dict({"layer": nn.Linear(4, 4)}),
    "sequential": lambda: Sequential(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_cannot_be_captured_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="reads a tensor's memory"):
        plan(CONTAINERS[name](), 1.0, (torch.randn(2, 4),), **QUICK)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_with_a_forward_runs_uncaptured_itself_not_its_parent(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), CONTAINERS[name]())
    assert plan(model, 1.0, (torch.randn(2, 4),), **QUICK).plan.provenance.opaque == ("1",)


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * self.scale + self.shift).sin() * self.scale).mean()


@pytest.mark.parametrize("shape", [(64,), ()], ids=["vector", "scalar"])
def test_a_model_whose_parameters_are_all_scalars_is_planned_exactly(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert verify(plan(Scalars(), 1.0, (x,), **QUICK), (x,), rounds=1).exact
