"""Models with equal blocks that capturing them once could get wrong: by each, whether units are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Call = Callable[[Any, torch.Tensor], torch.Tensor]
WIDTH, DEPTH = 16, 4
SHARED: dict[str, Any] = {}


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.index = index

    def forward(self, x: Any, *_: Any) -> Any:
        return x + self.dropout(F.gelu(self.linear(self.norm(x))))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module], call: Call) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(block(i) for i in range(DEPTH))
        self._call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(self, x)


def in_turn(net: Any, x: torch.Tensor) -> torch.Tensor:
    """The blocks one after the other."""
    x = net.first(x)
    for block in net.blocks:
        x = block(x)
    return net.last(x).sum()


TRAPS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], tuple[int, ...]]] = {}
"""Name -> (makes a model and its input, number of units of every kind that is captured once)."""


def trap(*units: int) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Note a trap. `units`: how many units each kind has."""

    def noted(build: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> tuple[nn.Module, torch.Tensor]:
            torch.manual_seed(0)
            model, *x = built if isinstance(built := build(), tuple) else (built,)
            return model.train(), x[0] if x else torch.randn(4, 6, WIDTH)

        TRAPS[build.__name__] = made, units
        return build

    return noted


@trap(DEPTH)
def plain_blocks() -> nn.Module:
    return Net(Block, in_turn)


@trap()
def hidden_states_are_read_elsewhere() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x, hidden = net.first(x), []
        for block in net.blocks:
            hidden.append(x)
            x = block(x)
        return net.last(x).sum() + sum(h.pow(2).mean() for h in hidden)

    return Net(Block, call)


@trap(DEPTH)
def input_is_read_before_the_block() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x, total = net.first(x), 0
        for block in net.blocks:
            total = total + x.pow(2).mean()
            x = block(x)
        return net.last(x).sum() + total

    return Net(Block, call)


@trap()
def output_is_read_twice() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x, total = net.first(x), 0
        for block in net.blocks:
            y = block(x)
            x = y + 0.1
            total = total + y.mean()
        return net.last(x).sum() + total

    return Net(Block, call)


@trap(DEPTH)
def argument_of_all_blocks() -> nn.Module:
    class WithBias(Block):
        def forward(self, x: Any, bias: Any) -> Any:
            return super().forward(x) + bias * 0.5

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x, bias = net.first(x), net.last.weight.view(1, 1, WIDTH) * 2
        for block in net.blocks:
            x = block(x, bias)
        return net.last(x).sum()

    return Net(WithBias, call)


@trap(2, 2)
def half_of_the_blocks_are_frozen() -> nn.Module:
    net = Net(Block, in_turn)
    for block in net.blocks[:2]:
        block.requires_grad_(False)
    return net


@trap()
def weights_are_read_outside() -> nn.Module:
    return Net(Block, lambda net, x: in_turn(net, x) + 1e-3 * sum(b.linear.weight.pow(2).sum() for b in net.blocks))


@trap(2)
def weights_are_tied() -> nn.Module:
    net = Net(Block, in_turn)
    net.blocks[2].linear.weight = net.blocks[1].linear.weight
    return net


@trap(2)
def blocks_are_called_twice() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in (*net.blocks, net.blocks[1], net.blocks[2]):
            x = block(x)
        return net.last(x).sum()

    return Net(Block, call)


@trap()
def python_reads_a_tensor_inside() -> nn.Module:
    class Masked(Block):
        def forward(self, x: Any, mask: Any) -> Any:
            return super().forward(x) if mask.all() else x

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        mask, x = x > -100, net.first(x)
        for block in net.blocks:
            x = block(x, mask)
        return net.last(x).sum()

    return Net(Masked, call)


@trap(DEPTH)
def an_argument_is_not_used() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        mask, x = x > 0, net.first(x)
        for block in net.blocks:
            x = block(x, mask)
        return net.last(x).sum()

    return Net(Block, call)


@trap()
def tensor_through_a_closure() -> nn.Module:
    class Reading(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) + SHARED["tensor"]

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        SHARED["tensor"] = net.first(x) * 0.1
        try:
            return in_turn(net, x)
        finally:
            SHARED.clear()

    return Net(Reading, call)


@trap()
def scalar_through_a_global() -> nn.Module:
    class Reading(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) * SHARED["scale"]

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for i, block in enumerate(net.blocks):
            SHARED["scale"] = 1 + i
            x = block(x)
        SHARED.clear()
        return net.last(x).sum()

    return Net(Reading, call)


@trap()
def depth_is_counted_in_a_closure() -> nn.Module:
    depth = [0]

    class Counting(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            depth[0] += 1
            return super().forward(x) * depth[0]

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        depth[0] = 0
        return in_turn(net, x)

    return Net(Counting, call)


@trap(DEPTH)
def an_attribute_differs_that_nothing_depends_on() -> nn.Module:
    class Reading(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) if self.index >= 0 else x

    return Net(Reading, in_turn)


@trap()
def an_attribute_steers_the_scale() -> nn.Module:
    class Scaled(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) / (self.index + 1)

    return Net(Scaled, in_turn)


@trap()
def dropout_rates_differ() -> nn.Module:
    net = Net(Block, in_turn)
    for i, block in enumerate(net.blocks):
        block.dropout.p = 0.1 * (i + 1)
    return net


@trap(2, 2)
def a_scalar_argument_differs() -> nn.Module:
    class Scaled(Block):
        def forward(self, x: Any, scale: Any) -> Any:
            return super().forward(x) * scale

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for i, block in enumerate(net.blocks):
            x = block(x, 1.0 / (1 + i // 2))
        return net.last(x).sum()

    return Net(Scaled, call)


@trap(3)
def forward_is_replaced_on_one_block() -> nn.Module:
    net = Net(Block, in_turn)
    block = net.blocks[2]
    block.forward = lambda x: x * 2 + block.linear(x)
    return net
