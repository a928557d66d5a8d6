"""Self-supervised learning: lightly, byol-pytorch, vit-pytorch's DINO."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)


def _backbone() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18()
    layers = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _views(side: int = 32, count: int = 4) -> tuple[Batch, ...]:
    return batches(lambda: call(*(torch.randn(count, 3, side, side) for _ in range(2))))


class Pair(nn.Module):
    """Two views through one encoder and head."""

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.backbone, self.heads = _backbone(), nn.ModuleList(heads)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x)
        for head in self.heads:
            x = head(x)
        return x

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embed(first), self.embed(second)


@CASES("lightly")
def simclr() -> Setup:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    loss = NTXentLoss()
    return Setup(Pair(SimCLRProjectionHead(64, 32, 16)), _views(), lambda module, out, target: loss(*out))


@CASES("lightly")
def vicreg() -> Setup:
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    loss = VICRegLoss()
    return Setup(Pair(VICRegProjectionHead(64, 32, 16, num_layers=2)), _views(), lambda module, out, target: loss(*out))


@CASES("lightly")
def moco_queue_in_the_loss() -> Setup:
    """The memory bank belongs to the loss, outside of the planned model."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    loss = NTXentLoss(memory_bank_size=(16, 16))

    def queued(module: nn.Module, out: Any, target: Any) -> torch.Tensor:
        value: torch.Tensor = loss(out[0], out[1].detach())
        return value

    return Setup(Pair(MoCoProjectionHead(64, 32, 16)), _views(), queued, extra=loss)


@CASES("lightly")
def moco_momentum() -> Setup:
    """Momentum encoder, its update, and the memory bank inside the module; the module returns the loss."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Moco(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(_backbone(), MoCoProjectionHead(64, 32, 16))
            self.teacher = copy.deepcopy(self.student)
            deactivate_requires_grad(self.teacher)
            self.criterion = NTXentLoss(memory_bank_size=(16, 16))

        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            update_momentum(self.student, self.teacher, m=0.9)
            value: torch.Tensor = self.criterion(self.student(query), self.teacher(key).detach())
            return value

    return Setup(Moco(), _views())


@CASES("lightly")
def byol_updated_by_the_loop() -> Setup:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Byol(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = nn.Sequential(_backbone(), BYOLProjectionHead(64, 32, 16))
            self.predictor = BYOLPredictionHead(16, 32, 16)
            self.target = copy.deepcopy(self.online)
            deactivate_requires_grad(self.target)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
            predicted = [self.predictor(self.online(x)) for x in (first, second)]
            return (*predicted, *(self.target(x).detach() for x in (first, second)))

    criterion = NegativeCosineSimilarity()

    def loss(module: nn.Module, out: Any, target: Any) -> torch.Tensor:
        value: torch.Tensor = 0.5 * (criterion(out[0], out[3]) + criterion(out[1], out[2]))
        return value

    def update(module: Any, step: int) -> None:
        update_momentum(module.online, module.target, m=0.9 + 0.01 * step)

    return Setup(Byol(), _views(), loss, after_step=update)


@CASES("lightly")
def dino_center() -> Setup:
    """The loss keeps the teacher's center, and its temperature follows the epoch."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Dino(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            nets = [nn.Sequential(_backbone(), DINOProjectionHead(64, 32, 16, 24, freeze_last_layer=1)) for _ in range(2)]
            self.student, self.teacher = nets
            self.teacher.load_state_dict(self.student.state_dict())
            deactivate_requires_grad(self.teacher)
            self.criterion = DINOLoss(output_dim=24, warmup_teacher_temp_epochs=2)
            self.epoch = 0

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            seen, shown = ([net(x) for x in (first, second)] for net in (self.student, self.teacher))
            value: torch.Tensor = self.criterion(shown, seen, epoch=self.epoch)
            return value

    def after(module: Any, step: int) -> None:
        update_momentum(module.student, module.teacher, m=0.9)
        getattr(module, "original", module).epoch = step + 1

    return Setup(Dino(), _views(), after_step=after, copied=False)  # weight norm leaves a computed weight on the module


@CASES("lightly")
def barlow_twins() -> Setup:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    loss = BarlowTwinsLoss()
    return Setup(Pair(BarlowTwinsProjectionHead(64, 32, 16)), _views(), lambda module, out, target: loss(*out))


@CASES("lightly")
def swav_queue() -> Setup:
    """Prototypes with Sinkhorn assignments, and a queue of features on the module."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    class Swav(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(_backbone(), SwaVProjectionHead(64, 32, 16))
            self.prototypes = SwaVPrototypes(16, n_prototypes=12)
            self.criterion, self.queue = SwaVLoss(), torch.zeros(0, 16)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            self.prototypes.normalize()
            views = [nn.functional.normalize(self.body(x), dim=1) for x in (first, second)]
            scores = [self.prototypes(view) for view in views]
            with torch.no_grad():
                queued = [self.prototypes(self.queue)] * 2 if len(self.queue) else None
            value: torch.Tensor = self.criterion(scores, [], queued)
            self.queue = torch.cat([views[0].detach(), self.queue])[:8]
            return value

    return Setup(Swav(), _views())


@CASES("byol-pytorch")
def byol() -> Setup:
    """A hook on a hidden layer keeps its output in a dict; the target encoder moves between the steps."""
    from byol_pytorch import BYOL
    from torchvision.models import resnet18

    net = nn.Sequential()
    full = resnet18(num_classes=10)
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "avgpool"):
        net.add_module(name, getattr(full, name))
    size = {"projection_size": 16, "projection_hidden_size": 32, "moving_average_decay": 0.9}
    model = BYOL(net, image_size=32, hidden_layer="avgpool", **size)

    def update(module: Any, step: int) -> None:
        module.update_moving_average()

    return Setup(model, batches(lambda: call(torch.randn(4, 3, 32, 32))), after_step=update)


@CASES("vit-pytorch")
def dino() -> Setup:
    """Teacher centers are left on the module by the forward and used by the next call."""
    from vit_pytorch import Dino, ViT

    vit = ViT(image_size=32, patch_size=8, num_classes=10, dim=32, depth=1, heads=2, mlp_dim=64)
    size = {"projection_hidden_size": 32, "projection_layers": 2, "num_classes_K": 24}
    model = Dino(vit, image_size=32, hidden_layer="to_latent", **size)

    def update(module: Any, step: int) -> None:
        module.update_moving_average()

    return Setup(model, batches(lambda: call(torch.randn(4, 3, 32, 32))), after_step=update)
