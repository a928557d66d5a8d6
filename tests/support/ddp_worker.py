"""One process of tests/integration/test_ddp.py: compares a plain and a planned copy under DistributedDataParallel."""

import copy
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from planner import plan
from tests.support import models
from tests.support.training import loss_of


def train(module, args, kwargs, steps=3):
    """Gradients (averaged over processes) and parameters after every step, and how the buckets came."""
    wrapped, buckets = DistributedDataParallel(module, bucket_cap_mb=0.0005), []
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)

    def count(state, bucket):
        buckets.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / 2)

    wrapped.register_comm_hook(None, count)
    seen = []
    torch.manual_seed(11)
    for _ in range(steps):
        loss_of(wrapped(*args, **kwargs)).backward()
        seen += [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        seen += [p.detach().clone() for p in wrapped.parameters()]
    return seen, buckets


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, args, kwargs = models.build("attention")
    planned = plan(copy.deepcopy(model), 0.85, args, kwargs, costs="estimate", progress=False)
    assert planned.plan.solution.schedule.recomputes()
    args = tuple(arg + rank if arg.is_floating_point() else arg for arg in args)  # every process has data of its own
    expected, _ = train(model, args, kwargs)
    found, buckets = train(planned, args, kwargs)
    assert len(expected) == len(found)
    different = sum(not torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(set(buckets)) > 2
    dist.destroy_process_group()
    print(f"{len(found)} tensors, {different} different")
    return different


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
