"""ViT: an encoder of equal blocks over image patches, with dropout after every projection and in attention."""

import torch
from transformers import ViTConfig, ViTForImageClassification


def build(layers=12, width=192, heads=6, pixels=224, patch=16, batch=6, classes=100, dropout=0.1, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is."""
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
        num_labels=classes,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config).train()
        images = torch.randn(batch, 3, pixels, pixels)
        labels = torch.randint(classes, (batch,))
    return model, (), {"pixel_values": images, "labels": labels}
