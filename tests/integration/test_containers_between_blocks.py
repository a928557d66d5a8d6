"""Equal blocks that are given lists and dictionaries: what they write there, or hand on, is what eager has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import plan, plan_units
from tests.support.training import assert_same

Body = Callable[["Block", Any, Any], Any]


class Block(nn.Module):
    def __init__(self, body: Body, shared: list[Any]) -> None:
        super().__init__()
        self.first, self.second, self.body, self.shared = nn.Linear(16, 32), nn.Linear(32, 16), body, shared

    def forward(self, x: Any, given: Any = None) -> Any:
        return self.body(self, x, given)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(x)))


def appends(block: Block, x: torch.Tensor, given: list[Any]) -> torch.Tensor:
    y = block.mixed(x)
    given.append(y.mean())
    return y


def appends_to_one_in_a_tuple(block: Block, x: torch.Tensor, given: tuple[list[Any], int]) -> torch.Tensor:
    return appends(block, x, given[0])


def sets_an_item(block: Block, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    y = block.mixed(x)
    given["aux"] = given["aux"] + y.mean()
    return y


def counts(block: Block, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    given["n"] += 1
    return block.mixed(x)


def counts_and_reads(block: Block, x: torch.Tensor, given: list[int]) -> torch.Tensor:
    given[0] += 1
    return block.mixed(x) * given[0]


def pops(block: Block, x: torch.Tensor, given: list[float]) -> torch.Tensor:
    return block.mixed(x) * given.pop()


def swaps(block: Block, x: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
    given[0], given[1] = given[1], given[0]
    return block.mixed(x) + given[0].mean()


def hands_on(block: Block, x: torch.Tensor, given: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    return block.mixed(x), given


def hands_out_its_own(block: Block, x: torch.Tensor, given: Any) -> tuple[torch.Tensor, list[Any]]:
    return block.mixed(x), block.shared


def writes_its_result(block: Block, x: dict[str, Any], given: Any) -> None:
    x["h"] = block.mixed(x["h"])
    x.setdefault("means", []).append(x["h"].mean())


def drops_its_input(block: Block, x: list[torch.Tensor], given: Any) -> torch.Tensor:
    return block.mixed(x.pop())


class Case(NamedTuple):
    """`run`: the blocks on a hidden state; a result, and a scalar beside it."""

    body: Body
    run: Callable[[nn.ModuleList, torch.Tensor], tuple[torch.Tensor, Any]]


def _each(
    given: Any, found: Callable[[Any], Any], **kwargs: Any
) -> Callable[[nn.ModuleList, torch.Tensor], tuple[torch.Tensor, Any]]:
    def run(blocks: nn.ModuleList, h: torch.Tensor) -> tuple[torch.Tensor, Any]:
        own = given(h)
        for block in blocks:
            h = block(h, given=own) if kwargs else block(h, own)
        return h, found(own)

    return run


def _handed(blocks: nn.ModuleList, h: torch.Tensor) -> tuple[torch.Tensor, Any]:
    own: list[Any] = []
    for block in blocks:
        h, same = block(h, own)
        same.append(h.mean())
    shared = [*own, *blocks[0].shared]
    blocks[0].shared.clear()
    return h, sum(shared)


def _in_a_dictionary(blocks: nn.ModuleList, h: torch.Tensor) -> tuple[torch.Tensor, Any]:
    state = {"h": h}
    for block in blocks:
        block(state)
    return state["h"], sum(state["means"])


def _in_a_list(blocks: nn.ModuleList, h: torch.Tensor) -> tuple[torch.Tensor, Any]:
    waiting = [h.mean().expand(16), h]
    for block in blocks:
        waiting.append(block(waiting))
    return waiting[-1], waiting[0].sum() * len(waiting)


CASES = {
    "appends": Case(appends, _each(lambda h: [], sum)),
    "appends to a keyword argument": Case(appends, _each(lambda h: [], sum, by_name=True)),
    "appends to one in a tuple": Case(appends_to_one_in_a_tuple, _each(lambda h: ([], 1), lambda own: sum(own[0]))),
    "sets an item": Case(sets_an_item, _each(lambda h: {"aux": 0.0}, lambda own: own["aux"])),
    "counts": Case(counts, _each(lambda h: {"n": 0}, lambda own: own["n"])),
    "counts and reads": Case(counts_and_reads, _each(lambda h: [0], sum)),
    "pops": Case(pops, _each(lambda h: [0.5, 1.0, 2.0], sum)),
    "swaps": Case(swaps, _each(lambda h: [h.mean(), h.std()], lambda own: own[0] + 2 * own[1])),
    "hands on": Case(hands_on, _handed),
    "hands out its own": Case(hands_out_its_own, _handed),
    "writes its result": Case(writes_its_result, _in_a_dictionary),
    "drops its input": Case(drops_its_input, _in_a_list),
}


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        shared: list[Any] = []
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 1)
        self.blocks = nn.ModuleList(Block(case.body, shared) for _ in range(3))
        self.run = case.run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, beside = self.run(self.blocks, self.first(x))
        return (self.last(h) * (1 + beside)).sum()


def train(model: nn.Module, x: torch.Tensor, eager: nn.Module) -> None:
    """Three steps of both; equal losses and weights."""
    steps = [torch.optim.SGD(one.parameters(), 1e-3) for one in (eager, model)]
    for _ in range(3):
        losses = [one(x) for one in (eager, model)]
        assert_same([losses[0]], [losses[1]])
        for loss, step in zip(losses, steps, strict=True):
            loss.backward()
            step.step()
            step.zero_grad()
        assert_same([*eager.parameters()], [*model.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_a_plan_has_what_each_block_writes(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(CASES[name]), torch.randn(64, 8)
    eager = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), costs="estimate", check=False, audit=False, progress=False)
    train(planned, x, eager)
    assert planned.stats().unplanned == 0


@pytest.mark.parametrize("name", CASES)
def test_units_see_and_write_the_containers_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(CASES[name]), torch.randn(64, 8)
    eager = copy.deepcopy(model)
    units = plan_units(model, 1.0, (x,), costs="estimate", progress=False)
    assert any(planned.startswith("blocks.1") for planned in units.planned)
    train(model, x, eager)
    assert not any(unit.num_unplanned_calls for unit in units.planned.values())
