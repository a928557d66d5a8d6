"""`planner solve` on a saved plan: what it makes can be applied, and keeps what the file says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from planner import Plan, Sweep, apply, plan
from planner.cli import main
from planner.results import plan_file
from tests.support import graphs


class _Noise(torch.autograd.Function):
    """Adds noise to the gradient: the backward draws random numbers, so its order is fixed."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-3 * torch.randn_like(gradient)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 1)

    def forward(self, x):
        x = _Noise.apply(x)
        rows = [torch.tanh(layer(x)) * torch.sigmoid(layer(x)) for layer in self.layers]
        return self.head(torch.cat(rows, 1).view(-1, 64)).mean()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(512, 64, requires_grad=True)
    made = plan(model, 0.9, (x,), costs="estimate", progress=False, check=False).plan
    made.save(tmp_path / "plan.json")
    return model, x, made, tmp_path / "plan.json", tmp_path / "solved.json"


def test_a_plan_made_of_a_file_is_applied_although_its_backward_must_not_move(saved, capsys):
    model, x, made, source, out = saved
    assert made.graph.backward_is_fixed
    assert main(["solve", str(source), "--budget", "0.85", "--save", str(out)]) == 0
    planned = apply(Plan.load(out), model, (x,))
    torch.manual_seed(1)
    planned(x).backward()
    found, x.grad = x.grad, None
    torch.manual_seed(1)
    model(x).backward()
    assert torch.equal(found, x.grad)


def test_what_the_file_says_is_kept(saved, capsys):
    _, _, made, source, out = saved
    assert main(["solve", str(source), "--budget", "0.85", "--save", str(out)]) == 0
    solved = Plan.load(out)
    assert (solved.provenance, solved.margin_bytes) == (made.provenance, made.margin_bytes) and made.provenance is not None
    assert solved.peak_bytes <= solved.budget_bytes - solved.margin_bytes
    assert main(["solve", str(source), "--sweep", "3", "--save", str(out)]) == 0
    swept = Sweep.load(out)
    assert swept.provenance == made.provenance and len(swept.points) >= 2


def test_whether_the_backward_may_move_is_in_the_file():
    graph = graphs.chain()
    assert not plan_file.read_graph(plan_file.read_document(plan_file.dumps(graph), "a test"), "a test").backward_is_fixed


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text(plan_file.dumps(graphs.blocks(8)))
    script = "import sys; from planner.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "solve", str(path), "--sweep", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
