"""Refusals that leave the model as it was."""

import pytest
import torch

from planner import plan


def snapshot(model):
    """Everything about a model that planning must not change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "forward": type(model).forward,
    }


def assert_untouched(before, model):
    after = snapshot(model)
    for name in ("grads", "modes", "attributes", "hooks", "forward"):
        assert before[name] == after[name], name
    assert torch.equal(before["rng"], after["rng"])
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name


def refused(error, match, model, budget, args=(), kwargs=None, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        plan(model, budget, args, kwargs or {}, costs="estimate", progress=False, **options)
    assert_untouched(before, model)
    return caught.value
