"""Dense prediction: segmentation-models-pytorch, monai, torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)


def _masked(side: int, classes: int = 1) -> tuple[Batch, ...]:
    def make() -> Batch:
        labels = torch.randint(max(classes, 2), (2, side, side))
        target = labels[:, None].float() if classes == 1 else labels
        return call(torch.randn(2, 3, side, side), target=target)

    return batches(make)


def _smp(name: str, encoder: str, side: int, **options: Any) -> Setup:
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=1, **options)
    dice, bce = smp.losses.DiceLoss(mode="binary"), smp.losses.SoftBCEWithLogitsLoss()
    return Setup(model, _masked(side), on_output(lambda out, target: dice(out, target) + bce(out, target)))


@CASES("segmentation_models_pytorch")
def unet_resnet() -> Setup:
    return _smp("Unet", "resnet18", 64, decoder_channels=(32, 16, 16, 8, 8))


@CASES("segmentation_models_pytorch")
def unet_attention() -> Setup:
    options = {"encoder_depth": 3, "decoder_channels": (64, 48, 32), "decoder_attention_type": "scse"}
    return _smp("Unet", "mobilenet_v2", 64, **options)


@CASES("segmentation_models_pytorch")
def fpn_with_classifier() -> Setup:
    """Mask and label: two outputs, two losses."""
    import segmentation_models_pytorch as smp

    head = {"classes": 4, "dropout": 0.2}
    model = smp.FPN(encoder_name="resnet18", encoder_weights=None, classes=3, decoder_dropout=0.2, aux_params=head)
    focal = smp.losses.FocalLoss(mode="multiclass")

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        mask, label = out
        return focal(mask, target) + F.cross_entropy(label, target[:, 0, 0])

    return Setup(model, _masked(64, 3), loss)


@CASES("segmentation_models_pytorch")
def deeplab_v3_plus() -> Setup:
    return _smp("DeepLabV3Plus", "resnet18", 64, decoder_channels=32)


@CASES("segmentation_models_pytorch")
def segformer() -> Setup:
    return _smp("Segformer", "mit_b0", 64, decoder_segmentation_channels=32)


@CASES("torchvision")
def deeplab_v3_auxiliary() -> Setup:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out["out"], target) + 0.5 * F.cross_entropy(out["aux"], target)

    return Setup(model, _masked(48, 3), loss)


@CASES("torchvision")
def raft_flow() -> Setup:
    """Twelve refinements; the sequence loss weighs them."""
    from torchvision.models.optical_flow import raft_small

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return sum((0.8 ** (len(out) - i - 1) * (flow - target).abs().mean() for i, flow in enumerate(out)), torch.zeros(()))

    def make() -> Batch:
        first, second = (torch.rand(1, 3, 128, 128) * 2 - 1 for _ in range(2))
        return call(first, second, num_flow_updates=3, target=torch.randn(1, 2, 128, 128))

    return Setup(raft_small(weights=None), batches(make), loss)


def _volumes(classes: int, side: int) -> tuple[Batch, ...]:
    def make() -> Batch:
        shape = (1, 1, side, side, side)
        return call(torch.randn(shape), target=torch.randint(classes, shape))

    return batches(make)


def _dice_ce(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
    from monai.losses import DiceCELoss

    loss: torch.Tensor = DiceCELoss(to_onehot_y=True, softmax=True)(out, target)
    return loss


@CASES("monai")
def unet_3d() -> Setup:
    from monai.networks.nets import UNet

    sizes = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1}
    return Setup(UNet(spatial_dims=3, in_channels=1, out_channels=3, dropout=0.1, **sizes), _volumes(3, 16), _dice_ce)


@CASES("monai")
def segresnet_vae() -> Setup:
    """Returns the segmentation and the loss of its variational branch."""
    from monai.networks.nets import SegResNetVAE

    size = {"init_filters": 8, "vae_nz": 8, "blocks_down": (1, 1), "blocks_up": (1,), "dropout_prob": 0.1}
    model = SegResNetVAE(input_image_size=(16, 16, 16), in_channels=1, out_channels=3, **size)

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return _dice_ce(module, out[0], target) + 0.1 * out[1]

    return Setup(model, _volumes(3, 16), loss)


@CASES("monai")
def swin_unetr() -> Setup:
    from monai.networks.nets import SwinUNETR

    size = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "spatial_dims": 2}

    def make() -> Batch:
        return call(torch.randn(2, 1, 64, 64), target=torch.randint(2, (2, 1, 64, 64)))

    return Setup(SwinUNETR(in_channels=1, out_channels=2, **size, drop_rate=0.1), batches(make), _dice_ce)


@CASES("monai")
def dynunet_deep_supervision() -> Setup:
    """In training its heads are left on the module, in a list that is written in place."""
    from monai.networks.nets import DynUNet

    sizes = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 16]}
    model = DynUNet(3, 1, 2, **sizes, deep_supervision=True, deep_supr_num=1, norm_name="instance")

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        heads = torch.unbind(out, dim=1)
        return sum((0.5**i * _dice_ce(module, head, target) for i, head in enumerate(heads)), torch.zeros(()))

    return Setup(model, _volumes(2, 16), loss)
