"""ResNet-50: batch norm with running statistics, in-place ReLU, residual sums; large gradients beside the activations."""

import torch
from torch import nn
from torch.nn import functional as F


def convolution(channels_in, channels_out, kernel, stride=1):
    """Return a convolution that keeps the size (divided by the stride), followed by batch norm."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; four times as many channels come out as go through the middle."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.reduce = convolution(channels_in, channels, 1)
        self.filter = convolution(channels, channels, 3, stride)
        self.expand = convolution(channels, 4 * channels, 1)
        same = stride == 1 and channels_in == 4 * channels
        self.shortcut = nn.Identity() if same else convolution(channels_in, 4 * channels, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.reduce(x))
        y = self.relu(self.filter(y))
        y = self.expand(y)
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """The stem, four stages of bottlenecks and a classifier; returns the cross-entropy loss."""

    def __init__(self, layers, width, classes):
        super().__init__()
        self.stem = nn.Sequential(convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        blocks, channels_in = [], width
        for stage, depth in enumerate(layers):
            channels = width * 2**stage
            for index in range(depth):
                blocks.append(Bottleneck(channels_in, channels, stride=2 if stage > 0 and index == 0 else 1))
                channels_in = 4 * channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels_in, classes)

    def forward(self, images, labels):
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
        return F.cross_entropy(self.classifier(features), labels)


def build(layers=(3, 4, 6, 3), width=64, pixels=224, batch=3, classes=1000, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(layers, width, classes).train()
        images = torch.randn(batch, 3, pixels, pixels)
        labels = torch.randint(classes, (batch,))
    return model, (images, labels), {}
