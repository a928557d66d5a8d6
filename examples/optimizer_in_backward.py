"""The optimizer steps inside the backward, by hooks on the parameters: gradients are used and freed as they come.

python -m examples.optimizer_in_backward

A planned backward hands gradients out in stages (`num_stages`), so that few of them are alive at once. It prints the peak of a
step with one stage and with many, next to plain training; the weights after training are equal bit for bit.
"""

import copy

import torch

from examples import gpt2
from planner import plan
from planner.profiler.memory import logical_peak
from planner.units import format_bytes


def step_in_backward(model, lr=1e-3):
    """One SGD per parameter, run as soon as its gradient is complete, which is then dropped."""
    handles = []
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=lr)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            parameter.grad = None

        handles.append(parameter.register_post_accumulate_grad_hook(step))
    return handles


def main(budget=0.6, steps=3, **sizes):
    """Weights after training and the peak of a step, by way of training."""
    model, args, kwargs = gpt2.build(**sizes)
    ways = {"plain": None, "planned, one stage": 1, "planned, 16 stages": 16}
    found = {}
    for name, num_stages in ways.items():
        twin = copy.deepcopy(model)
        module = twin if num_stages is None else plan(twin, budget, args, kwargs, num_stages=num_stages)
        step_in_backward(twin)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for _ in range(steps):
                module(*args, **kwargs).loss.backward()
            weights = [p.detach().clone() for p in twin.parameters()]
            peak = logical_peak(lambda module=module: module(*args, **kwargs).loss.backward(), torch.device("cpu"))
        found[name] = (weights, peak)
        print(f"{name:20} peak above what is resident {format_bytes(peak)}")
    return found


if __name__ == "__main__":
    main()
