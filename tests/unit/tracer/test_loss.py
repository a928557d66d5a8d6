"""Which output backward starts from: found, named, by position, at the shell; and what an error says."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner import InputError, plan, verify
from planner.cli import main
from tests.support.text import without_stages

OPTIONS = {"costs": "estimate", "progress": False, "effort": 1.0}
Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """Body, then whatever `shape` makes of (logits [6, 3], loss [])."""

    def __init__(self, shape):
        super().__init__()
        self.body, self.shape = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), shape

    def forward(self, x):
        logits = self.body(x)
        return self.shape(logits, nn.functional.cross_entropy(logits, x.argmax(-1) % 3))


def planned(shape, **options):
    torch.manual_seed(0)
    return plan(Net(shape), 1.0, (torch.randn(6, 4),), **OPTIONS, **options)


def names(module):
    return [module.step.joint.outputs[i].name for i in module.differentiated]


def refusal(shape, **options):
    with pytest.raises(InputError) as caught:
        planned(shape, **options)
    return str(caught.value)


def test_what_a_refusal_lists_can_be_passed():
    def by_number(logits, loss):
        return {7: logits, "[0]": loss}

    message = refusal(by_number, loss="nothing")
    assert "loss='[7]': float32[6, 3]" in message and "loss='[0]': float32[]" in message
    assert names(planned(by_number, loss="[7]")) == ["[7]"] and names(planned(by_number, loss="[0]")) == ["[0]"]


DEFAULTS = {
    "a tensor": (lambda logits, loss: logits, ["the output"]),
    "nanoGPT": (lambda logits, loss: (logits, loss), ["[1]"]),
    "loss first": (lambda logits, loss: (loss, logits), ["[0]"]),
    "with a scalar that needs no gradient": (lambda logits, loss: (logits, loss, loss.detach() * 2), ["[1]"]),
    "nested": (lambda logits, loss: {"out": [logits, {"total": loss}]}, ["['out'][1]['total']"]),
    "named in a dict": (lambda logits, loss: {"aux": loss * 2, "loss": loss}, ["loss"]),
    "two scalars": (lambda logits, loss: (logits, loss, loss * 2), ["[0]", "[1]", "[2]"]),
    "no scalar": (lambda logits, loss: (logits, logits * 2), ["[0]", "[1]"]),
    "one element is no scalar": (lambda logits, loss: (logits, loss[None]), ["[0]", "[1]"]),
    "a scalar twice": (lambda logits, loss: (loss, logits, loss), ["[0]", "[2]"]),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", DEFAULTS)
def test_the_output_that_backward_starts_from_by_default(case):
    shape, expected = DEFAULTS[case]
    module = planned(shape)
    assert names(module) == expected
    assert verify(module, (torch.randn(6, 4),), rounds=1).exact


def test_nanogpt_trains_without_naming_its_loss():
    module, x = planned(lambda logits, loss: (logits, loss)), torch.randn(6, 4)
    eager = Net(lambda logits, loss: (logits, loss))
    eager.load_state_dict(module.state_dict())
    for trained in (module, eager):
        trained(x)[1].backward()
    for one, other in zip(module.original.parameters(), eager.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("loss", [1, -1, np.int64(1), "[1]", lambda out: out[1]])
def test_positions_of_a_tuple(loss):
    assert names(planned(lambda logits, loss: (logits, loss, loss.detach())[:2], loss=loss)) == ["[1]"]


def test_positions_of_other_outputs():
    assert names(planned(lambda logits, loss: {"a": logits, "b": loss}, loss=1)) == ["b"]
    assert names(planned(lambda logits, loss: Pair(logits, loss), loss=1)) == ["second"]
    assert names(planned(lambda logits, loss: ((logits, logits * 2), loss), loss=1)) == ["[1]"]
    assert names(planned(lambda logits, loss: ((logits, loss), logits * 2), loss="[0][1]")) == ["[0][1]"]
    assert names(planned(lambda logits, loss: logits, loss=0)) == ["the output"]


def test_names():
    assert names(planned(lambda logits, loss: {"items": logits, "b": loss}, loss="items")) == ["items"]
    assert names(planned(lambda logits, loss: Pair(logits, loss), loss="first")) == ["first"]
    assert names(planned(lambda logits, loss: {"a": {"b": loss, "c": loss * 2}}, loss="['a']['c']")) == ["['a']['c']"]


@pytest.mark.parametrize("loss", ["T", "mean", "grad", "objective"])
def test_what_a_tensor_has_besides_is_no_output(loss):
    assert f"the model's output has no '{loss}'" in refusal(lambda logits, loss: logits, loss=loss)


def test_an_error_lists_the_outputs_and_what_to_pass():
    message = refusal(lambda logits, loss: (logits, loss.detach(), loss, {"n": logits[0]}), loss=7)
    assert message == (
        "the model's output has no position 7. Its outputs: loss=0: float32[6, 3], requires grad; loss=1: float32[], does not "
        "require grad; loss=2: float32[], requires grad; loss=\"[3]['n']\": float32[3], requires grad. Pass the one that "
        "backward starts from (at the shell, --loss 2)"
    )
    message = refusal(lambda logits, loss: {"logits": logits, "n": loss.detach()}, loss="n")
    assert "the output named by loss='n' does not require grad" in message and "loss='logits': float32[6, 3]" in message
    assert "does not require grad: nothing" in refusal(lambda logits, loss: {"logits": logits, "loss": loss.detach()})
    assert "no output of the model requires grad" in refusal(lambda logits, loss: (logits.detach(), 3))
    assert "without a tensor" in refusal(lambda logits, loss: {"n": 3})


def test_a_function_that_fails_or_picks_something_else():
    assert "(KeyError: 'nothing')" in refusal(lambda logits, loss: {"a": logits}, loss=lambda out: out["nothing"])
    made = refusal(lambda logits, loss: {"a": logits}, loss=lambda out: out["a"].sum())
    assert "found a tensor that is not among its outputs" in made
    assert "cannot be applied" in refusal(lambda logits, loss: {"a": logits}, loss=lambda out: None)


def test_many_outputs_are_not_all_listed():
    message = refusal(lambda logits, loss: [logits + i for i in range(50)], loss="x")
    assert "; 42 more. Pass" in message and len(message) < 700


@dataclass
class Bare:
    """Registered without key functions, as diffusers does."""

    logits: torch.Tensor
    total: torch.Tensor


pytree.register_pytree_node(Bare, lambda b: ([b.logits, b.total], None), lambda values, _: Bare(*values))


def test_outputs_without_key_functions_have_names_too():
    assert names(planned(Bare)) == ["total"]
    assert names(planned(Bare, loss="logits")) == ["logits"]
    assert names(planned(Bare, loss=0)) == ["logits"]
    assert names(planned(lambda logits, loss: [Bare(logits, loss)])) == ["[1]"]
    assert "loss='logits': float32[6, 3]" in refusal(Bare, loss="nothing")


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.body(x)
        return logits, logits.square().mean(), logits.abs().mean()

def build():
    return Net(), (torch.randn(6, 4),), {}
"""


@pytest.mark.parametrize(("loss", "code", "said"), [("1", 0, "peak"), ("[2]", 0, "peak"), ("9", 1, "--loss 1")])
def test_at_the_shell(tmp_path, capsys, loss, code, said):
    file = tmp_path / f"net_{code}.py"
    file.write_text(MODEL)
    assert main(["plan", f"{file}:build", "--budget", "1.0", "--costs", "estimate", "--loss", loss]) == code
    streams = capsys.readouterr()
    assert said in streams.out + streams.err
    assert len(without_stages(streams.err)) == code


class TwoHeads(nn.Module):
    """Features, a reconstruction, and a scalar that depends on some of the parameters."""

    def __init__(self, scalar):
        super().__init__()
        self.encoder, self.decoder, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(()))
        self.scalar = scalar

    def forward(self, x):
        code = self.encoder(x)
        out = self.decoder(code.tanh())
        return out, self.scalar(self, code, out)


SCALARS = {
    "a term of the loss": (lambda model, code, out: code.square().mean(), ["[0]", "[1]"]),
    "a scale": (lambda model, code, out: model.scale.exp(), ["[0]", "[1]"]),
    "the loss": (lambda model, code, out: out.square().mean(), ["[1]"]),
    "the loss, and more": (lambda model, code, out: out.square().mean() + model.scale, ["[1]"]),
}


@pytest.mark.parametrize(("scalar", "expected"), SCALARS.values(), ids=SCALARS.keys())
def test_a_scalar_is_the_loss_if_it_depends_on_all_that_the_outputs_depend_on(scalar, expected):
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    model, eager = TwoHeads(scalar), TwoHeads(scalar)
    eager.load_state_dict(model.state_dict())
    module = plan(model, 1.0, (x,), **OPTIONS)
    assert names(module) == expected
    for net in (module, eager):
        out, term = net(x)
        (term if len(expected) == 1 else out.square().mean() + term).backward()
    for one, other in zip(module.parameters(), eager.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)
