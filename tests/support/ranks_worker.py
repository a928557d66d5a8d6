"""One of two processes of tests/integration/test_distributed_safety.py: runs cases, and says of each that it held."""

import sys
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from planner import InfeasibleBudgetError, NoScheduleFoundError, Plan, RanksDifferError, apply, plan
from planner.tracer.lower import backward_is_fixed, lower
from planner.tracer.real_layouts import capture

PATIENCE = timedelta(minutes=4)
"""For the other rank: ranks plan at different speeds, and the machine may be busy."""


class Block(nn.Module):
    """A sequence-parallel MLP: gather the tokens, work on all, scatter back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x):
        full = collectives.all_gather_tensor_autograd(self.norm(x), 0, dist.group.WORLD)
        back = collectives.reduce_scatter_tensor_autograd(self.down(F.gelu(self.up(full))), "sum", 0, dist.group.WORLD)
        return x + back


class Sliced(nn.Module):
    """Every rank works on its own columns: which, stands in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        mine = F.gelu(torch.tanh(self.up(x)).narrow(1, 32 * dist.get_rank(), 32))
        full = collectives.all_gather_tensor_autograd(mine, 0, dist.group.WORLD)
        return x + self.down(full.view(x.shape))


@torch.library.custom_op("test_ranks::summed", mutates_args=())
def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, by a collective that no graph shows."""
    out = x.clone()
    dist.all_reduce(out)
    return out


summed.register_fake(torch.empty_like)
summed.register_autograd(lambda ctx, grad: summed(grad))


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.down(F.gelu(torch.ops.test_ranks.summed(torch.tanh(self.up(x)))))


def build(block=Block, depth=2):
    torch.manual_seed(0)
    return nn.Sequential(*[block() for _ in range(depth)])


def batch(rank):
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(rank))


def train(module, rank, steps=3):
    """Every loss, gradient and parameter of a few steps."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-2)
    torch.manual_seed(11 + rank)
    seen = []
    for step in range(steps):
        loss = module(batch(rank) + step).square().mean()
        loss.backward()
        seen += [loss.detach().clone(), *(whole(p.grad).clone() for p in module.parameters())]
        optimizer.step()
        optimizer.zero_grad()
        seen += [whole(p.detach()).clone() for p in module.parameters()]
    return seen


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_same(expected, found):
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))


def lowest(model, rank, start=0.7, **options):
    options = {"costs": "estimate", "progress": False, "effort": 1, **options}
    for budget in (start, 0.8, 0.9):
        try:
            return plan(model, budget, (batch(rank),), **options)
        except (InfeasibleBudgetError, NoScheduleFoundError):
            continue
    return plan(model, 1.0, (batch(rank),), **options)


def is_communication(name):
    return any(part in name for part in ("all_gather", "reduce_scatter", "summed"))


def check_order(planned):
    """Collectives stand in the captured order, each once."""
    plan = planned.plan
    names = [op.name for op in plan.graph.ops if is_communication(op.name)]
    assert names
    assert [name for i in plan.solution.schedule.steps if is_communication(name := plan.graph.ops[i].name)] == names


def same_plans(rank, _folder):
    for block in (Block, Hiding):
        expected = train(build(block), rank)
        joint = capture(build(block), (batch(rank),))
        assert backward_is_fixed(joint)
        assert not any(op.recomputable for op in lower(joint).ops if is_communication(op.name))
        planned = lowest(build(block), rank)
        assert planned.plan.solution.schedule.recomputes()
        check_order(planned)
        check_same(expected, train(planned, rank))


def different_plans(rank, _folder):
    for block in (Block, Sliced):
        whole = partial(plan, build(block, 4), 1.0, (batch(rank),), costs="estimate", progress=False)
        planned = whole() if rank else lowest(build(block, 4), rank)
        assert bool(planned.plan.solution.schedule.recomputes()) == (rank == 0)
        dist.monitored_barrier(timeout=PATIENCE)  # on a busy machine one rank may be more than 10 s behind the other
        try:
            train(planned, rank)
        except RanksDifferError as error:
            assert f"ranks {rank} and {1 - rank} run different plans" in str(error)
            continue
        raise AssertionError(f"ranks trained {block.__name__} by different plans")


def one_plan_for_all(rank, folder):
    """Rank 0 plans alone, by measured costs, while the other waits: nothing that it runs for that communicates."""
    for block in (Block, Hiding, Sliced):
        path = f"{folder}/{block.__name__}.json"
        if rank == 0:
            lowest(build(block), rank, costs="measure").plan.save(path)
        dist.monitored_barrier(timeout=PATIENCE)
        planned = apply(Plan.load(path), build(block), (batch(rank),))
        check_same(train(build(block), rank), train(planned, rank))


def one_rank_unplanned(rank, _folder):
    planned = lowest(build(), rank)
    check_same(train(build(), rank), train(planned.original if rank else planned, rank))


def ddp(rank, _folder):
    """DDP's own collectives do not depend on the plan: ranks may hold different ones."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)])

    expected = train(DistributedDataParallel(model(), bucket_cap_mb=0.02), rank)
    planned = lowest(model(), rank, 0.7 if rank else 0.95)
    assert bool(planned.plan.solution.schedule.recomputes()) or rank == 0
    check_same(expected, train(DistributedDataParallel(planned, bucket_cap_mb=0.02), rank))
    wrapped = DistributedDataParallel(model(), bucket_cap_mb=0.02)
    planned = lowest(wrapped.module, rank)  # the line that the refusal of a wrapped model shows
    check_same(expected, train(DistributedDataParallel(planned, bucket_cap_mb=0.02), rank))


def fsdp(rank, _folder):
    """The lines that the refusal of a sharded model shows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from planner import install

    mesh = init_device_mesh("cpu", (2,))

    def model():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)])

    def sharded(module):
        for block in module:
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    expected = train(sharded(model()), rank)
    planned = model()
    for i, block in enumerate(planned):
        x = batch(rank).requires_grad_(i > 0)
        install(block, plan(block, 1.0, (x,), costs="estimate", progress=False), strict=True)
    check_same(expected, train(sharded(planned), rank))


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # 2.13 gives functional collectives other names
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE)
    for case in sys.argv[3:]:
        globals()[case](rank, folder)
        print(case, "held")
    dist.destroy_process_group()
