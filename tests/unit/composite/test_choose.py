"""Which submodules the user means."""

import pytest
from torch import nn

from planner import InputError
from planner.composite.choose import chosen, largest, repeated


def net():
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([block(), block()]), nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("units", "names"),
    [
        ("1.0", ["1.0"]),
        (["1.1", "0"], ["0", "1.1"]),
        (nn.Sequential, ["1.0", "1.1"]),
        ((nn.LayerNorm, nn.Sequential), ["1.0", "1.1", "2"]),
        ({nn.LayerNorm}, ["2"]),
    ],
)
def test_names_and_classes_in_the_order_of_the_model(units, names):
    assert list(chosen(net(), units)) == names


def test_defaults():
    assert repeated(net()) == ("1.0", "1.1") and largest(net()) == ("0", "1", "2")
    assert repeated(nn.Sequential(nn.Linear(4, 4))) == ()


def test_a_class_is_a_module_class():
    with pytest.raises(InputError, match="units holds"):
        chosen(net(), (int,))
