import importlib

import pytest
import torch

SMALL = {
    "gpt2": {"layers": 2, "width": 32, "length": 16, "vocabulary": 64},
    "llama": {"layers": 2, "width": 32, "length": 16, "vocabulary": 64},
    "bert": {"layers": 2, "width": 32, "length": 16, "vocabulary": 64},
    "vit": {"layers": 2, "width": 24, "pixels": 32, "batch": 2, "classes": 5},
    "resnet50": {"layers": (1, 1, 1, 1), "width": 8, "pixels": 32, "batch": 2, "classes": 5},
    "unet": {"layers": 2, "width": 8, "pixels": 32, "batch": 1},
}


def build(name):
    return importlib.import_module(f"examples.{name}").build(**SMALL[name])


def loss_of(output):
    return output if isinstance(output, torch.Tensor) else output.loss


@pytest.mark.parametrize("name", SMALL)
def test_trains_one_step(name):
    model, args, kwargs = build(name)
    assert model.training
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = loss_of(model(*args, **kwargs))
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.isfinite().all(), key
    assert any(not torch.equal(before[key], parameter) for key, parameter in model.named_parameters())


@pytest.mark.parametrize("name", SMALL)
def test_build_is_deterministic_and_leaves_the_rng_alone(name):
    state = torch.get_rng_state()
    first = build(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = build(name)
    tensors = [[*model.state_dict().values(), *args, *kwargs.values()] for model, args, kwargs in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "unet"])
def test_dropout_draws_from_the_rng_unless_it_is_zero(name):
    draws = {}
    for dropout in (0.0, 0.1):
        model, args, kwargs = importlib.import_module(f"examples.{name}").build(**SMALL[name], dropout=dropout)
        state = torch.get_rng_state()
        model(*args, **kwargs)
        draws[dropout] = not torch.equal(torch.get_rng_state(), state)
    assert draws == {0.0: False, 0.1: True}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_output_holds_only_loss_and_logits(name):
    model, args, kwargs = build(name)
    assert list(model(*args, **kwargs).keys()) == ["loss", "logits"]
