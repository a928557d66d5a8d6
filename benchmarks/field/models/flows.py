"""Normalizing flows: nflows, normflows, zuko."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)
WIDTH = 4


def _points() -> tuple[Batch, ...]:
    return batches(lambda: call(torch.randn(16, WIDTH)))


class NegativeLogLikelihood(nn.Module):
    """The training objective as a module: -log p(x), averaged."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flow: Any = self.flow
        density = flow if hasattr(flow, "log_prob") else flow()
        return -density.log_prob(x).mean()


@CASES("nflows")
def masked_autoregressive() -> Setup:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    layers = []
    for _ in range(2):
        layers += [ReversePermutation(WIDTH), MaskedAffineAutoregressiveTransform(WIDTH, 16, dropout_probability=0.1)]
    return Setup(NegativeLogLikelihood(Flow(CompositeTransform(layers), StandardNormal([WIDTH]))), _points())


@CASES("nflows")
def spline_coupling_batch_norm() -> Setup:
    """Batch normalization between rational-quadratic couplings, which index with masks."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import BatchNorm, CompositeTransform, LULinear
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Coupling

    def net(inside: int, outside: int) -> nn.Module:
        return ResidualNet(inside, outside, hidden_features=16, num_blocks=1)

    mask = torch.tensor([1, 0, 1, 0])
    layers = [Coupling(mask, net, num_bins=4, tails="linear"), BatchNorm(WIDTH), LULinear(WIDTH)]
    return Setup(NegativeLogLikelihood(Flow(CompositeTransform(layers), StandardNormal([WIDTH]))), _points())


@CASES("nflows")
def activation_norm() -> Setup:
    """The first batch sets scale and shift."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import ActNorm, CompositeTransform, LULinear

    layers = [ActNorm(WIDTH), LULinear(WIDTH), ActNorm(WIDTH)]
    return Setup(NegativeLogLikelihood(Flow(CompositeTransform(layers), StandardNormal([WIDTH]))), _points())


class ForwardKld(nn.Module):
    """normflows' objective."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.flow.forward_kld(x)
        return value


@CASES("normflows")
def real_nvp() -> Setup:
    import normflows as nf

    layers: list[nn.Module] = []
    for i in range(2):
        s, t = (nf.nets.MLP([WIDTH, 16, WIDTH], init_zeros=True) for _ in range(2))
        layers += [nf.flows.MaskedAffineFlow(torch.tensor([i % 2, 1 - i % 2] * 2), t, s), nf.flows.ActNorm(WIDTH)]
    return Setup(ForwardKld(nf.NormalizingFlow(nf.distributions.DiagGaussian(WIDTH), layers)), _points())


@CASES("normflows")
def glow() -> Setup:
    """Multiscale, with invertible 1x1 convolutions and class conditions."""
    import normflows as nf

    shapes, merges, flows = [(6, 4, 4)], [], []
    flows.append([nf.flows.GlowBlock(12, 16, split_mode="channel", scale=True), nf.flows.Squeeze()])
    base = [nf.distributions.ClassCondDiagGaussian((12, 4, 4), 3)]
    del shapes

    class Glow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = nf.MultiscaleFlow(base, flows, merges)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = self.flow.forward_kld(x, y)
            return value

    return Setup(Glow(), batches(lambda: call(torch.rand(4, 3, 8, 8), torch.randint(3, (4,)))))


@CASES("zuko")
def neural_spline() -> Setup:
    import zuko

    return Setup(NegativeLogLikelihood(zuko.flows.NSF(WIDTH, transforms=2, hidden_features=(16,))), _points())


@CASES("zuko")
def continuous() -> Setup:
    import zuko

    return Setup(NegativeLogLikelihood(zuko.flows.CNF(WIDTH, hidden_features=(16,))), _points())
