"""Which submodules the user means."""

import pytest
from torch import nn

from planner import InputError
from planner.composite.unit_names import largest, named_units, repeated


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
    assert list(named_units(net(), units)) == names


def aliased():
    """The last block has two names, and so has a layer, the first of them outside of its block."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())]))
    model[1][0].append(model[0])
    model.last = model[1][1]
    return model


@pytest.mark.parametrize(
    ("units", "names"),
    [("last", ["1.1"]), (["last", "1.1", "1.0"], ["1.0", "1.1"]), (nn.Sequential, ["1.0", "1.1"]), ("1.0.1", ["0"])],
)
def test_a_module_with_several_names_has_the_first(units, names):
    assert list(named_units(aliased(), units)) == names


def test_a_module_inside_another_is_found_by_each_of_its_names():
    with pytest.raises(InputError, match=r"units: 0 lies inside 1\.0"):
        named_units(aliased(), ["0", "1.0"])
    inner = nn.Sequential(nn.Linear(4, 4))
    assert named_units(nn.Sequential(inner, nn.Sequential(inner)), nn.Sequential) == ("1",)


def test_defaults():
    assert repeated(net()) == ("1.0", "1.1") and largest(net()) == ("0", "1", "2")
    assert repeated(nn.Sequential(nn.Linear(4, 4))) == ()


def test_a_class_is_a_module_class():
    with pytest.raises(InputError, match="units holds"):
        named_units(net(), (int,))
