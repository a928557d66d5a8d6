"""A model that plans itself at its first training call: for frameworks that decide themselves what they call it with."""

import functools

import torch

from planner import install, plan


def plan_at_first_call(model, budget, done=None, **options):
    """Plan `model` for its first call in training, just as it comes, and install the plan; that call already runs planned.

    A trainer adds arguments, casts, moves and wraps autocast around the forward: seen from inside the call, nothing of that
    has to be known. Calls before it (a validation pass) run as ever. `done(planned, args, kwargs)` is told; options: `plan`'s.
    """
    own = vars(model).get("forward")  # what a framework put on this instance, else its class's
    planned_forward = None

    @functools.wraps(model.forward)
    def first(*args, **kwargs):
        nonlocal planned_forward
        if planned_forward is not None:  # called by what a framework wrapped around this function
            return planned_forward(*args, **kwargs)
        if not (model.training and torch.is_grad_enabled()):
            return first.__wrapped__(*args, **kwargs)
        outer = model.forward
        if own is None:
            del model.forward
        else:
            model.forward = own
        try:
            planned = plan(model, budget, args, kwargs, **options)
            install(model, planned, strict=True)
            planned_forward = model.forward
        finally:
            if outer is not first:  # accelerate.prepare, say, put an autocast around it: that stays
                model.forward = outer
        if done is not None:
            done(planned, args, kwargs)
        return planned_forward(*args, **kwargs)

    model.forward = first
