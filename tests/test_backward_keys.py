"""Gradients of outputs in every layout, and through some of the outputs: bit-equal to eager, within the budget."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import plan
from tests.training import assert_same


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, ids):
        return self.head(F.gelu(self.inner(self.embed(ids))))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


class Normalized(Convolution):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(super().forward(x))


class Broadcast(nn.Module):
    """Additions and products whose gradients are sums over broadcast dimensions."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.bias, self.scale = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.randn(5, 1, 12))

    def forward(self, x):
        return torch.tanh(self.inner(x)) * self.scale + self.bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


class Dropped(nn.Module):
    """Deep enough to be recomputed, with random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(F.gelu(layer(x))), 0.3, self.training)
        return x


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(F.gelu(layer(x)))
        return x


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 10)), lambda: torch.randn(9, 16)),
    "language model": (LanguageModel, lambda: torch.randint(0, 50, (4, 6))),
    "convolution": (Convolution, lambda: torch.randn(2, 3, 8, 10)),
    "batch norm": (Normalized, lambda: torch.randn(3, 3, 6, 8)),
    "broadcast": (Broadcast, lambda: torch.randn(5, 7, 12)),
    "attention": (Attention, lambda: torch.randn(2, 6, 16)),
    "dropout": (Dropped, lambda: torch.randn(4, 8, 16)),
    "mlp": (Mlp, lambda: torch.randn(6, 8, 16)),
}
RECOMPUTED = {"dropout": 0.7, "mlp": 0.7}


def permuted(weights, order):
    """`weights` in another order of dimensions in memory."""
    back = [order.index(i) for i in range(len(order))]
    return weights.permute(order).contiguous().permute(back)


def dense(out, memory_format=torch.contiguous_format):
    return torch.linspace(-1, 1, out.numel()).reshape(out.shape).contiguous(memory_format=memory_format)


LAYOUTS = {
    "contiguous": dense,
    "expanded by sum": lambda out: torch.tensor(0.5).expand(out.shape),
    "mean over one dimension": lambda out: (dense(out).select(1, 0) / out.shape[1]).unsqueeze(1).expand(out.shape),
    "broadcast along the first": lambda out: dense(out)[:1].expand(out.shape),
    "broadcast along the last": lambda out: dense(out)[..., :1].expand(out.shape),
    "transposed": lambda out: permuted(dense(out), [*range(out.dim() - 2), out.dim() - 1, out.dim() - 2]),
    "permuted": lambda out: permuted(dense(out), [*range(1, out.dim()), 0]),
    "channels last": lambda out: permuted(dense(out), [0, *range(2, out.dim()), 1]),
    "sliced": lambda out: dense(torch.cat([out, out], -1))[..., : out.shape[-1]],
    "strided": lambda out: dense(torch.cat([out, out], -1))[..., ::2],
}


def planned_and_twin(name, **options):
    torch.manual_seed(0)
    build, make = MODELS[name]
    model, x = build(), make()
    twin = copy.deepcopy(model)
    module = plan(model, RECOMPUTED.get(name, 1.0), (x,), costs="estimate", progress=False, time_limit_s=2.0, **options)
    return module, twin, x


def step(module, args, backward, seed=3):
    """Everything that a step leaves behind."""
    module.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = module(*args)
        backward(out)
        state = torch.get_rng_state()
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [*(o.detach().clone() for o in outs), *grads, *(b.clone() for b in module.buffers()), state]


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_of_a_gradient_trains_as_eager_does(name):
    module, twin, x = planned_and_twin(name)
    for layout, make in LAYOUTS.items():
        backward = lambda out, make=make: out.backward(make(out))
        for _ in range(2):  # captured, then remembered
            try:
                assert_same(step(twin, (x,), backward), step(module, (x,), backward))
            except AssertionError as error:
                raise AssertionError(f"{layout}: {error}") from error
