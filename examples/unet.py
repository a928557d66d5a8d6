"""U-Net: skip connections hold the largest activations from the start of the forward to the end of the backward."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def double_convolution(channels_in, channels_out):
    """Return two 3x3 convolutions, each with group norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.GroupNorm(4, channels_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.GroupNorm(4, channels_out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Halve the size and double the channels `layers` times, then the way back; returns the pixelwise cross-entropy loss."""

    def __init__(self, layers, width, classes, dropout):
        super().__init__()
        widths = [width * 2**level for level in range(layers + 1)]
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(double_convolution(a, b) for a, b in zip([3, *widths], widths[:-1], strict=False))
        self.bottom = nn.Sequential(double_convolution(widths[-2], widths[-1]), nn.Dropout2d(dropout))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in reversed(pairs))
        self.merge = nn.ModuleList(double_convolution(wide, narrow) for narrow, wide in reversed(pairs))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images, labels):
        x, skips = images, []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return F.cross_entropy(self.classifier(x), labels)


def build(layers=4, width=16, pixels=224, batch=2, classes=4, dropout=0.1, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(layers, width, classes, dropout).train()
        images = torch.randn(batch, 3, pixels, pixels)
        labels = torch.randint(classes, (batch, pixels, pixels))
    return model, (images, labels), {}
