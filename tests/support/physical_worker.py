"""A process of its own for tests/integration/test_physical_peak.py: the operating system's count of a planned step."""

import pickle
import sys
from pathlib import Path

import torch

from benchmarks.memory import physical_peak
from planner.graph.graph import Kind


def main(pickled):
    torch.set_num_threads(1)
    planned, args = pickle.loads(Path(pickled).read_bytes())
    graph = planned.plan.graph
    resident = sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)

    def step():
        planned(*args)["loss"].backward()
        planned.zero_grad()

    step()
    step()
    print(resident + physical_peak(step), planned.plan.budget_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
