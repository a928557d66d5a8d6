"""Units around submodules that the step differentiates in ways of its own, runs again, or runs without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils.checkpoint import checkpoint

from planner import plan_units
from tests.support.training import assert_same

Way = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def twice_by_grad(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = block(x)
    return y + torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


def by_jacobian(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.autograd.functional.jacobian(lambda z: block(z).sum(0), x[:4], create_graph=True).sum()


def by_jacobian_at_once(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) + torch.autograd.functional.jacobian(lambda z: block(z).sum(0), x.detach()[:4], vectorize=True).sum()


def by_hvp(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) + torch.autograd.functional.hvp(lambda z: block(z).square().sum(), x.detach(), torch.ones_like(x))[1]


def forward_mode(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x.detach(), torch.ones_like(x))))
    return block(x) + primal.detach() * tangent.detach()


def checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, x, use_reentrant=False)


def checkpointed_reentrant(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, x, use_reentrant=True)


def in_inference_mode(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        scale = float(block(x).sum())
    return block(x) * scale


class Net(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(3))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.way(self.blocks[1], self.blocks[0](x))).square().sum()


LEFT: dict[Way, str] = {
    twice_by_grad: "backward more than once",
    by_jacobian: "create_graph=True",
    by_jacobian_at_once: "is_grads_batched=True",
    by_hvp: "create_graph=True",
    forward_mode: "forward-mode",
    checkpointed: "torch.utils.checkpoint",
    checkpointed_reentrant: "torch.utils.checkpoint",
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
@pytest.mark.parametrize("way", [*LEFT, in_inference_mode], ids=lambda way: way.__name__)
def test_units_are_planned_around_it(way: Way) -> None:
    torch.manual_seed(0)
    model, eager, x = Net(way), Net(way), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, "4MiB", (x,), progress=False)
    if way in LEFT:
        assert "blocks.2" in units.planned and not any(name.startswith("blocks.1") for name in units.planned)
        assert all(LEFT[way] in units.left[f"blocks.1.{i}"] for i in (0, 2))
    else:
        assert sorted(units.planned) == ["blocks.0", "blocks.1", "blocks.2"]
    for _ in range(2):
        model(x).backward()
        eager(x).backward()
    trained = [name for name, p in eager.named_parameters() if p.grad is not None]
    assert trained == [name for name, p in model.named_parameters() if p.grad is not None]
    assert_same(*([run.get_parameter(name).grad for name in trained] for run in (eager, model)))
