"""Numbers that a forward takes out of tensors without an op (`tolist`), and tensors that a class of the model holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import plan
from tests.support.members import Member, check, ids, member
from tests.support.source import Step

READ = {
    "tolist": "h = h * self.t.tolist()[0]",
    "tolist of a slice": "h = h * self.t[:1].tolist()[0]",
    "tolist of rows": "h = h * self.t.view(2, 1).tolist()[0][0]",
    "tolist of a number": "h = h * self.t[0].tolist()",
    "tolist of a copy": "h = h * self.t.cpu().tolist()[0]",
    "tolist without a graph": "h = h * self.t.detach().tolist()[0]",
    "tolist of integers": "h = h * self.t.long().tolist()[0]",
    "sizes of a split": "h = h * len(h.split([int(self.t.tolist()[0]), 14 if self.t.tolist()[0] == 2 else 13])[0])",
}
HELD = {
    "attribute": "self.t = torch.tensor([2.0, 1.0])",
    "buffer": "self.register_buffer('t', torch.tensor([2.0, 1.0]))",
    "parameter": "self.t = nn.Parameter(torch.tensor([2.0, 1.0]))",
}
CHANGED = "part.t.data = torch.tensor([3.0, 1.0])"
NOTICED = [
    member(
        f"{read}, {kind}",
        READ[read],
        init=HELD[kind],
        allowed=frozenset({"mismatch"}),
        steps=(Step(), Step(), Step(before=CHANGED), Step()),
        planned_to=2,
        word="value read",
    )
    for read in READ
    for kind in (HELD if read == "tolist" else ["attribute"])
]


@pytest.mark.parametrize("of", NOTICED, ids=ids(NOTICED))
def test_another_number_is_noticed(of: Member) -> None:
    check(of)


def test_memory_that_is_shared_by_dlpack_is_refused_as_numpys_is() -> None:
    text = "h = h * float(np.from_dlpack(self.t)[0])"
    check(member("dlpack", text, init=HELD["attribute"], allowed=frozenset({"refused"}), word="memory"))


BY_CLASS = {
    "by the class": "type(self).T",
    "by the module": "self.T",
    "by a text": "getattr(type(self), 'T')",
}
CLASS = """
class Base(nn.Module):
    {base}
class Part(Base):
    {own}
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * {read})
"""
HELD_BY_CLASS = [
    member(
        f"{where} class, {read}, {name}",
        classes=CLASS.format(**{"base": "pass", "own": "pass", where: "T = torch.tensor(2.0)"}, read=BY_CLASS[read]),
        steps=(Step(), Step(), Step(before=change), Step()),
    )
    for where, kind in {"own": "type(part)", "base": "type(part).__mro__[1]"}.items()
    for read in BY_CLASS
    for name, change in {"another": f"{kind}.T = torch.tensor(3.0)", "written": f"{kind}.T.fill_(3.0)"}.items()
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", HELD_BY_CLASS, ids=ids(HELD_BY_CLASS))
def test_a_tensor_that_a_class_holds_is_an_input(of: Member) -> None:
    """Planned calls take the one that is there; it was frozen, where code reads it by the class."""
    check(of)


class Scaled(nn.Module):
    scale = torch.tensor(2.0)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)) * type(self).scale)


def test_planning_leaves_the_classs_tensor_and_gives_none_to_the_module() -> None:
    model, scale = Scaled(), Scaled.scale
    plan(model, 1.0, (torch.randn(4, 8),), costs="estimate", progress=False, effort=0.3)
    assert Scaled.scale is scale and "scale" not in vars(model) and scale == 2.0
