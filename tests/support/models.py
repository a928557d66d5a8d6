"""Small real models for the torch side, each with an example call: every trap the rewriter must handle is in one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Wrapped(nn.Module):
    """Adds a squared-error loss, so that the output is a dict with "loss" and "out"."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        out = self.body(x)
        loss = out.square().mean() if labels is None else F.mse_loss(out, labels)
        return {"loss": loss, "out": out}


class Attention(nn.Module):
    """Self-attention with dropout on the weights (by hand) and on the output, pre-norm, residual."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = F.dropout(weights, self.p, self.training) @ v
        return x + F.dropout(self.out(mixed.transpose(1, 2).flatten(-2)), self.p, self.training)


class Residual(nn.Module):
    """Conv, batch norm, in-place ReLU, with a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + x, inplace=True)


class Skips(nn.Module):
    """A small UNet: down, up by interpolation, concatenated skips, Dropout2d."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.head, self.drop = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(7, 2, 1), nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x).relu()
        b = self.drop(self.down2(F.max_pool2d(a, 2)).relu())
        c = self.up(torch.cat([F.interpolate(b, scale_factor=2, mode="bilinear"), a], 1)).relu()
        return self.head(torch.cat([c, x], 1))


class Tied(nn.Module):
    """An embedding whose weight is the head's, a frozen layer, a buffer that is reassigned in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, tokens: torch.Tensor) -> dict[str, Any]:
        h = self.frozen(self.body(self.embed(tokens)).tanh())
        self.seen = 0.9 * self.seen + h.detach().mean((0, 1))
        logits = self.head(h * (1 + self.seen))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), "logits": logits, "step": 3}


def rows_of_data(x):
    """Gives tensors whose shape depends on the data, which no trace can follow."""
    rows = torch.nonzero(x[:, 0] > 0).flatten()
    return x.index_add(0, rows, x[rows])


class Block(nn.Module):
    """Runs `act` on its input first."""

    def __init__(self, act=lambda x: x) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.act(x)).tanh()


class Ragged(nn.Module):
    """Its own forward cannot be captured, its submodules' can."""

    def __init__(self, act=lambda x: x) -> None:
        super().__init__()
        self.first, self.second = Block(act), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(hidden[hidden[:, 0] > 0]).sum()


def mlp() -> Built:
    """Five layers with dropout, p such that the fused kernel is exact (.1) and such that it is not (.15)."""
    layers = [nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.15), nn.Linear(16, 4)]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(6, 8),), {"labels": torch.randn(6, 4)}


def attention() -> Built:
    """Two attention blocks with dropout."""
    return Wrapped(nn.Sequential(Attention(8, 2, 0.1), Attention(8, 2, 0.3))), (torch.randn(2, 5, 8),), {}


def convolution() -> Built:
    """Two residual blocks with batch norm in training mode."""
    return Wrapped(nn.Sequential(nn.Conv2d(3, 4, 3), Residual(4), Residual(4))), (torch.randn(2, 3, 8, 8),), {}


def skips() -> Built:
    """A small UNet."""
    return Wrapped(Skips()), (torch.randn(2, 3, 8, 8),), {}


def tied() -> Built:
    """Tied, frozen and reassigned tensors."""
    return Tied(), (torch.randint(11, (2, 6)),), {}


MODELS: dict[str, Callable[[], Built]] = {
    "mlp": mlp,
    "attention": attention,
    "convolution": convolution,
    "skips": skips,
    "tied": tied,
}


def build(name: str) -> Built:
    """A seeded model in training mode with its call; the caller's RNG is untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args, kwargs = MODELS[name]()
    return model.train(), args, kwargs


def tanh_blocks(num: int = 4, width: int = 32) -> nn.Module:
    """Linear layers, each with a tanh, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(num)], nn.Linear(width, 1))


def rows(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of `tanh_blocks` with 16 rows for each sample."""
    return (torch.zeros(16 * batch, 32),), {}


MODEL_FILE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)]), (torch.randn(512, 64),), {}

def sized(batch=512):
    model, _, kwargs = build()
    return model, (torch.randn(batch, 64),), kwargs

def wrong():
    return 3
"""
"""A file for the command line."""
