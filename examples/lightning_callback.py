"""Lightning with a planned network: one callback, the rest is as it was.

python -m examples.lightning_callback

It trains a small convolutional network with batch norm and dropout, gradient accumulation, clipping and a smaller last batch,
once plain and once planned, and prints the predicted peaks of a step; the weights and running statistics after training are
equal bit for bit.
"""

import copy

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from planner.integrations.lightning import PlannerCallback
from planner.units import format_bytes


class Classifier(lightning.LightningModule):
    """The usual wrapper: what is planned is the network, the loss is computed outside of it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def network(width=32, depth=6):
    """Convolutions with batch norm and dropout, averaged into ten logits."""
    layers = [
        layer
        for i in range(depth)
        for layer in (nn.Conv2d(width if i else 3, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU(), nn.Dropout(0.1))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def fit(net, data, callbacks, batch, precision):
    """The usual script; returns what it trained."""
    loader = DataLoader(data, batch, shuffle=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=precision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer.fit(Classifier(net), loader)
    return [tensor.clone() for tensor in net.state_dict().values()]


def main(budget=0.6, batch=8, pixels=32, precision="32-true", **sizes):
    """State after plain and planned training, and the callback, which holds the plan."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network(**sizes)
        data = TensorDataset(torch.randn(4 * batch - 1, 3, pixels, pixels), torch.randint(10, (4 * batch - 1,)))
    state = {"plain": fit(copy.deepcopy(net), data, [], batch, precision)}
    callback = PlannerCallback(budget)
    state["planned"] = fit(net, data, [callback], batch, precision)
    same = all(torch.equal(a, b) for a, b in zip(state["plain"], state["planned"], strict=True))
    print(f"weights and statistics after training: {'bit-equal' if same else 'DIFFERENT'}")
    made = callback.planned.plan
    print(f"peak of a step, predicted: plain {format_bytes(made.plain.peak_bytes)}, planned {format_bytes(made.peak_bytes)}")
    return state, callback


if __name__ == "__main__":
    main()
