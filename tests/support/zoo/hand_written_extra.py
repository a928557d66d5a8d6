"""Small hand-written models, second part: state, autograd, in-place writes, randomness, forms of outputs, dtypes, losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.support.models import Built, Wrapped

Builders = dict[str, Callable[[], Built]]


def mlp(given: int, wide: int, out: int, drop: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, wide), nn.GELU(), nn.Dropout(drop), nn.Linear(wide, out))


def rows(width: int = 16) -> torch.Tensor:
    return torch.randn(256, width)


class Labelled(nn.Module):
    """Adds a cross-entropy over the last axis."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


class Two(nn.Module):
    """Two small MLPs; the classes below do something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(16, 64, 32), mlp(32, 64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h


def wrapped(make: type[nn.Module]) -> Callable[[], Built]:
    """A builder for a model of rows of 16 numbers."""
    return lambda: (Wrapped(make()), (rows(),), {})


# State: parameters that are computed, shared, frozen or unused; buffers that change


class EmaBuffer(Two):
    """A buffer that follows the batch mean in place, as in VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.lerp_(h.mean(0).to(self.mean.dtype), 0.1)
        return h - self.mean


class Reassigned(Two):
    """A buffer that is replaced by a new tensor, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.ones(32))
        self.register_buffer("scale", torch.full((32,), 0.5), persistent=False)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        self.largest = torch.maximum(self.largest, h.detach().abs().amax(0).float())
        return h * self.scale / self.largest


class PlainAttribute(Two):
    """Tensors that are plain attributes, neither buffers nor parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.tables = torch.tensor(2.0), [torch.randn(32), torch.randn(32)]

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale + self.tables[0] * self.tables[1]


class Counter(Two):
    """A Python number that every call changes and the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h / self.calls


class Unused(Two):
    """A parameter that no output depends on, and one whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.nil = nn.Linear(4, 4), nn.Parameter(torch.randn(32))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h + 0 * self.nil


class Shared(nn.Module):
    """Tied embedding and head, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 16), mlp(16, 32, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        return self.head(self.body(h + self.body(h)))


class Lora(nn.Module):
    """A frozen linear layer with a trained low-rank adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.drop = base.requires_grad_(False), nn.Dropout(0.1)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.b(self.a(self.drop(x)))


class Teacher(nn.Module):
    """A student and a teacher that follows it, under no_grad (BYOL, DINO)."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = mlp(16, 64, 8), mlp(16, 64, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.lerp_(new, 0.01)
            wanted = self.teacher(x)
        return {"loss": F.mse_loss(self.student(x), wanted), "wanted": wanted}


def spectral_norm() -> Built:
    layers = parametrizations.spectral_norm(nn.Linear(16, 64)), parametrizations.spectral_norm(nn.Linear(64, 8))
    return Wrapped(nn.Sequential(layers[0], nn.LeakyReLU(0.1), layers[1])), (rows(),), {}


def weight_norm() -> Built:
    layers = parametrizations.weight_norm(nn.Conv1d(4, 16, 3)), parametrizations.weight_norm(nn.Conv1d(16, 4, 3), dim=1)
    return Wrapped(nn.Sequential(layers[0], nn.Tanh(), layers[1])), (torch.randn(8, 4, 64),), {}


def batch_norm_momentum_none() -> Built:
    layers = [
        nn.Linear(16, 64),
        nn.BatchNorm1d(64, momentum=None),
        nn.ReLU(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8, affine=False),
    ]
    return Wrapped(nn.Sequential(*layers)), (rows(),), {}


def frozen_parts() -> Built:
    parts = mlp(16, 64, 32).requires_grad_(False), mlp(32, 64, 32), mlp(32, 64, 32).requires_grad_(False), mlp(32, 64, 8)
    return Wrapped(nn.Sequential(*parts)), (rows(),), {}


def frozen_batch_norm() -> Built:
    norm = nn.BatchNorm1d(64).requires_grad_(False).eval()
    return Wrapped(nn.Sequential(nn.Linear(16, 64), norm, nn.ReLU(), nn.Linear(64, 8))), (rows(),), {}


STATE: Builders = {
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
    "batch_norm_momentum_none": batch_norm_momentum_none,
    "frozen_parts": frozen_parts,
    "frozen_batch_norm": frozen_batch_norm,
    "lora": lambda: (Wrapped(nn.Sequential(Lora(nn.Linear(16, 64), 2), nn.GELU(), Lora(nn.Linear(64, 8), 2))), (rows(),), {}),
    "tied_parameters": lambda: (Labelled(Shared()), (torch.randint(50, (8, 24)),), {"labels": torch.randint(50, (8, 24))}),
    "teacher_no_grad": lambda: (Teacher(), (rows(),), {}),
    "ema_buffers": wrapped(EmaBuffer),
    "buffer_reassigned": wrapped(Reassigned),
    "plain_attribute_tensor": wrapped(PlainAttribute),
    "python_counter": wrapped(Counter),
    "unused_parameter": wrapped(Unused),
}

# Autograd: what the user does to the graph


class ClampedExp(torch.autograd.Function):
    """exp with its own backward, which saves its output and a mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        out = x.clamp(max=limit).exp()
        ctx.save_for_backward(out, x < limit)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out, inside = ctx.saved_tensors
        return (grad * out * inside).clamp(-1, 1), None


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * grad, None


class CustomFunction(Two):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return ClampedExp.apply(h, 1.0)


class Domains(Two):
    """Two heads, one behind gradient reversal."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h) + self.domain(Reverse.apply(h, 0.3))


class Checkpointed(nn.Module):
    """The user's own checkpoints around blocks with dropout."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.stem = reentrant, nn.Linear(16, 32)
        self.blocks = nn.ModuleList(mlp(32, 64, 32, drop=0.1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        return h


class VqVae(nn.Module):
    """Nearest code by embedding lookup, straight-through gradient, codebook and commitment losses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = mlp(16, 64, 4), nn.Embedding(32, 4), mlp(4, 64, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.encoder(x)
        index = torch.cdist(z.float(), self.codes.weight).argmin(-1)
        code = self.codes(index)
        out = self.decoder(z + (code - z).detach())
        loss = F.mse_loss(out, x) + F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return {"loss": loss, "index": index}


class TensorHook(Two):
    """A hook that clips the gradient of an activation."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        h.register_hook(lambda grad: grad.clamp(-1e-5, 1e-5))
        return h


class ModuleHooks(Two):
    """Forward hooks that change a layer's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
        self.first.register_forward_hook(lambda _, args, out: out + args[0].repeat(1, 2))


class Ensemble(nn.Module):
    """Four stacked linear layers under torch.func.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 32, 16) / 4), nn.Parameter(torch.zeros(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(F.linear, in_dims=(None, 0, 0))(x, self.weight, self.bias).tanh().mean(0)


class Branch(Two):
    """A host read decides what is computed."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h.tanh() if h.mean() > 0 else h.sigmoid()


AUTOGRAD: Builders = {
    "user_checkpoint": lambda: (Wrapped(Checkpointed(reentrant=False)), (rows(),), {}),
    "user_checkpoint_reentrant": lambda: (Wrapped(Checkpointed(reentrant=True)), (rows(),), {}),
    "vq_vae": lambda: (VqVae(), (rows(),), {}),
    "input_with_grad": lambda: (Wrapped(Two()), (rows().requires_grad_(),), {}),
    "custom_autograd_function": wrapped(CustomFunction),
    "gradient_reversal": wrapped(Domains),
    "tensor_hook": wrapped(TensorHook),
    "module_hooks": wrapped(ModuleHooks),
    "vmap_ensemble": wrapped(Ensemble),
    "data_dependent_branch": wrapped(Branch),
}

# In-place writes


class InPlace(Two):
    """Writes into intermediates and into views of them."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        h = h.sin()
        h[:, 0] += 1
        h.mul_(0.5).masked_fill_(h.detach() > 0.4, 0.0)
        left = h[:, :16]
        left.add_(h[:, 16:].detach())
        h[:, 4:8] = h[:, :4].clone() * 2
        return h.t().relu_().t()


class InPlaceInput(Two):
    """Scales the batch that it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.9)
        x[:, 0] = 1
        return super().forward(x)


class InPlaceLayers(Two):
    """In-place activations and dropout behind one another, and a residual added in place."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        y = F.dropout(F.silu(h), 0.1, self.training, inplace=True)
        y += h
        return F.elu(F.hardtanh(y, -2, 2, inplace=True), inplace=True)


IN_PLACE: Builders = {
    "in_place_ops": wrapped(InPlace),
    "in_place_input": wrapped(InPlaceInput),
    "in_place_layers": wrapped(InPlaceLayers),
}

# Randomness


class Noise(Two):
    """Noise that is added, a random mask, and bernoulli noise in place."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        h = h + 0.1 * torch.randn_like(h)
        h = h * (torch.rand(h.shape[0], 1, device=h.device) > 0.2)
        return h * torch.empty_like(h).bernoulli_(0.9) + torch.normal(0.0, 0.1, h.shape)


class DropPath(nn.Module):
    """Stochastic depth: each row skips each residual block at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(16, 64, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            keep = 1 - 0.1 * i
            x = x + block(x) * x.new_empty(len(x), 1).bernoulli_(keep).div_(keep)
        return x


class LayerDrop(nn.Module):
    """Whole layers skipped by Python's random module, as wav2vec 2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(16, 64, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if random.random() > 0.3:
                x = x + block(x)
        return x


class Shuffled(Two):
    """Mixup with a random permutation of the batch and a random weight."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return torch.lerp(h, h[torch.randperm(len(h))], torch.rand((), dtype=h.dtype))


class Dropouts(nn.Module):
    """Every kind of dropout, p = 0 and p = 1 included."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)
        kinds = nn.Dropout(0.2), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), nn.Dropout1d(0.2), nn.Dropout(0.0)
        self.kinds, self.all = nn.Sequential(*kinds), nn.Dropout(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.kinds(F.selu(self.first(x)))
        h = F.dropout(h, 0.5) + F.dropout(h, 0.3, training=False) + self.all(h) + F.alpha_dropout(h, 0.05, self.training)
        return self.last(F.gumbel_softmax(h, tau=2.0))


RANDOM: Builders = {
    "random_noise": lambda: (Wrapped(Noise()), (rows(),), {}),
    "dropout_zoo": lambda: (Wrapped(Dropouts()), (torch.randn(16, 24, 16),), {}),
    "drop_path": wrapped(DropPath),
    "layer_drop_python_random": wrapped(LayerDrop),
    "random_permutation": wrapped(Shuffled),
}

# Forms of calls and outputs


@dataclass
class Output:
    """As transformers' ModelOutput, but a registered dataclass."""

    loss: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="tests.support.zoo.hand_written_extra.Output")


class DataclassOutput(Two):
    def forward(self, x: torch.Tensor) -> Output:
        logits = super().forward(x)
        return Output(loss=logits.square().mean(), logits=logits)


class Nested(Two):
    """A dict of lists and tuples, with a None, a number, a string, a view of an input, and one tensor twice."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = self.first(x)
        out = self.second(h)
        return {"loss": out.square().mean(), "states": [h, (out, None)], "more": {"again": h, "x": x[:2], "n": 3, "s": "mean"}}


class KwargsOnly(Two):
    def forward(self, *, x: torch.Tensor, y: Mapping[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:
        return F.mse_loss(super().forward(x) * scale, y["target"], reduction="none").mul(y["weight"]).mean()


class TwoLosses(Two):
    """Both outputs are differentiated."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x)
        return self.second(h).square().mean(), (h.std(0) - 1).abs().mean()


class TensorOutputs(Two):
    """No loss at all: outputs of several shapes, one detached, one an alias of another, one of integers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.first(x)
        out = self.second(h)
        return out, h, out.detach(), out.view(-1), out.argmax(-1)


def bare(make: Callable[[], nn.Module]) -> Callable[[], Built]:
    """A builder for a model that makes its own loss of rows of 16 numbers."""
    return lambda: (make(), (rows(),), {})


OUTPUTS: Builders = {
    "kwargs_only": lambda: (
        KwargsOnly(),
        (),
        {"x": rows(), "y": {"target": rows(8), "weight": torch.rand(256, 1)}, "scale": 0.5},
    ),
    "dataclass_output": bare(DataclassOutput),
    "nested_output": bare(Nested),
    "several_losses": bare(TwoLosses),
    "tensor_outputs": bare(TensorOutputs),
}

# Dtypes and layers of note


class Island(Two):
    """A part in fp32 within autocast."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (h.float() @ h.float().T).softmax(-1) @ h.float()


class Bag(nn.Module):
    """Bags of tokens of unequal sizes, weighted; an ordinary embedding beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum = nn.EmbeddingBag(40, 32), nn.EmbeddingBag(40, 32, mode="sum")
        self.head = mlp(32, 64, 8)

    def forward(self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        h = self.mean(tokens, offsets) + self.sum(tokens, offsets, per_sample_weights=weights)
        return self.head(h).square().mean()


def embedding_sparse() -> Built:
    body = nn.Sequential(nn.Embedding(50, 16, sparse=True), mlp(16, 64, 50))
    return Labelled(body), (torch.randint(50, (8, 24)),), {"labels": torch.randint(50, (8, 24))}


def embedding_padding_max_norm() -> Built:
    body = nn.Sequential(nn.Embedding(50, 16, padding_idx=0, max_norm=2.0, scale_grad_by_freq=True), mlp(16, 64, 50))
    return Labelled(body), (torch.randint(50, (8, 24)),), {"labels": torch.randint(50, (8, 24))}


def bfloat16() -> Built:
    body = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), mlp(64, 64, 8, drop=0.1))
    return Wrapped(body.bfloat16()), (rows().bfloat16(),), {}


def activations() -> Built:
    kinds = nn.PReLU(64), nn.SiLU(), nn.GELU("tanh"), nn.Hardswish(), nn.RReLU(), nn.Mish(), nn.Softplus(), nn.CELU(), nn.GLU()
    return Wrapped(nn.Sequential(nn.Linear(16, 64), *kinds, nn.Linear(32, 8))), (rows(),), {}


DTYPES: Builders = {
    "embedding_sparse": embedding_sparse,
    "embedding_padding_max_norm": embedding_padding_max_norm,
    "embedding_bag": lambda: (Bag(), (torch.randint(40, (600,)), torch.arange(0, 600, 5), torch.rand(600)), {}),
    "float64": lambda: (Wrapped(mlp(16, 64, 8, drop=0.1).double()), (rows().double(),), {}),
    "bfloat16": bfloat16,
    "activations": activations,
    "autocast_island": wrapped(Island),
}

# Losses


class Losses(nn.Module):
    """The sum of many losses over the same logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(16, 64, 8)
        self.register_buffer("weights", torch.rand(8))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        log = logits.log_softmax(-1)
        losses = {
            "cross_entropy": F.cross_entropy(logits, labels, self.weights, ignore_index=3, label_smoothing=0.1),
            "soft": F.cross_entropy(logits, target.softmax(-1)),
            "nll": F.nll_loss(log, labels, self.weights),
            "kl_div": F.kl_div(log, target.softmax(-1), reduction="batchmean"),
            "huber": F.huber_loss(logits, target, delta=0.5) + F.smooth_l1_loss(logits, target) + F.l1_loss(logits, target),
            "cosine": F.cosine_embedding_loss(logits, target, 2 * (labels % 2) - 1),
            "margin": F.multi_margin_loss(logits.float(), labels) + F.triplet_margin_loss(logits, target, target.flip(0)),
            "gaussian": F.gaussian_nll_loss(logits, target, log.exp() + 0.1),
        }
        return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), **losses}


class Ctc(nn.Module):
    """A recurrent-free speech head with a CTC loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.GELU(), nn.Conv1d(32, 12, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        log = self.body(x).permute(2, 0, 1).log_softmax(-1)
        return F.ctc_loss(log, labels, torch.full_like(lengths, len(log)), lengths, zero_infinity=True)


class Bce(nn.Module):
    """Multi-label, with weights for the positives as a buffer, and a dice term."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(16, 64, 8)
        self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.rand(8) + 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.body(x)
        p = logits.sigmoid()
        return self.loss(logits, labels) + 1 - 2 * (p * labels).sum() / (p.sum() + labels.sum())


LOSSES: Builders = {
    "losses": lambda: (Losses(), (rows(),), {"labels": torch.randint(8, (256,)), "target": rows(8)}),
    "loss_ctc": lambda: (Ctc(), (torch.randn(8, 8, 40), torch.randint(1, 12, (8, 10)), torch.randint(4, 10, (8,))), {}),
    "losses_bce_with_logits_pos_weight": lambda: (Bce(), (rows(),), {"labels": torch.randint(2, (256, 8)).float()}),
}

MODELS: Builders = STATE | AUTOGRAD | IN_PLACE | RANDOM | OUTPUTS | DTYPES | LOSSES
