"""Settings that the training loop changes after planning: noticed in every place, by type and value, and named."""

import pytest

from tests.support.itself import check_against_itself
from tests.support.kinds import FOR_TENSORS, HARD, SETTINGS, TENSORS, USES, named
from tests.support.members import ANY, GUARDED, check, ids, inside, member, sampled
from tests.support.source import Step


def settings(kinds, use="scale", allowed=GUARDED):
    """For every change of every kind: a planned step, the change, two more steps."""
    made = []
    for kind in kinds:
        for label, change in kind.changes.items():
            text = USES[use].format(e=named(kind.read, "v1"))
            fields = {key: named(getattr(kind, key), "v1") for key in ("init", "head", "word")}
            steps = (Step(), Step(before=named(change, "v1")), Step())
            of = member(f"{kind.name}, {label}, {use}", text, allowed=allowed, steps=steps, planned_to=1, **fields)
            made.append(of)
    return made


SCALED = [*settings(SETTINGS), *settings(TENSORS)]
TYPED = settings([kind for kind in SETTINGS if kind.name in ("float", "int", "one", "list type", "dataclass", "bool")], "type")
USED = [of for use in USES if use not in (*FOR_TENSORS, "type") for of in settings([k for k in SETTINGS if k.exact][::9], use)]
REFUSABLE_PLACES = settings(HARD, allowed=ANY)

PARTS = "self.act = nn.ReLU()\nself.d = Mine(8, 8, bias=False)"
THROUGH = "h = self.act(self.d(h))"
MODULES = {
    "submodule replaced": "part.act = nn.SiLU()",
    "submodule's forward": "part.act.forward = F.silu",
    "submodule's class": "part.act.__class__ = nn.SiLU",
    "method of the submodule's class": "type(part.d).forward = lambda s, x: F.linear(x, s.weight) * 2",
    "submodule added to a loop": "part.more.append(nn.SiLU())",
    "order of submodules": "part.more[0], part.more[1] = part.more[1], part.more[0]",
    "submodule to None": "part.maybe = None",
    "mode of a submodule": "part.drop.eval()",
    "probability": "part.drop.p = 0.9",
    "epsilon": "part.norm.eps = 0.5",
    "in-place flag": "part.act.inplace = True",
    "weight replaced": "part.d.weight = nn.Parameter(torch.ones(8, 8))",
    "weight frozen": "part.d.weight.requires_grad_(False)",
    "all frozen but one": "part.requires_grad_(False)\npart.b.weight.requires_grad_(True)",
    "weight of another type": "part.double()\npart.float()\npart.d.weight.data = part.d.weight.data.clone()",
    "weight's data": "part.d.weight.data = torch.ones(8, 8)",
    "weight of other strides": "part.d.weight = nn.Parameter(torch.ones(8, 8).triu().t())",
    "weight's data of other strides": "part.d.weight.data = torch.ones(8, 8).triu().t()",
    "weight expanded": "part.d.weight = nn.Parameter(torch.ones(1, 8).expand(8, 8))",
    "weights tied": "part.d.weight = part.b.weight",
    "weights untied": "part.tied.weight = nn.Parameter(torch.ones(8, 8))",
    "bias filled": "part.d.bias = nn.Parameter(torch.ones(8))",
    "bias emptied": "part.b.bias = None",
    "buffer filled": "part.mask = torch.full((8,), 3.0)",
    "parameter to a buffer": "w = part.d.weight.detach()\ndel part.d.weight\npart.d.register_buffer('weight', w)",
    "parameter to a plain tensor": "w = part.d.weight.detach().clone()\ndel part.d.weight\npart.d.weight = w",
    "forward hook": "part.act.register_forward_hook(lambda m, a, o: o * 2)",
    "forward pre-hook": "part.act.register_forward_pre_hook(lambda m, a: (a[0] * 2,))",
    "hook on the part": "part.register_forward_hook(lambda m, a, o: o * 2)",
    "backward hook": "part.act.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))",
    "backward pre-hook": "part.act.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,))",
    "hook of every module": "nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 2)",
    "gradient hook of a weight": "part.d.weight.register_hook(lambda g: g * 2)",
    "hook after a weight's gradient": "part.d.weight.register_post_accumulate_grad_hook(double_gradient)",
    "parametrized": "nn.utils.parametrize.register_parametrization(part.d, 'weight', Doubled())",
    "weight_norm": "nn.utils.parametrizations.weight_norm(part.d)",
    "spectral_norm": "nn.utils.parametrizations.spectral_norm(part.d)",
    "pruned": "nn.utils.prune.l1_unstructured(part.d, 'weight', amount=0.5)",
    "state loaded": "m.load_state_dict({k: torch.full_like(v, 0.1) for k, v in m.state_dict().items()})",
    "state assigned": "m.load_state_dict({k: torch.full_like(v, 0.1) for k, v in m.state_dict().items()}, assign=True)",
    "forward of the part": "part.forward = lambda x: part.b(x)",
    "forward of the part's class": "type(part).forward = lambda s, x: s.b(x)",
    "class of the part": "part.__class__ = type('Other', (type(part),), {'forward': lambda s, x: s.b(x)})",
    "function that the forward calls": "global helper\nhelper = lambda h: h * 3",
    "functional replaced": "part.fn = F.silu",
    "requires_grad of a buffer": "part.kept.requires_grad_(True)",
    "module moved to another name": "part.act, part.other = part.other, part.act",
}
SETUP = (
    f"{PARTS}\nself.more = nn.ModuleList([nn.Tanh(), nn.Sigmoid()])\nself.maybe = nn.Tanh()\nself.drop = nn.Dropout(0.3)\n"
    "self.norm = nn.LayerNorm(8)\nself.tied = nn.Linear(8, 8)\nself.tied.weight = self.b.weight\nself.other = nn.SiLU()\n"
    "self.register_buffer('mask', None)\nself.register_buffer('kept', torch.ones(8))\nself.fn = torch.tanh"
)
FLOW = (
    f"{THROUGH}\nfor layer in self.more:\n    h = layer(h) + h\nh = h if self.maybe is None else self.maybe(h)\n"
    "h = self.norm(self.drop(h)) if self.mask is None else h * self.mask\nh = helper(self.fn(self.tied(h))) * self.kept"
)
HEAD = """
import torch.nn.utils.parametrize, torch.nn.utils.prune
def double_gradient(p):
    p.grad.mul_(2)
class Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x)
class Doubled(nn.Module):
    def forward(self, w):
        return w * 2
def helper(h):
    return h * 2
"""


def _steps(name, change):
    kind = "no_update" if name == "weight expanded" else "train"  # which cannot be written into
    return (Step(), Step(kind, before=change), Step(kind))


def changed_modules():
    """A model of many parts, one of which changes."""
    return [
        member(name, FLOW, init=SETUP, head=HEAD, allowed=GUARDED, steps=_steps(name, change), planned_to=1)
        for name, change in MODULES.items()
    ]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("of", SCALED, ids=ids(SCALED))
def test_a_changed_setting_is_noticed(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled(SCALED[::3]))
def test_a_changed_setting_of_a_submodule_is_noticed(of):
    check(inside(of))


@pytest.mark.one_in(8)
@pytest.mark.parametrize("of", [*TYPED, *USED], ids=ids([*TYPED, *USED]))
def test_whatever_a_setting_is_used_for(of):
    check(of)


@pytest.mark.parametrize("of", REFUSABLE_PLACES, ids=ids(REFUSABLE_PLACES))
def test_settings_outside_of_the_model_are_noticed_or_refused(of):
    check(type(of)(of.program, of.allowed, None, word=of.word))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", sampled(changed_modules(), 2))
def test_a_changed_module_is_noticed(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled(changed_modules()[::2], 4))
def test_a_changed_module_in_a_submodule_is_noticed(of):
    check(inside(of))


def test_eager_shows_nothing_against_itself():
    check_against_itself([*SCALED, *TYPED, *USED, *REFUSABLE_PLACES, *changed_modules()])


def test_weights_that_are_tied_after_planning_run_as_they_are():
    """Their gradients would add up in another order, and a backward captured later found another graph."""
    steps = (Step(), Step(before="part.d.weight = part.b.weight"), Step(), Step(before="m.zero_grad()"))
    of = member(
        "tied", "h = self.d(h)", init="self.d = nn.Linear(8, 8)", steps=steps, allowed=frozenset({"mismatch"}), planned_to=1
    )
    check(of)
