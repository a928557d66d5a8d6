"""Hugging Face's Trainer with a planned model: one callback, the rest is as it was.

python -m examples.hf_trainer

It trains a small GPT-2 with dropout, gradient accumulation, clipping, a smaller last batch and an evaluation each epoch, once
plain and once planned, and prints the peaks of a step; the weights after training are equal bit for bit.
"""

import copy
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from examples import gpt2
from planner.integrations.transformers import PlannerCallback
from planner.units import format_bytes


def train(model, dataset, callbacks, epochs, batch, **arguments):
    """The usual script; the batches, shuffling and dropout follow from the Trainer's seed."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        arguments = TrainingArguments(
            folder,
            seed=3,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            learning_rate=1e-3,
            eval_strategy="epoch",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:batch], callbacks=callbacks).train()
        return [parameter.detach().clone() for parameter in model.parameters()]


def main(budget=0.6, epochs=2, batch=4, arguments=(), **sizes):
    """Weights after plain and planned training, and the callback, which holds the plan."""
    model, _, example = gpt2.build(
        **{"layers": 4, "width": 128, "length": 256, "vocabulary": 1024, **sizes}, batch=4 * batch - 1
    )
    dataset = [{"input_ids": tokens, "labels": tokens} for tokens in example["input_ids"]]
    weights = {"plain": train(copy.deepcopy(model), dataset, [], epochs, batch, **dict(arguments))}
    callback = PlannerCallback(budget)
    weights["planned"] = train(model, dataset, [callback], epochs, batch, **dict(arguments))
    same = all(torch.equal(a, b) for a, b in zip(weights["plain"], weights["planned"], strict=True))
    print(f"weights after {epochs} epochs: {'bit-equal' if same else 'DIFFERENT'}")
    made = callback.planned.plan
    print(f"peak of a step: plain {format_bytes(made.plain.peak_bytes)}, planned {format_bytes(made.measured_bytes)} measured")
    return weights, callback


if __name__ == "__main__":
    main()
