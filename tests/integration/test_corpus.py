"""The solver benchmarks' graphs: every committed file reads back, and one made anew is the committed one."""

import pytest

from benchmarks import corpus
from planner._compat.fake_tensors import FakeTensor
from planner.graph.graph import Graph
from planner.results.plan_file import load_graph


def anonymous(graph: Graph) -> list[object]:
    """All that a solver sees of a graph, without the names, which differ between torch releases."""
    number = {value.name: v for v, value in enumerate(graph.values)}
    rows: list[object] = [(value.nbytes, value.kind) for value in graph.values]
    for op in graph.ops:
        touched = tuple(number[name] for name in op.reads), tuple(number[name] for name in op.writes)
        rows.append((*touched, op.cost_ns, op.workspace_bytes, op.recomputable))
    return [*rows, graph.num_forward_ops]


def test_a_model_captured_anew_without_storage_gives_the_committed_graph():
    model, args, kwargs = corpus.build("gpt2-1")
    assert all(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers(), *kwargs.values()))
    made, committed = corpus.graph_of((model, args, kwargs)), load_graph(corpus.graph_path("gpt2-1"))
    assert anonymous(made) == anonymous(committed)


def test_there_is_a_file_for_every_model_and_no_other():
    assert {path.name for path in corpus.GRAPHS.iterdir()} == {corpus.graph_path(name).name for name in corpus.MODELS}


@pytest.mark.parametrize("name", corpus.MODELS)
def test_committed_graphs_read_back(name):
    graph = load_graph(corpus.graph_path(name))
    assert 0 < graph.num_forward_ops < len(graph.ops)
    assert all(op.cost_ns > 0 for op in graph.ops)
