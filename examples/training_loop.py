"""A whole training loop around a planned model: autocast, accumulation, clipping, a scaler, moving averages of the weights.

python -m examples.training_loop

Nothing in the loop knows of the plan: `install` is the one line that differs. It prints the losses of the plain and the planned
run, which are equal bit for bit, and their peaks.
"""

import copy

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples import gpt2
from planner import install, plan
from planner.profiler.memory import logical_peak
from planner.units import format_bytes


def train(model, batches, steps, accumulate=2):
    """The loop, as people write it; returns the loss of every batch and the averaged model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    average = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses = []
    for step in range(steps):
        for turn in range(accumulate):
            batch = batches[(step * accumulate + turn) % len(batches)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            scaler.scale(loss / accumulate).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update_parameters(model)
    return losses, average


def main(steps=4, budget=0.7, **sizes):
    """Train a plain and a planned twin; returns their losses, averaged weights and peaks."""
    model, _, example = gpt2.build(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        batches = [{name: tensor[torch.randperm(len(tensor))] for name, tensor in example.items()} for _ in range(3)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    planned = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        install(planned, plan(planned, budget, kwargs=batches[0], accumulate=True), strict=True)
    found = {}
    for name, twin in (("plain", model), ("planned", planned)):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            losses, average = train(twin, batches, steps)
            state = [tensor.clone() for tensor in (*twin.state_dict().values(), *average.state_dict().values())]
            peak = logical_peak(lambda twin=twin: train(twin, batches, 1), torch.device("cpu"))
        found[name] = (losses, state, peak)
        print(f"{name:8} losses {' '.join(f'{loss:.4f}' for loss in losses)}   peak of a step {format_bytes(peak)}")
    return found


if __name__ == "__main__":
    main()
