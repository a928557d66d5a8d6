"""The solver benchmarks' graphs: every committed file reads back, and one made anew is the committed one."""

import pytest

from benchmarks import corpus
from planner._torch import FakeTensor
from planner.graph.planfile import fingerprint, load_graph


def test_a_model_captured_anew_without_storage_gives_the_committed_graph():
    model, args, kwargs = corpus.build("gpt2-1")
    assert all(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers(), *kwargs.values()))
    made, committed = corpus.graph_of((model, args, kwargs)), load_graph(corpus.graph_path("gpt2-1"))
    assert fingerprint(made) == fingerprint(committed)
    assert [(op.cost_ns, op.workspace_bytes) for op in made.ops] == [(op.cost_ns, op.workspace_bytes) for op in committed.ops]


def test_there_is_a_file_for_every_model_and_no_other():
    assert {path.name for path in corpus.GRAPHS.iterdir()} == {corpus.graph_path(name).name for name in corpus.MODELS}


@pytest.mark.parametrize("name", corpus.MODELS)
def test_committed_graphs_read_back(name):
    graph = load_graph(corpus.graph_path(name))
    assert 0 < graph.num_forward_ops < len(graph.ops)
    assert all(op.cost_ns > 0 for op in graph.ops)
