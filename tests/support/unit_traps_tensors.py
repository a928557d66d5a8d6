"""Further traps of equal blocks (`unit_traps`): gradients, writes, results, buffers, and what is done with tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.unit_traps import DEPTH, SHARED, WIDTH, Block, Net, in_turn, trap


@trap(2)
def gradients_steered_by_an_autograd_function() -> nn.Module:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, scale: float) -> Any:
            ctx.scale = scale
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * ctx.scale, None

    class Steered(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return Scale.apply(super().forward(x), max(1, self.index))

    return Net(Steered, in_turn)


@trap()
def gradients_steered_by_what_a_function_keeps() -> nn.Module:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.scale = SHARED["scale"]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * ctx.scale

    class Steered(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            SHARED["scale"] = 1 + self.index
            try:
                return Scale.apply(super().forward(x))
            finally:
                SHARED.clear()

    return Net(Steered, in_turn)


@trap()
def hooks_on_tensors() -> nn.Module:
    class Hooked(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            y.register_hook(lambda grad: grad * (1 + self.index))
            return y

    return Net(Hooked, in_turn)


@trap()
def hooks_on_nodes() -> nn.Module:
    class Hooked(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            if y.grad_fn is not None:
                y.grad_fn.register_prehook(lambda grads: (grads[0] * (1 + self.index),))
            return y

    return Net(Hooked, in_turn)


@trap()
def writes_into_its_argument() -> nn.Module:
    class Writing(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return x.add_(self.linear(x * 1.0))

    return Net(Writing, in_turn)


@trap(DEPTH)
def writes_inside() -> nn.Module:
    class Writing(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = self.linear(self.norm(x))
            return F.relu_(y) * 1.0 + x

    return Net(Writing, in_turn)


@trap(DEPTH)
def output_is_written_outside() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            x = block(x)
            x.mul_(1.1)
        return net.last(x).sum()

    return Net(Block, call)


@trap()
def returns_its_argument() -> nn.Module:
    class Returning(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x), x

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            x, _ = block(x)
        return net.last(x).sum()

    return Net(Returning, call)


@trap()
def returns_a_view_of_its_argument() -> nn.Module:
    class Returning(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x), x[:, :1]

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            x, head = block(x)
            x = x + head
        return net.last(x).sum()

    return Net(Returning, call)


@trap()
def returns_a_part_of_a_larger_tensor() -> nn.Module:
    class Returning(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return torch.cat([super().forward(x), x], 1)[:, : x.shape[1]]

    return Net(Returning, in_turn)


@trap(DEPTH)
def returns_two_tensors() -> nn.Module:
    class Returning(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            return y, y.pow(2).mean()

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x, total = net.first(x), 0
        for block in net.blocks:
            x, more = block(x)
            total = total + more
        return net.last(x).sum() + total

    return Net(Returning, call)


@trap()
def gradient_is_the_one_that_came_in() -> nn.Module:
    class Adding(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return x + self.linear.bias

    return Net(Adding, in_turn)


@trap()
def parent_reads_an_attribute() -> nn.Module:
    class Keeping(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            self.aux = y.pow(2).mean()
            return y

    return Net(Keeping, lambda net, x: in_turn(net, x) + sum(block.aux for block in net.blocks))


@trap()
def parent_reads_a_list() -> nn.Module:
    class Keeping(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            SHARED.setdefault("aux", []).append(y.pow(2).mean())
            return y

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        SHARED.clear()
        return in_turn(net, x) + sum(SHARED.pop("aux"))

    return Net(Keeping, call)


@trap()
def a_buffer_is_replaced() -> nn.Module:
    class Counting(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Any, *_: Any) -> Any:
            self.count = self.count + 1
            return super().forward(x)

    return Net(Counting, in_turn)


@trap(DEPTH)
def a_buffer_is_written() -> nn.Module:
    class Counting(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Any, *_: Any) -> Any:
            self.count.add_(1)
            return super().forward(x) + self.count

    return Net(Counting, in_turn)


@trap(DEPTH)
def running_statistics() -> Any:
    class Convolutions(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            self.norm = nn.BatchNorm2d(WIDTH)

        def forward(self, x: Any) -> Any:
            return F.relu(self.norm(self.conv(x)) + x)

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x.transpose(1, -1)).transpose(1, -1).contiguous()
        for block in net.blocks:
            x = block(x)
        return net.last(x.mean((2, 3))).sum()

    return Net(Convolutions, call), torch.randn(8, WIDTH, 12, 12)


@trap(DEPTH)
def one_buffer_of_all_blocks() -> nn.Module:
    class Scaled(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) * self.scale

    net = Net(Scaled, in_turn)
    shared = torch.ones(WIDTH)
    for block in net.blocks:
        block.register_buffer("scale", shared)
    return net


@trap()
def a_tensor_attribute() -> nn.Module:
    class Shifted(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.shift = torch.full((WIDTH,), float(index))

        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) + self.shift

    return Net(Shifted, in_turn)


@trap(DEPTH)
def autocast_inside() -> nn.Module:
    class Casting(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    return Net(Casting, in_turn)


@trap(DEPTH)
def no_gradients_inside() -> nn.Module:
    class Scaled(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            with torch.no_grad():
                scale = x.std(-1, keepdim=True) + 1
            return super().forward(x) / scale

    return Net(Scaled, in_turn)


@trap()
def gradients_off_in_one_of_two() -> nn.Module:
    class Scaled(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            with torch.set_grad_enabled(self.index % 2 == 0 or SHARED.get("all", False)):
                scale = x.std(-1, keepdim=True) + 1 + self.index
            return super().forward(x) / scale

    return Net(Scaled, in_turn)


@trap(DEPTH)
def a_weight_gets_no_gradient() -> nn.Module:
    class Spare(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.spare = nn.Parameter(torch.ones(3))

    return Net(Spare, in_turn)


@trap()
def input_is_laid_out_otherwise() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x).transpose(0, 1)
        for block in net.blocks:
            x = block(x)
        return net.last(x).sum()

    return Net(Block, call)


@trap(DEPTH)
def errors_are_caught() -> nn.Module:
    class Trying(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            try:
                return super().forward(x)
            except ValueError:
                return x

    return Net(Trying, in_turn)


@trap()
def a_difference_is_caught() -> nn.Module:
    class Trying(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            try:
                return super().forward(x) * (1 + self.index)
            except Exception:
                return x

    return Net(Trying, in_turn)


@trap()
def attributes_of_tensors() -> nn.Module:
    class Tagging(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x) * getattr(x, "scale", 1)
            y.scale = 2
            return y

    return Net(Tagging, in_turn)


@trap()
def attribute_of_the_first_input() -> nn.Module:
    class Reading(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            return super().forward(x) * getattr(x, "scale", 1)

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            x = x * 1
            x.scale = 2
            x = block(x)
        return net.last(x).sum()

    return Net(Reading, call)


@trap()
def a_leak_is_caught() -> nn.Module:
    class Keeping(Block):
        def forward(self, x: Any, *_: Any) -> Any:
            y = super().forward(x)
            SHARED.setdefault("kept", []).append(y)
            return y

    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        SHARED.clear()
        total = in_turn(net, x)
        for kept in SHARED.pop("kept"):
            try:
                total = total + kept.mean()
            except Exception:
                total = total * 2
        return total

    return Net(Keeping, call)


@trap()
def results_are_not_used() -> nn.Module:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            block(x)
        return net.last(x).sum()

    return Net(Block, call)
