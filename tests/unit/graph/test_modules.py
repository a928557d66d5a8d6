"""Rows of equal modules."""

from planner.graph.modules import kinds_of


def test_numbers_stand_for_layers_and_not_for_the_members_of_a_sequential():
    paths = ["h.0", "h.0.mlp", "h.1", "h.1.mlp", "net.0", "net.1", "blocks.0.0", "blocks.1.1", "layer1.0.conv2", "(top)"]
    assert kinds_of(paths) == {
        "h.0": "h.*",
        "h.0.mlp": "h.*.mlp",
        "h.1": "h.*",
        "h.1.mlp": "h.*.mlp",
        "net.0": "net.0",
        "net.1": "net.1",
        "blocks.0.0": "blocks.*.0",
        "blocks.1.1": "blocks.*.1",
        "layer1.0.conv2": "layer*.*.conv*",
        "(top)": "(top)",
    }


def test_numbers_at_the_top():
    assert kinds_of(["0", "1.0"]) == {"0": "*", "1.0": "*.0"}
