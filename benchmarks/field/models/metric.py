"""Metric learning and adversaries: pytorch-metric-learning, and monai's discriminators in two-player loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)
PML = "pytorch-metric-learning"


def _embedder() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))


def _labelled() -> tuple[Batch, ...]:
    return batches(lambda: call(torch.randn(12, 12), target=torch.randint(3, (12,))))


@CASES(PML)
def triplets_with_miner() -> Setup:
    """How many triplets are mined follows the embeddings."""
    from pytorch_metric_learning import losses, miners

    miner, criterion = miners.MultiSimilarityMiner(), losses.TripletMarginLoss()

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = criterion(out, target, miner(out, target))
        return value

    return Setup(_embedder(), _labelled(), loss)


@CASES(PML)
def arc_face_outside() -> Setup:
    """The loss has trained weights of its own."""
    from pytorch_metric_learning import losses

    criterion = losses.ArcFaceLoss(num_classes=3, embedding_size=8)
    return Setup(_embedder(), _labelled(), lambda module, out, target: criterion(out, target), extra=criterion)


class Trained(nn.Module):
    """Embedder and loss in one module, which is planned."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.body, self.criterion = _embedder(), criterion

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.criterion(self.body(x), y)
        return value


def _inside(criterion: nn.Module) -> Setup:
    return Setup(Trained(criterion), batches(lambda: call(torch.randn(12, 12), torch.randint(3, (12,)))))


@CASES(PML)
def arc_face_inside() -> Setup:
    from pytorch_metric_learning import losses

    return _inside(losses.ArcFaceLoss(num_classes=3, embedding_size=8))


@CASES(PML)
def proxy_anchor_inside() -> Setup:
    from pytorch_metric_learning import losses

    return _inside(losses.ProxyAnchorLoss(num_classes=3, embedding_size=8))


@CASES(PML)
def cross_batch_memory_inside() -> Setup:
    """A queue of earlier embeddings and labels, which are attributes of the loss."""
    from pytorch_metric_learning import losses

    return _inside(losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=8, memory_size=24))


def _discriminator() -> nn.Module:
    from monai.networks.nets import PatchDiscriminator

    return PatchDiscriminator(spatial_dims=2, num_layers_d=2, channels=8, in_channels=1, out_channels=1)


class Score(nn.Module):
    """A discriminator whose loss takes no features, only the score."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _discriminator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score: torch.Tensor = self.net(x)[-1]
        return score


def _images() -> tuple[Batch, ...]:
    return batches(lambda: call(torch.randn(2, 1, 24, 24), target=torch.randn(2, 1, 24, 24)))


@CASES("monai")
def discriminator_real_and_fake() -> Setup:
    """Two calls, one backward: both forwards are in flight; of the outputs, a list of features, the loss takes the last."""

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        real, fake = module(batch.args[0])[-1], module(batch.target)[-1]
        return (real, fake), F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    return Setup(_discriminator(), _images(), forward=forward)


@CASES("monai")
def discriminator_for_its_generator() -> Setup:
    """The generator's turn: gradients pass the discriminator into its input; the plan was made with such an input."""
    generator = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        score = module(generator(batch.target).float())
        return score, -score.mean()

    def make() -> Batch:
        return call(torch.randn(2, 1, 24, 24).requires_grad_(), target=torch.randn(2, 1, 24, 24))

    return Setup(Score(), batches(make), forward=forward, extra=generator)


@CASES("monai")
def discriminator_in_both_turns() -> Setup:
    """One step of each player a batch: the module is called with inputs that require grad, and without; both are planned."""
    generator = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        made = generator(batch.target).float()
        judged = module(made)
        with torch.autocast("cpu", enabled=False):  # torch advises against a backward inside of autocast
            (-judged.mean()).backward()
        module.zero_grad()
        real, fake = module(batch.args[0]), module(made.detach())
        return (judged, real, fake), F.softplus(-real).mean() + F.softplus(fake).mean()

    turn = (torch.randn(2, 1, 24, 24, requires_grad=True),)
    return Setup(Score(), _images(), forward=forward, extra=generator, plan={"also": [(turn, {})]})


@CASES("monai")
def discriminator_with_gradient_penalty() -> Setup:
    """WGAN-GP: the penalty differentiates the input's gradient."""

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        mixed = (0.5 * batch.args[0] + 0.5 * batch.target).requires_grad_()
        score = module(mixed)
        (slope,) = torch.autograd.grad(score.sum(), mixed, create_graph=True)
        return score, score.mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()

    def make() -> Batch:
        return call(torch.randn(2, 1, 24, 24).requires_grad_(), target=torch.randn(2, 1, 24, 24))

    return Setup(Score(), batches(make), forward=forward)
