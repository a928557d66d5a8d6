"""Vector quantization: vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)
VQ = "vector-quantize-pytorch"


class Autoencoder(nn.Module):
    """Encoder, quantizer, decoder; the quantizer's loss is returned, or left on the module for the loop to read."""

    def __init__(self, quantizer: nn.Module, width: int = 16, leave: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, width), nn.Linear(width, 12)
        self.quantizer, self.leave, self.commitment = quantizer, leave, None

    def forward(self, x: torch.Tensor) -> Any:
        quantized, *rest = self.quantizer(self.encoder(x))
        losses = [held for held in rest if isinstance(held, torch.Tensor) and held.is_floating_point()]
        commitment = sum((held.sum() for held in losses), torch.zeros(()))
        out = self.decoder(quantized)
        if not self.leave:
            return out, commitment
        self.commitment = commitment
        return out


def _series() -> tuple[Batch, ...]:
    def make() -> Batch:
        x = torch.randn(2, 10, 12)
        return call(x, target=x)

    return batches(make)


def _returned(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(out[0], target) + out[1]


@CASES(VQ)
def moving_average_codebook() -> Setup:
    from vector_quantize_pytorch import VectorQuantize

    return Setup(Autoencoder(VectorQuantize(dim=16, codebook_size=8, decay=0.8)), _series(), _returned)


@CASES(VQ)
def commitment_left_on_the_module() -> Setup:
    from vector_quantize_pytorch import VectorQuantize

    def loss(module: Any, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = F.mse_loss(out, target) + module.commitment
        return value

    return Setup(Autoencoder(VectorQuantize(dim=16, codebook_size=8), leave=True), _series(), loss)


@CASES(VQ)
def k_means_and_dead_codes() -> Setup:
    """The first batch initializes the codebook; codes that are seldom used are replaced."""
    from vector_quantize_pytorch import VectorQuantize

    options = {"kmeans_init": True, "kmeans_iters": 2, "threshold_ema_dead_code": 2, "use_cosine_sim": True}
    return Setup(Autoencoder(VectorQuantize(dim=16, codebook_size=8, **options)), _series(), _returned)


@CASES(VQ)
def learned_codebook_with_heads() -> Setup:
    from vector_quantize_pytorch import VectorQuantize

    options = {"heads": 2, "separate_codebook_per_head": True, "learnable_codebook": True, "ema_update": False}
    return Setup(Autoencoder(VectorQuantize(dim=16, codebook_size=8, codebook_dim=8, **options)), _series(), _returned)


@CASES(VQ)
def residual_with_dropout() -> Setup:
    """How many quantizers take part is drawn by Python's generator."""
    from vector_quantize_pytorch import ResidualVQ

    quantizer = ResidualVQ(dim=16, codebook_size=8, num_quantizers=3, quantize_dropout=True)
    return Setup(Autoencoder(quantizer), _series(), _returned)


@CASES(VQ)
def finite_scalar() -> Setup:
    from vector_quantize_pytorch import FSQ

    return Setup(Autoencoder(FSQ(levels=[5, 4, 3], dim=16)), _series(), _returned)


@CASES(VQ)
def lookup_free_entropy() -> Setup:
    from vector_quantize_pytorch import LFQ

    return Setup(Autoencoder(LFQ(codebook_size=16, dim=16, entropy_loss_weight=0.02)), _series(), _returned)


@CASES(VQ)
def random_projection() -> Setup:
    """BEST-RQ: targets from a frozen random codebook."""
    from vector_quantize_pytorch import RandomProjectionQuantizer

    class BestRq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.targets = RandomProjectionQuantizer(dim=12, num_codebooks=1, codebook_dim=8, codebook_size=16)
            self.net = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.net(x).flatten(0, 1), self.targets(x).flatten())

    return Setup(BestRq(), batches(lambda: call(torch.randn(2, 10, 12))))
