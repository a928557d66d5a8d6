"""What an exported file refuses, and what cannot be exported: each error says what differs or what stands in the way."""

import copy

import pytest
import torch
from torch import nn

from planner import ExportError, InputError, export_source, plan
from planner.graph.schedule import Schedule
from tests.support.export_cases import by_schedule, step_of, write


def untie(module: nn.Module) -> None:
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: m(x[:1]), r"tokens is torch.int64 \[1, 6\] .*, and was torch.int64 \[2, 6\] .* when planned"),
        (lambda m, x: m(x.tolist()), "tokens is a list, and was a tensor when planned"),
        (lambda m, x: m(x.t().contiguous().t()), "tokens has strides"),
        (lambda m, x: m.eval()(x), "load the state_dict into the original model"),
        (lambda m, x: torch.no_grad()(m)(x), "load the state_dict into the original model"),
        (lambda m, x: m.requires_grad_(False)(x), "embed.weight is .* requires_grad=False, and was"),
        (lambda m, x: m.double()(x), "embed.weight is torch.float64"),
        (lambda m, x: (untie(m), m(x)), "added, removed or untied: head.weight"),
        (lambda m, x: torch.autocast("cpu", torch.bfloat16)(m)(x), "autocast is"),
    ],
)
def test_another_call_is_an_error_that_says_what_differs(change, message, tied_file):
    found, args = tied_file
    model = copy.deepcopy(found.model)
    with pytest.raises(found.CallError, match=message):
        change(model, *args)


@pytest.fixture(scope="module")
def tied_file(tmp_path_factory):
    planned, args, _, _ = step_of("tied", 1)
    return write(planned, tmp_path_factory.mktemp("tied") / "tied_ckpt.py"), args


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (lambda out: out["loss"].backward(create_graph=True), "no second derivative"),
        (lambda out: out["logits"].sum().backward(), "differentiates only loss"),
        (lambda out: torch.autocast("cpu", torch.bfloat16)(out["loss"].backward)(), "inside autocast"),
    ],
)
def test_a_backward_that_it_does_not_hold_is_an_error(backward, message, tied_file):
    found, args = tied_file
    out = found.model(*args)
    with pytest.raises(found.BackwardError, match=message):
        backward(out)


@pytest.mark.parametrize("written", ["argument", "body.weight"])
def test_a_write_between_forward_and_backward_is_an_error_as_in_eager(written, tied_file):
    found, args = tied_file
    model, x = copy.deepcopy(found.model), args[0].clone()
    loss = model(x)["loss"]
    with torch.no_grad():
        (x if written == "argument" else model.body.weight).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_with_a_part_that_runs_as_it_is_is_refused(tmp_path):
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4, batch_first=True), "head": nn.Linear(4, 1)})
    model.forward = lambda x: model["head"](model["rnn"](x)[0]).mean()
    planned = plan(model, 1.0, (torch.randn(2, 3, 4),), costs="estimate", progress=False)
    with pytest.raises(ExportError, match=r"the plan runs rnn \(a LSTM\) as the model has it"):
        export_source(planned, tmp_path / "model.py")
    assert not list(tmp_path.iterdir())


@torch.library.custom_op("planner_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """A kernel that plain torch does not have."""
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, grad: grad * 2)


class Custom(nn.Linear):
    def forward(self, x: torch.Tensor, settings: object = None) -> torch.Tensor:
        return doubled(super().forward(x)).sum()


class Stateful(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        assert state == 3


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (Custom(3, 3), (), "planner_tests.doubled.default, which plain torch does not have"),
        (Custom(3, 3), (object,), r"argument settings of the planned call: a type .* cannot be written"),
        (Stateful(3, 3), (), "state_dict differs from its parameters and buffers in _extra_state"),
    ],
)
def test_what_torch_alone_cannot_do_is_refused(model, args, message, tmp_path):
    planned = by_schedule((model, (torch.randn(2, 3), *args), {}), lambda graph: Schedule(tuple(range(len(graph.ops)))))
    with pytest.raises(ExportError, match=message):
        export_source(planned, tmp_path / "model.py")


def test_bad_paths_and_other_modules_are_refused(tmp_path):
    planned, _, _, _ = step_of("mlp", 0)
    for path in ("model.txt", "my-model.py", "folder/model.py", "."):
        with pytest.raises(InputError, match=r"cannot (export to|write)"):
            export_source(planned, tmp_path / path)
    with pytest.raises(InputError, match="takes the module that plan\\(\\) returned, not a Linear"):
        export_source(nn.Linear(1, 1), tmp_path / "model.py")


def test_a_step_planned_from_afar_is_exported_where_it_runs(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).train()
    planned = plan(model, 1.0, (torch.randn(4, 8),), device="H100-80GB", progress=False)
    with pytest.raises(ExportError, match=r"planned for H100-80GB, which is not here: .*`apply` it on that device"):
        export_source(planned, tmp_path / "far.py")
