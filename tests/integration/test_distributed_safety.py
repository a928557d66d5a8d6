"""Wrappers are refused, and what communicates inside a step is neither repeated, nor moved, nor run while planning."""

import os
import subprocess
import sys
from subprocess import PIPE, STDOUT

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from planner import InputError, apply, plan
from planner.tracer.real_layouts import capture


@pytest.mark.parametrize(
    "cases",
    [("same_plans", "one_plan_for_all", "one_rank_unplanned", "ddp", "fsdp"), ("different_plans",)],
    ids=",".join,
)
def test_two_processes(cases: tuple[str, ...], tmp_path) -> None:
    """Several cases in each pair of processes, which take longer to start than a case."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", "-m", "tests.support.ranks_worker"]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path), *cases], env=environment, stdout=PIPE, stderr=STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240 * len(cases))[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    assert all(text.endswith("".join(f"{case} held\n" for case in cases)) for text in said), said


@pytest.fixture
def alone(monkeypatch):
    """This process as the only rank."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 2))


CPU = torch.device("cpu")
WRAPPERS = {
    "ddp": (
        DistributedDataParallel,
        r"^plan what it wraps, planned = plan\(model{}\.module, budget, args\); model = DistributedDataParallel\(planned\)",
    ),
    "data_parallel": (nn.DataParallel, r"^use a process for each device: planned = plan\(model{}\.module"),
    "fsdp1": (lambda m: FullyShardedDataParallel(m, device_id=CPU), "then fully_shard"),
    "fsdp2": (lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))), "then fully_shard"),
    "dtensors": (lambda m: parallelize_module(m, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()}), "is a DTensor"),
    "flat_parameters": (lambda m: FullyShardedDataParallel(m, device_id=CPU).module, "is a FlatParameter"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_wrappers_are_refused_with_the_lines_that_work(name: str, alone) -> None:
    wrap, words = WRAPPERS[name]
    args = (torch.randn(4, 8),)
    with pytest.raises(InputError, match=words.format("")):
        plan(wrap(model()), 1.0, args, costs="estimate", progress=False)
    inner = model()
    inner[1] = wrap(inner[1])
    with pytest.raises(InputError, match=words.format(r"\.1")):
        plan(inner, 1.0, args, costs="estimate", progress=False)
    made = plan(model(), 1.0, args, costs="estimate", progress=False).plan
    with pytest.raises(InputError, match=words.format("")):
        apply(made, wrap(model()), args)


class Communicating(nn.Module):
    def __init__(self, communicate) -> None:
        super().__init__()
        self.layer, self.communicate = nn.Linear(8, 8), communicate

    def forward(self, x):
        return self.communicate(self.layer(x))


def reduced(y):
    y = y.clone()
    dist.all_reduce(y)
    return y


def gathered(y):
    out = [torch.empty_like(y)]
    dist.all_gather(out, y.detach())
    return y + out[0]


def told(y):
    out = [None]
    dist.all_gather_object(out, 3)
    return y * out[0]


def waited(y):
    dist.barrier()
    return y


@pytest.mark.parametrize("communicate", [reduced, gathered, told, waited])
def test_collectives_that_write_in_place_are_refused_by_name(communicate, alone) -> None:
    with pytest.raises(InputError, match=r"c10d\..*collectives write in place"):
        plan(nn.Sequential(Communicating(communicate)), 1.0, (torch.randn(4, 8),), costs="estimate", progress=False)


def test_collectives_beside_modules_that_run_as_they_are_are_refused(alone) -> None:
    model = nn.Sequential(Communicating(lambda y: collectives.all_reduce(y, "sum", dist.group.WORLD)), nn.LSTM(8, 8))
    model[1].register_forward_hook(lambda module, args, out: out[0])
    with pytest.raises(InputError, match="the model communicates"):
        plan(model, 1.0, (torch.randn(4, 3, 8),), costs="estimate", progress=False)


def test_a_wait_is_no_storage_of_its_own(alone) -> None:
    module = Communicating(lambda y: collectives.all_reduce(y, "sum", dist.group.WORLD))
    joint = capture(module, (torch.randn(4, 8),))
    from planner.tracer.storage import Storages

    storages = Storages(joint.graph)
    waits = [node for node in joint.graph.nodes if "wait_tensor" in str(node.target)]
    assert waits
    assert all(storages.is_view(node) for node in waits)


def test_a_collective_whose_result_is_not_used_still_runs(alone) -> None:
    def communicate(y):
        collectives.all_reduce(y.detach(), "sum", dist.group.WORLD)
        return y

    joint = capture(Communicating(communicate), (torch.randn(4, 8),))
    assert any("all_reduce" in str(node.target) for node in joint.graph.nodes)
