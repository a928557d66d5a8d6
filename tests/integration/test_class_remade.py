"""Hooks and functions that are made again: the same for the forward, unless what they hold is different."""

import pytest

from tests.support.members import GUARDED, check, ids, member
from tests.support.source import Step

SCALING = "def scaling(k):\n    return lambda module, args, out: out * k\n"
ACT = "def times(k, cell=None):\n    return lambda h: h * (k if cell is None else cell[0])\n"
CELLS = "def counting():\n    k = 2.0\n    def act(h):\n        return h * k\n    return act\n"


def again(before):
    return Step(), Step(before=before), Step()


SAME_AGAIN = [
    member(
        "hook registered again",
        head=SCALING,
        init="self.handle = self.b.register_forward_hook(scaling(3))",
        ignored="handle",
        steps=again("part.handle.remove()\npart.handle = part.b.register_forward_hook(scaling(3))"),
    ),
    member("function", "h = self.act(h)", head=ACT, init="self.act = times(2)", steps=again("part.act = times(2)")),
    member(
        "function in a dictionary",
        "h = self.acts['k'](h)",
        head=ACT,
        init="self.acts = {'k': times(2)}",
        steps=again("part.acts['k'] = times(2)"),
    ),
]


@pytest.mark.parametrize("of", SAME_AGAIN, ids=ids(SAME_AGAIN))
def test_what_is_made_again_by_the_same_code_runs_planned(of):
    check(of)


FIRST_CALL = [
    member(
        "hook that the first call registers",
        "if not hasattr(self, 'ready'):\n    self.ready = True\n    self.b.register_forward_hook(scaling(1))",
        head=SCALING.replace("out * k", "None"),
        allowed=GUARDED,
        planned_from=1,
        word="under torch.no_grad",
    ),
]


@pytest.mark.parametrize("of", FIRST_CALL, ids=ids(FIRST_CALL))
def test_the_second_call_runs_planned(of):
    check(of)


DIFFERENT = [
    member(
        "hook that holds another value",
        head=SCALING,
        allowed=GUARDED,
        init="self.handle = self.b.register_forward_hook(scaling(3))",
        planned_to=1,
        ignored="handle",
        steps=again("part.handle.remove()\npart.handle = part.b.register_forward_hook(scaling(4))"),
    ),
    member(
        "hook in another order",
        head=SCALING,
        allowed=GUARDED,
        init="self.handle = self.b.register_forward_hook(scaling(3))\nself.b.register_forward_hook(lambda m, a, o: o + 1)",
        planned_to=1,
        ignored="handle",
        steps=again("part.handle.remove()\npart.handle = part.b.register_forward_hook(scaling(3))"),
    ),
    member(
        "hook that is called otherwise",
        head="def hook(module, args, *rest):\n    return rest[-1] * len(rest)\n",
        allowed=GUARDED,
        init="self.handle = self.b.register_forward_hook(hook)",
        planned_to=1,
        ignored="handle",
        steps=again("part.handle.remove()\npart.handle = part.b.register_forward_hook(hook, with_kwargs=True)"),
    ),
    member(
        "function that holds another value",
        "h = self.act(h)",
        head=ACT,
        allowed=GUARDED,
        init="self.act = times(2)",
        planned_to=1,
        steps=again("part.act = times(3)"),
    ),
    member(
        "function whose list changes after it was made again",
        "h = self.act(h)",
        head=ACT,
        allowed=GUARDED,
        init="self.k = [2.0]\nself.act = times(0, self.k)",
        steps=(
            Step(),
            Step(before="part.act = times(0, part.k)"),
            Step(before="part.act.__closure__[0].cell_contents[0] = 5.0"),
        ),
        planned_to=2,
    ),
    member(
        "function whose cell changes after it was made again",
        "h = self.act(h)",
        head=CELLS,
        allowed=GUARDED,
        init="self.act = counting()",
        steps=(
            Step(),
            Step(before="part.act = counting()"),
            Step(before="part.act.__closure__[0].cell_contents = 5.0"),
        ),
        planned_to=2,
    ),
    member(
        "function of other code",
        "h = self.act(h)",
        head=ACT,
        allowed=GUARDED,
        init="self.act = times(2)",
        planned_to=1,
        steps=again("part.act = lambda h: h * 3"),
    ),
]


@pytest.mark.parametrize("of", DIFFERENT, ids=ids(DIFFERENT))
def test_what_holds_something_else_is_seen(of):
    found = check(of)
    assert found.verdict == "mismatch" or found.opaque, found  # an opaque module runs with the hooks that it has
