"""Small hand-written models: the architectures here, the traps of training code in the second file."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.support.models import Attention, Built, Residual, Wrapped
from tests.support.zoo import hand_written_extra
from tests.support.zoo.hand_written_extra import Labelled

# Convolutions


class UNet(nn.Module):
    """Two levels with batch norm, Dropout2d at the bottom, concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.block(3, 8), self.block(8, 16), self.block(16, 32)
        self.up2, self.up1, self.head = self.block(48, 16), self.block(24, 8), nn.Conv2d(8, 2, 1)
        self.drop = nn.Dropout2d(0.3)

    @staticmethod
    def block(given: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(given, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.drop(self.bottom(F.max_pool2d(b, 2)))
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2), b], 1))
        return self.head(self.up1(torch.cat([F.interpolate(b, scale_factor=2), a], 1)))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, layers: int, growth: int) -> None:
        super().__init__()
        widths = [4 + growth * i for i in range(layers + 1)]
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(widths.pop(), 10)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1), nn.Dropout(0.1)) for w in widths
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class Mixer(nn.Module):
    """One block of an MLP mixer: across tokens, then across channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.along = self.mlp(tokens), self.mlp(width)

    @staticmethod
    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class InvertedResidual(nn.Module):
    """MobileNet's block: expand, depthwise, squeeze and excite, project."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1))
        self.project = nn.Conv2d(wide, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * F.hardsigmoid(self.squeeze(y)))


class HyperConv(nn.Module):
    """A convolution whose weights a small network computes from a code."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(8))
        self.make = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8 * 8 * 9))
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.make(self.code).view(8, 8, 3, 3) / 8
        return self.head(F.conv2d(self.stem(x).relu(), weight, padding=1).relu())


def resnet() -> Built:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8), Residual(8), nn.AvgPool2d(2), Residual(8))
    return Wrapped(body), (torch.randn(4, 3, 16, 16),), {}


def channels_last() -> Built:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8), nn.MaxPool2d(2), Residual(8))
    image = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    return Wrapped(body.to(memory_format=torch.channels_last)), (image,), {}


def mobilenet() -> Built:
    return (
        Wrapped(nn.Sequential(nn.Conv2d(3, 8, 3), InvertedResidual(8), InvertedResidual(8))),
        (torch.randn(2, 3, 16, 16),),
        {},
    )


def convnet3d() -> Built:
    layers = [
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 8, 3),
        nn.Dropout3d(0.2),
    ]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(2, 1, 12, 12, 12),), {}


def conv1d_dilated() -> Built:
    layers = [part for d in (1, 2, 4) for part in (nn.Conv1d(8, 8, 3, padding=d, dilation=d), nn.BatchNorm1d(8), nn.Tanh())]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(4, 8, 128),), {}


def group_norm() -> Built:
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(8, 8), nn.SiLU()]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(4, 3, 20, 20),), {}


def instance_norm() -> Built:
    norms = nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8, track_running_stats=True), nn.LocalResponseNorm(3)
    layers = [nn.Conv2d(3, 8, 3), norms[0], nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), norms[1], nn.ReLU(), norms[2]]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(4, 3, 20, 20),), {}


def upsample_pixel_shuffle() -> Built:
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        up,
        nn.Conv2d(8, 12, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Conv2d(3, 3, 1),
    ]
    return Wrapped(nn.Sequential(*layers)), (torch.randn(2, 3, 12, 12),), {}


def conv_transpose_padding() -> Built:
    first = [nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 3, dilation=2), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)]
    second = [nn.ELU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), nn.ReplicationPad2d(1), nn.Conv2d(4, 3, 3)]
    return Wrapped(nn.Sequential(*first, *second)), (torch.randn(2, 3, 12, 12),), {}


def adaptive_pool() -> Built:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(7),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
    ]
    return Labelled(nn.Sequential(*layers, nn.Linear(48, 5))), (torch.randn(4, 3, 20, 20),), {"labels": torch.randint(5, (4,))}


# Graphs


class Messages(nn.Module):
    """Two rounds of message passing over an edge list; `how` names the way that messages are summed up at their targets."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.rounds = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> dict[str, torch.Tensor]:
        source, target = edges
        for linear in self.rounds:
            messages = linear(torch.cat([nodes.index_select(0, source), nodes[target]], -1)).relu()
            where = target[:, None].expand_as(messages)
            zeros = messages.new_zeros(nodes.shape)
            if self.how == "index_add":
                pooled = zeros.index_add(0, target, messages)
            elif self.how == "scatter_add":
                pooled = zeros.scatter_add_(0, where, messages)
            else:
                pooled = zeros.scatter_reduce(0, where, messages, self.how, include_self=False)
            nodes = nodes + pooled
        return {"loss": nodes.square().mean(), "nodes": nodes}


def gnn(how: str) -> Callable[[], Built]:
    return lambda: (Messages(16, how), (torch.randn(64, 16), torch.randint(64, (2, 400))), {})


# Recurrent


class Recurrent(nn.Module):
    """A recurrent layer and a head that reads every step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


class LstmCells(nn.Module):
    """nn.LSTMCell unrolled in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, outputs = (x.new_zeros(len(x), 16), x.new_zeros(len(x), 16)), []
        for now in x.unbind(1):
            state = self.cell(now, state)
            outputs.append(state[0])
        return self.head(torch.stack(outputs, 1))


class GruCells(nn.Module):
    """nn.GRUCell decoding its own outputs, nn.RNNCell behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.second = nn.GRUCell(8, 16), nn.RNNCell(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, y, outputs = None, x, []
        for _ in range(6):
            h = self.cell(y, h)
            y = self.second(h, y)
            outputs.append(y)
        return torch.stack(outputs, 1)


class Packed(nn.Module):
    """An LSTM over a packed batch of sequences of unequal lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        out = self.head(out)
        return {"loss": out.square().mean(), "out": out}


class Scan(nn.Module):
    """A selective state space layer (Mamba's idea) as a plain loop over time."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(-torch.rand(width, states))
        self.parts, self.out = nn.Linear(width, 2 * states + width), nn.Linear(width, width)
        self.split = [states, states, width]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, dt = self.parts(x).split(self.split, -1)
        dt = F.softplus(dt)[..., None]
        keep, put = (dt * self.decay).exp(), dt * b[:, :, None] * x[..., None]
        h, outputs = torch.zeros_like(put[:, 0]), []
        for t in range(x.shape[1]):
            h = keep[:, t] * h + put[:, t]
            outputs.append((h * c[:, t, None]).sum(-1))
        return x + self.out(torch.stack(outputs, 1))


def lstm_bidirectional_dropout() -> Built:
    layer = nn.LSTM(8, 16, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
    return Wrapped(Recurrent(layer)), (torch.randn(4, 16, 8),), {}


# Attention


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with dropout, a key padding mask and its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        out = self.norm(x + out)
        return {"loss": out.masked_fill(padding[..., None], 0).square().mean(), "weights": weights}


class Seq2Seq(nn.Module):
    """nn.Transformer with a causal target mask, teacher forcing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body, self.head = nn.Transformer(16, 2, 1, 1, 32, dropout=0.1, batch_first=True), nn.Linear(16, 20)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1] - 1)
        logits = self.head(self.body(self.embed(source), self.embed(target[:, :-1]), tgt_mask=mask, tgt_is_causal=True))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()), "logits": logits}


class Decoder(nn.Module):
    """Causal scaled_dot_product_attention without dropout, rotary positions, grouped keys, RMS norm and a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, head = heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * head), nn.Linear(width, width)
        self.gate, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        angles = torch.arange(64.0)[:, None] / 100 ** (torch.arange(0, head, 2) / head)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        k, v = self.kv(y)[:, None].chunk(2, -1)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (self.turn(k), v))
        mixed = F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        up, gate = self.gate(self.norm2(x)).chunk(2, -1)
        return x + self.down(up * F.silu(gate))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, two blocks with dropout, a head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 10)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 26, 16))
        self.blocks = nn.Sequential(Attention(16, 4, 0.1), Attention(16, 4, 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions)[:, 0])


def multi_head_attention() -> Built:
    padding = torch.arange(24) >= torch.tensor([24, 20, 11, 5])[:, None]
    return SelfAttention(), (torch.randn(4, 24, 16), padding), {}


def transformer_encoder(norm_first: bool) -> Callable[[], Built]:
    def built() -> Built:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
        return Wrapped(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), (torch.randn(8, 16, 16),), {}

    return built


# Others


class Siamese(nn.Module):
    """One tower called twice, a triplet-like margin."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 8))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        left, right = F.normalize(self.tower(a), dim=-1), F.normalize(self.tower(b), dim=-1)
        logits = left @ right.T / 0.1
        return {"loss": F.cross_entropy(logits, torch.arange(len(a))), "left": left, "right": right}


class Experts(nn.Module):
    """Softmax gating over experts: all of them on every token, or each on its own tokens (shapes depend on data)."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense, self.gate = dense, nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        if self.dense:
            return x + (weights[..., None] * torch.stack([expert(x) for expert in self.experts], -2)).sum(-2)
        top, chosen = weights.topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = (chosen == i).nonzero(as_tuple=True)
            out.index_add_(0, token, (expert(x[token]) * top[token, slot, None]).to(out.dtype))
        return x + out


class Fourier(nn.Module):
    """A layer of a Fourier neural operator: rfft, a complex parameter on the low modes, irfft."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)
        self.modes, self.skip = modes, nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.fft.rfft(x)[..., : self.modes]
        mixed = torch.einsum("bim,iom->bom", low, self.weight)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x))


class Ode(nn.Module):
    """The same weights in eight Euler steps."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Sequential(nn.Linear(17, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(8):
            x = x + self.slope(torch.cat([x, torch.full_like(x[:, :1], step / 8)], -1)) / 8
        return x


class Diffusion(nn.Module):
    """A training step of a denoiser: random times and noise are drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alphas", torch.linspace(0.999, 0.01, 100))
        self.inward, self.time, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        t, noise = torch.randint(100, (len(x),), device=x.device), torch.randn_like(x)
        alpha = self.alphas[t][:, None, None, None]
        angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(8, device=x.device) / 8)
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = self.inward(alpha.sqrt() * x + (1 - alpha).sqrt() * noise)
        found = self.out(F.silu(F.group_norm(h, 4) + embedded[..., None, None]))
        return {"loss": F.mse_loss(found, noise), "found": found}


class Vae(nn.Module):
    """Reparametrised with torch.distributions; the sum of two terms is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 16), nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, log_scale = self.encoder(x).float().chunk(2, -1)
        posterior = torch.distributions.Normal(mean, log_scale.exp(), validate_args=False)
        out = self.decoder(posterior.rsample())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
        kl = torch.distributions.kl_divergence(posterior, prior).sum(-1).mean()
        return {"loss": F.mse_loss(out, x) + 0.1 * kl, "kl": kl.detach()}


class Einsums(nn.Module):
    """A tensor-train-like contraction and bilinear attention, by einsum only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 4, 8) / 4), nn.Parameter(torch.randn(8, 4, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("btd,dhk->bthk", x, self.a)
        weights = torch.einsum("bqhk,bthk->bhqt", y, y).softmax(-1)
        return torch.einsum("bhqt,bthk,kho->bqo", weights, y, self.b)


class Sorted(nn.Module):
    """Differentiable cumsum, sort, topk and gather; cummax and logsumexp on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).cumsum(1) / x.shape[1]
        ordered, order = h.sort(-1)
        top, at = (ordered * h.gather(-1, order.flip(-1))).topk(8, -1)
        return self.second(top.cummax(1).values + h.gather(-1, at)) - h.logsumexp(-1, keepdim=True)


MODELS: dict[str, Callable[[], Built]] = {
    "unet": lambda: (Wrapped(UNet()), (torch.randn(4, 3, 32, 32),), {}),
    "densenet": lambda: (Labelled(DenseNet(4, 4)), (torch.randn(4, 3, 16, 16),), {"labels": torch.randint(10, (4,))}),
    "resnet_in_place": resnet,
    "channels_last": channels_last,
    "mlp_mixer": lambda: (Wrapped(nn.Sequential(Mixer(16, 24), Mixer(16, 24))), (torch.randn(8, 16, 24),), {}),
    "mobilenet": mobilenet,
    "convnet3d": convnet3d,
    "conv1d_dilated": conv1d_dilated,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "upsample_pixel_shuffle": upsample_pixel_shuffle,
    "conv_transpose_padding": conv_transpose_padding,
    "adaptive_pool": adaptive_pool,
    "hypernetwork": lambda: (Wrapped(HyperConv()), (torch.randn(4, 3, 16, 16),), {}),
    "lstm": lambda: (Wrapped(Recurrent(nn.LSTM(8, 16, batch_first=True))), (torch.randn(8, 24, 8),), {}),
    "gru": lambda: (Wrapped(Recurrent(nn.GRU(8, 16, num_layers=2))), (torch.randn(24, 8, 8),), {}),
    "lstm_bidirectional_dropout": lstm_bidirectional_dropout,
    "lstm_packed": lambda: (Packed(), (torch.randn(6, 16, 8), torch.tensor([16, 3, 9, 12, 1, 7])), {}),
    "lstm_cell_loop": lambda: (Wrapped(LstmCells()), (torch.randn(16, 8, 8),), {}),
    "gru_cell_loop": lambda: (Wrapped(GruCells()), (torch.randn(32, 8),), {}),
    "state_space_scan": lambda: (Wrapped(Scan(8, 4)), (torch.randn(8, 12, 8),), {}),
    "multi_head_attention": multi_head_attention,
    "transformer_full": lambda: (Seq2Seq(), (torch.randint(20, (8, 12)), torch.randint(20, (8, 13))), {}),
    "sdpa_causal": lambda: (Wrapped(nn.Sequential(Decoder(16, 4), Decoder(16, 4))), (torch.randn(4, 32, 16),), {}),
    "vision_transformer": lambda: (
        Labelled(VisionTransformer()),
        (torch.randn(8, 3, 20, 20),),
        {"labels": torch.randint(10, (8,))},
    ),
    "siamese": lambda: (Siamese(), (torch.randn(64, 16), torch.randn(64, 16)), {}),
    "moe_dense": lambda: (Wrapped(Experts(dense=True)), (torch.randn(96, 16),), {}),
    "moe_loop": lambda: (Wrapped(Experts(dense=False)), (torch.randn(96, 16),), {}),
    "complex_dtype": lambda: (Wrapped(nn.Sequential(Fourier(8, 12), Fourier(8, 12))), (torch.randn(8, 8, 64),), {}),
    "neural_ode": lambda: (Wrapped(Ode()), (torch.randn(64, 16),), {}),
    "diffusion": lambda: (Diffusion(), (torch.randn(4, 3, 16, 16),), {}),
    "vae": lambda: (Vae(), (torch.randn(128, 32),), {}),
    "einsum_net": lambda: (Wrapped(nn.Sequential(Einsums(), Einsums())), (torch.randn(4, 24, 16),), {}),
    "cumsum_sort_topk": lambda: (Wrapped(Sorted()), (torch.randn(16, 16, 16),), {}),
    "gnn_index_add": gnn("index_add"),
    "gnn_scatter_add": gnn("scatter_add"),
    "gnn_scatter_reduce_mean": gnn("mean"),
    "gnn_scatter_reduce_amax": gnn("amax"),
    "transformer_encoder_post_norm": transformer_encoder(norm_first=False),
    "transformer_encoder_pre_norm": transformer_encoder(norm_first=True),
    **hand_written_extra.MODELS,
}
