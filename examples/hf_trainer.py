"""Hugging Face's Trainer with a planned model: one callback, the rest is as it was.

python -m examples.hf_trainer

It trains a small GPT-2 with dropout, gradient accumulation and clipping, once plain and once planned, and prints the peaks of a
step; the weights after training are equal bit for bit.
"""

import copy
import tempfile

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from examples import gpt2
from examples.first_call import plan_at_first_call
from planner import uninstall, verify
from planner.units import format_bytes


class PlanCallback(TrainerCallback):
    """Plans the model for the first batch that the Trainer gives it, and trains it planned until the end."""

    def __init__(self, budget, **options):
        self.budget, self.options = budget, options
        self.planned, self.call = None, ((), {})

    def on_train_begin(self, args, state, control, model, **kwargs):
        plan_at_first_call(model, self.budget, done=self.keep, **self.options)

    def keep(self, planned, args, kwargs):
        self.planned, self.call = planned, (args, kwargs)

    def on_train_end(self, args, state, control, model, **kwargs):
        uninstall(model)


def train(model, dataset, callbacks, steps, batch, **arguments):
    """The usual script; the batches, shuffling and dropout follow from the Trainer's seed."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        arguments = TrainingArguments(
            folder,
            seed=3,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_drop_last=True,  # a smaller last batch would be another call
            dataloader_pin_memory=False,
            **arguments,
        )
        Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks).train()
        return [parameter.detach().clone() for parameter in model.parameters()]


def main(budget=0.6, steps=3, batch=2, arguments=(), **sizes):
    """Weights after plain and planned training, and what `verify` says of a planned step."""
    model, _, example = gpt2.build(**{"layers": 4, "width": 128, "length": 256, "vocabulary": 1024, **sizes}, batch=8 * batch)
    dataset = [{"input_ids": tokens, "labels": tokens} for tokens in example["input_ids"]]
    weights = {"plain": train(copy.deepcopy(model), dataset, [], steps, batch, **dict(arguments))}
    callback = PlanCallback(budget, accumulate=True)
    weights["planned"] = train(model, dataset, [callback], steps, batch, **dict(arguments))
    report = verify(callback.planned, *callback.call, rounds=1)
    same = all(torch.equal(a, b) for a, b in zip(weights["plain"], weights["planned"], strict=True))
    print(f"weights after {steps} steps: {'bit-equal' if same else 'DIFFERENT'}")
    print(f"peak of a step: plain {format_bytes(report.plain_peak_bytes)}, planned {format_bytes(report.measured_peak_bytes)}")
    return weights, report


if __name__ == "__main__":
    main()
