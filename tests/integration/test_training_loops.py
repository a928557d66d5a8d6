"""Training loops as people write them, next to an unplanned twin: losses, weights, buffers and random state are bit-equal."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from planner import install, plan
from planner.graph.floor import floor
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from tests.support import models
from tests.support.training import assert_same

STEPS = 4
MODELS = ("attention", "convolution", "tied")


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype is not None else nullcontext()


@functools.cache
def twins(name, dtype):
    """A model, its twin with a plan that recomputes (a call that would run unplanned is an error), and their call."""
    model, args, kwargs = models.build(name)
    planned = copy.deepcopy(model)
    with autocast(dtype):
        graph = plan(planned, 1.0, args, kwargs, costs="estimate", progress=False, check=False).plan.graph
        least, plain = floor(graph)[0], simulate(graph, keep_all(graph)).peak_bytes
        module = plan(planned, (least + plain) // 2, args, kwargs, costs="estimate", progress=False, check=False)
    assert module.plan.solution.schedule.recomputes()
    install(planned, module, strict=True)
    return model, planned, args, kwargs


def check(loop, name, dtype=None):
    """`loop(model, step, seen)` trains, and may add what it saw; `step()` is the loss of a forward on the next batch."""
    *both, args, kwargs = twins(name, dtype)
    found = []
    for twin in copy.deepcopy(both):
        seen = []

        def step(twin=twin, seen=seen):
            batch = [x + torch.randn_like(x) if x.is_floating_point() else x[:, torch.randperm(x.shape[1])] for x in args]
            with autocast(dtype):
                loss = twin(*batch, **kwargs)["loss"]
            seen.append(loss.detach().clone())
            return loss

        with torch.random.fork_rng():
            torch.manual_seed(5)
            loop(twin, step, seen)
            found.append([*seen, *(tensor.clone() for tensor in twin.state_dict().values()), torch.get_rng_state()])
        assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), both[0].parameters(), strict=True))
    assert_same(*found)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, ("foreach", "fused")),
    "adam": (torch.optim.Adam, {"amsgrad": True}, ("foreach", "fused")),
    "adamw": (torch.optim.AdamW, {}, ("foreach", "fused")),
    "adagrad": (torch.optim.Adagrad, {}, ("foreach", "fused")),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}, ("foreach",)),
    "adafactor": (torch.optim.Adafactor, {}, ("foreach",)),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("optimizer", "way"), [(name, way) for name, (*_, ways) in OPTIMIZERS.items() for way in ways])
def test_optimizers(optimizer, way, name):
    make, options, _ = OPTIMIZERS[optimizer]

    def loop(model, step, seen):
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.01, **options, **{way: True})
        for _ in range(STEPS):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()

    check(loop, name)


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_that_calls_the_step_itself(name):
    def loop(model, step, seen):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = step()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)

    check(loop, name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation(set_to_none, name):
    def loop(model, step, seen):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            for _ in range(3):
                loss = step()
                loss /= 3  # in place, as many write it
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    check(loop, name)


@pytest.mark.filterwarnings("ignore:.*forwards wait")
@pytest.mark.parametrize("name", ["attention", "convolution"])  # a tied weight's gradients are summed in another order
def test_two_batches_in_one_backward(name):
    def loop(model, step, seen):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (step() + 0.5 * step()).backward()
            optimizer.step()

    check(loop, name)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaler_and_autocast_with_accumulation(dtype, name):
    def loop(model, step, seen):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        scales = []
        for turn in range(2 * STEPS):
            for _ in range(2):
                loss = step() * (float("inf") if turn == 3 else 0.5)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            optimizer.zero_grad()
        assert scales[2:4] == [2.0**9, 2.0**8]  # it grew, and fell after the step that overflowed
        seen.append(torch.tensor(scales))

    check(loop, name, dtype)


CLIPS = {
    "norm, foreach": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1, foreach=True),
    "norm, loop": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1, foreach=False),
    "infinity norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1, norm_type=float("inf")),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping(clip, name):
    def loop(model, step, seen):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            step().backward()
            norm = CLIPS[clip](model.parameters())
            seen += [] if norm is None else [norm]
            optimizer.step()

    check(loop, name)


AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "swa": {},  # torch cannot average integer buffers evenly
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_weights(average, name):
    def loop(model, step, seen):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        averaged = AveragedModel(model, **AVERAGES[average])  # copies the model, with its plan
        for _ in range(STEPS):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
            averaged.update_parameters(model)
        seen += averaged.state_dict().values()

    check(loop, name)
