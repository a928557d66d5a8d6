"""Image classifiers: timm, torchvision, vit-pytorch, efficientnet-pytorch, kornia, perceiver-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)
CLASSES = 10


def images(side: int, channels: int = 3, count: int = 2) -> tuple[Batch, ...]:
    """Images with a class each."""
    return batches(lambda: call(torch.randn(count, channels, side, side), target=torch.randint(CLASSES, (count,))))


def classifier(model: nn.Module, side: int) -> Setup:
    """Cross-entropy with label smoothing, as timm's and torchvision's recipes have it."""
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Setup(model, images(side), on_output(smoothed))


def _timm(name: str, side: int, **options: Any) -> Setup:
    import timm

    return classifier(timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), side)


@CASES("timm")
def vit_drop_path() -> Setup:
    small = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return _timm("vit_tiny_patch16_224", 32, drop_path_rate=0.2, drop_rate=0.1, **small)


@CASES("timm")
def vit_patch_drop() -> Setup:
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return _timm("vit_tiny_patch16_224", 32, patch_drop_rate=0.25, init_values=1e-5, **small)


@CASES("timm")
def convnext() -> Setup:
    return _timm("convnext_atto", 64, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1)


@CASES("timm")
def swin() -> Setup:
    small = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "img_size": 64, "window_size": 4}
    return _timm("swin_tiny_patch4_window7_224", 64, **small)


@CASES("timm")
def swin_v2_checkpointed() -> Setup:
    small = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "img_size": 64, "window_size": 4}
    setup = _timm("swinv2_tiny_window8_256", 64, **small)
    setup.model.set_grad_checkpointing(True)
    return setup


@CASES("timm")
def efficientnet() -> Setup:
    return _timm("test_efficientnet", 64, drop_path_rate=0.2, drop_rate=0.2)


@CASES("timm")
def mobilenet_v3() -> Setup:
    return _timm("mobilenetv3_small_050", 64)


@CASES("timm")
def densenet_memory_efficient() -> Setup:
    return _timm("densenet121", 64, block_config=(2, 2), growth_rate=8, memory_efficient=True)


@CASES("timm")
def eva_rope() -> Setup:
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return _timm("eva02_tiny_patch14_224", 32, **small)


@CASES("timm")
def mixer() -> Setup:
    from timm.models.mlp_mixer import MlpMixer

    return classifier(MlpMixer(num_classes=CLASSES, img_size=64, patch_size=16, num_blocks=2, embed_dim=48), 64)


@CASES("timm")
def resnet_dropblock() -> Setup:
    return _timm("resnet18", 64, channels=(8, 16, 24, 32), stem_width=8, drop_block_rate=0.1, drop_path_rate=0.1)


@CASES("timm")
def norm_free_weight_standardized() -> Setup:
    return _timm("nf_regnet_b0", 64, drop_path_rate=0.1)


@CASES("torchvision")
def resnet() -> Setup:
    from torchvision.models import resnet18

    return classifier(resnet18(num_classes=CLASSES), 64)


@CASES("torchvision")
def googlenet_auxiliary() -> Setup:
    from torchvision.models import googlenet

    model = googlenet(num_classes=CLASSES, aux_logits=True, init_weights=False)

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        auxiliary = F.cross_entropy(out.aux_logits1, target) + F.cross_entropy(out.aux_logits2, target)
        return F.cross_entropy(out.logits, target) + 0.3 * auxiliary

    return Setup(model, images(64), loss)


@CASES("torchvision")
def swin_transformer() -> Setup:
    from torchvision.models import SwinTransformer

    shape = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return classifier(SwinTransformer(**shape, stochastic_depth_prob=0.2, num_classes=CLASSES), 64)


@CASES("torchvision")
def shufflenet() -> Setup:
    from torchvision.models import shufflenet_v2_x0_5

    return classifier(shufflenet_v2_x0_5(num_classes=CLASSES), 64)


@CASES("efficientnet_pytorch")
def b0_drop_connect() -> Setup:
    from efficientnet_pytorch import EfficientNet

    return classifier(EfficientNet.from_name("efficientnet-b0", num_classes=CLASSES, image_size=64), 64)


@CASES("vit-pytorch")
def simple_vit() -> Setup:
    from vit_pytorch import SimpleViT

    return classifier(SimpleViT(image_size=32, patch_size=8, num_classes=CLASSES, dim=48, depth=2, heads=3, mlp_dim=96), 32)


@CASES("vit-pytorch")
def cait_layer_dropout() -> Setup:
    from vit_pytorch.cait import CaiT

    size = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "cls_depth": 2, "heads": 3, "mlp_dim": 96}
    return classifier(CaiT(**size, num_classes=CLASSES, dropout=0.1, emb_dropout=0.1, layer_dropout=0.3), 32)


@CASES("vit-pytorch")
def distilled() -> Setup:
    from torchvision.models import resnet18
    from vit_pytorch.distill import DistillableViT, DistillWrapper

    size = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96}
    student = DistillableViT(**size, num_classes=CLASSES, dropout=0.1)
    model = DistillWrapper(student=student, teacher=resnet18(num_classes=CLASSES), temperature=3, alpha=0.5)
    return Setup(model, batches(lambda: call(torch.randn(2, 3, 32, 32), torch.randint(CLASSES, (2,)))))


@CASES("vit-pytorch")
def crossvit() -> Setup:
    from vit_pytorch.cross_vit import CrossViT

    small = {"sm_dim": 24, "sm_patch_size": 8, "sm_enc_depth": 1, "sm_enc_heads": 2, "sm_enc_mlp_dim": 48}
    large = {"lg_dim": 48, "lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 2, "lg_enc_mlp_dim": 48}
    size = {"cross_attn_depth": 1, "cross_attn_heads": 2, "depth": 2}
    return classifier(CrossViT(image_size=32, num_classes=CLASSES, **size, **small, **large, dropout=0.1), 32)


@CASES("perceiver-pytorch")
def perceiver() -> Setup:
    from perceiver_pytorch import Perceiver

    size = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 4, "max_freq": 10.0, "depth": 2, "num_latents": 16}
    model = Perceiver(**size, latent_dim=32, cross_dim_head=16, latent_heads=2, latent_dim_head=16, num_classes=CLASSES)
    data = batches(lambda: call(torch.randn(2, 16, 16, 3), target=torch.randint(CLASSES, (2,))))
    return Setup(model, data, on_output(F.cross_entropy))


@CASES("kornia")
def augmented_classifier() -> Setup:
    """Augmentations on the device, in the model, as kornia's tutorials train."""
    import kornia.augmentation as K

    augment = K.AugmentationSequential(K.RandomHorizontalFlip(p=0.5), K.RandomErasing(p=0.5), data_keys=["input"])
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
    return classifier(nn.Sequential(augment, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)), 32)


@CASES("kornia")
def autoencoder_ssim() -> Setup:
    """An image autoencoder with kornia's SSIM and total-variation losses."""
    from kornia.losses import SSIMLoss, total_variation

    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU())
    model = nn.Sequential(net, nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid())
    ssim = SSIMLoss(5)

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ssim(out, target) + 1e-4 * total_variation(out).mean()

    def make() -> Batch:
        image = torch.rand(2, 3, 24, 24)
        return call(image, target=image)

    return Setup(model, batches(make), loss)
