"""What a forward reads of tensors beside data and form: gradients, versions, flags, attributes that a user set."""

import pytest
import torch
from torch import nn

from planner import CaptureError, plan
from tests.support.members import ANY, GUARDED, Member, check, ids, inside, member, sampled
from tests.support.source import Step

WITH_GRADIENTS = "for p in m.parameters():\n    p.grad = torch.ones_like(p)"
WITHOUT = "for p in m.parameters():\n    p.grad = None"
IF_NONE = "h = h * (2 if {}.grad is None else 3)"
GRADIENTS = {
    "is None": IF_NONE.format("self.b.weight"),
    "looked up by name": "h = h * (2 if getattr(self.b.weight, 'gr' + 'ad') is None else 3)",
    "its norm": "g = self.b.weight.grad\nh = h * (2 if g is None else 1 + g.norm())",
    "of all": "h = h * (1 + sum(p.grad is not None for p in self.parameters()))",
    "cleared": "self.zero_grad()",
    "deleted": "if self.b.weight.grad is not None:\n    del self.b.weight.grad",
    "clipped": "h = h * (1 + nn.utils.clip_grad_norm_(self.parameters(), 1.0))",
    "scaled": "if self.b.weight.grad is not None:\n    self.b.weight.grad.mul_(2)",
}

MADE = "STATE = [{}]\ndef make():\n    x = torch.ones(16, 8{})\n{}"
"""Inputs that the loop changes by STATE."""
INPUTS = {
    "gradient": ("x.grad is None", ", requires_grad=True", "    if STATE[0]: x.grad = torch.ones(16, 8)\n    return (x,)"),
    "leaf": ("x.is_leaf", ", requires_grad=True", "    return (x * 1.0 if STATE[0] else x,)"),
    "node": ("x.grad_fn is None", ", requires_grad=True", "    return (x * 1.0 if STATE[0] else x,)"),
    "kind of node": ("'Mul' in x.grad_fn.name()", ", requires_grad=True", "    return (x + 1.0 if STATE[0] else x * 2,)"),
    "version": ("x._version", "", "    return (x.add_(1) if STATE[0] else x,)"),
    "offset": ("x.storage_offset()", "", "    return (torch.ones(17, 8)[STATE[0]:][:16],)"),
    "shared memory": ("x.is_shared()", "", "    return (x.share_memory_() if STATE[0] else x,)"),
    "gradient hooks": ("x._backward_hooks", ", requires_grad=True", "    STATE[0] and x.register_hook(print)\n    return (x,)"),
    "retained": ("x.retains_grad", ", requires_grad=True", "    x = x * 1\n    STATE[0] and x.retain_grad()\n    return (x,)"),
    "base": ("x._base is None", "", "    return (x.view(16, 8) if STATE[0] else x,)"),
    "view": ("x._is_view()", "", "    return (x.view(16, 8) if STATE[0] else x,)"),
    "inference": ("x.is_inference()", "", "    with torch.inference_mode(bool(STATE[0])): return (torch.ones(16, 8),)"),
    "lazily negated": ("x.is_neg()", "", "    return (torch._neg_view(x) if STATE[0] else x,)"),
    "class": ("type(x) is nn.Parameter", ", requires_grad=True", "    return (nn.Parameter(x.detach()) if STATE[0] else x,)"),
    "own class": ("type(x) is Mine", "", "    return (x.as_subclass(Mine) if STATE[0] else x,)"),
    "attribute": ("getattr(x, 'mine', 0)", "", "    if STATE[0]: x.mine = 1\n    return (x,)"),
    "attribute, asked for": ("hasattr(x, 'mine')", "", "    if STATE[0]: x.mine = 1\n    return (x,)"),
    "attributes": ("vars(x)", "", "    if STATE[0]: x.mine = 1\n    return (x,)"),
    "list in an attribute": ("x.mine[0]", "", "    x.mine = [STATE[0]]\n    return (x,)"),
}
"""Name -> (what is read, arguments of the input, how it is made)."""
HELD = {
    "attribute": ("getattr({}, 'mine', 0)", "{}.mine = 1"),
    "object in an attribute": ("{}.mine.k", "{}.mine.k = 1"),
    "attribute that goes": ("hasattr({}, 'mine')", "del {}.mine"),
    "gradient": ("{}.grad is None", "{}.grad = torch.ones_like({})"),
    "gradient hooks": ("{}._backward_hooks", "{}.requires_grad and {}.register_hook(lambda g: None)"),
    "version": ("{}._version", "with torch.no_grad(): {}.add_(1)"),
}
"""Name -> (what is read of a tensor that the model holds, what changes it)."""
PLACES = {
    "weight": ("self.b.weight", "part.b.weight", ""),
    "buffer": ("self.kept", "part.kept", "self.register_buffer('kept', torch.ones(8))"),
    "plain tensor": ("self.kept", "part.kept", "self.kept = torch.ones(8)"),
    "global tensor": ("T", "T", ""),
}
CONFIGURED = "import types\nclass Mine(torch.Tensor): pass\nT = torch.ones(8)\n"


def of_gradients():
    """A planned step, one with gradients there, one without."""
    steps = (Step("no_update"), Step("no_update", before=WITH_GRADIENTS), Step("no_update", before=WITHOUT))
    return [
        member(f"gradient, {name}", text, steps=steps, allowed=GUARDED, planned_to=1, word=r"weight\.grad")
        for name, text in GRADIENTS.items()
    ]


def of_inputs():
    """A planned step, one with another input, one as planned."""
    made = []
    for name, (read, given, make) in INPUTS.items():
        steps = (Step(), Step(before="STATE[0] = 1"), Step(before="STATE[0] = 0"))
        fields = {"given": "make()", "head": CONFIGURED + MADE.format(0, given, make), "steps": steps, "planned_to": 1}
        made.append(member(f"input, {name}", f"h = h * (3 if {read} else 2)", allowed=GUARDED, word="input 0", **fields))
    return made


def of_held():
    """A planned step, a change of a tensor that the model holds, two more steps."""
    made = []
    for where, (place, changed, init) in PLACES.items():
        for name, (read, change) in HELD.items():
            text = f"h = h * (3 if {read.format(place)} else 2) * {place}.sum()"
            start = f"{place}.mine = types.SimpleNamespace(k=0)" if "object" in name or "goes" in name else ""
            fields = {"init": f"{init}\n{start}".strip(), "head": CONFIGURED, "planned_to": 1}
            steps = (Step("no_update"), Step("no_update", before=change.format(changed, changed)), Step("no_update"))
            made.append(member(f"{where}, {name}", text, allowed=GUARDED, steps=steps, **fields))
    return made


PLANNED = [
    member("a leaf among the weights", "h = h * (2 if self.b.weight.is_leaf else 3)"),
    member("a weight's node", "h = h * (2 if self.b.weight.grad_fn is None else 3)"),
    member("an activation's node", "h = h * (2 if h.is_leaf or 'Addmm' not in h.grad_fn.name() else 3)"),
    member("an activation's attribute", "h.mine = 3\nh = h * h.mine"),
    member("a weight's attribute", "h = h * self.b.weight.mine", init="self.b.weight.mine = 2.0"),
    member(
        "attributes of equal blocks",
        "for block in self.blocks:\n    h = block(h)",
        head="class Block(nn.Module):\n    def __init__(self, i):\n        super().__init__()\n"
        "        self.l, self.k = nn.Linear(8, 8), nn.Linear(8, 8)\n        self.l.weight.mine = float(i + 1)\n"
        "    def forward(self, h):\n        return torch.tanh(self.k(self.l(h))) * getattr(self.l.weight, 'mine', 10.0)",
        init="self.blocks = nn.ModuleList(Block(i) for i in range(4))",
    ),
]
"""Planned, whatever a trace shows by itself."""
WRITES = {
    "an attribute of an input": "x.mine = True",
    "an attribute of a weight": "self.b.weight.mine = True",
    "a weight's gradient": "self.b.weight.grad = torch.ones(8, 8)",
}
REFUSED = [
    *(member(f"sets {name}", text, allowed=ANY, word="sets") for name, text in WRITES.items()),
    member("a tensor in an attribute", "h = h * self.b.weight.mine", init="self.b.weight.mine = torch.ones(8)", allowed=ANY),
    member(
        "uses a gradient",
        "h = h * self.b.weight.grad.norm()",
        build="with_gradients(Part())",
        head="def with_gradients(m):\n    for p in m.parameters():\n        p.grad = torch.ones_like(p)\n    return m",
        steps=(Step("no_update"),),
        allowed=ANY,
        word="reads grad of b.weight",
    ),
    member(
        "an attribute of an output",
        out="marked(self.c(h))",
        head="def marked(t):\n    t.mine = 5\n    return t",
        allowed=ANY,
        word="mine",
    ),
]


@pytest.mark.parametrize("of", sampled(of_gradients()))
def test_a_gradient_that_was_read_is_compared(of):
    check(of, audit=False)


@pytest.mark.parametrize("of", sampled(of_inputs(), every=4))
def test_what_was_read_of_an_input_is_compared(of):
    check(of, audit=False)


@pytest.mark.parametrize("of", sampled(of_held(), every=5))
def test_what_was_read_of_a_tensor_that_the_model_holds_is_compared(of):
    check(of, audit=False)


@pytest.mark.parametrize("of", PLANNED, ids=ids(PLANNED))
def test_what_tensors_show_is_planned(of):
    check(of, audit=False)


@pytest.mark.parametrize("of", sampled([inside(of) for of in (*of_gradients(), *of_held(), *PLANNED)], every=9))
def test_what_a_submodule_reads_is_compared(of):
    check(of, audit=False)


@pytest.mark.parametrize("of", REFUSED, ids=ids(REFUSED))
def test_what_a_plan_would_not_do_is_refused(of):
    assert check(of, audit=False).verdict == "refused"


PAIR = {"signature": "self, x, y", "given": "make()"}
PAIRS = "KEEP = [torch.randn(16, 8) for _ in range(3)]\nUSED = {}\ndef make():\n    return (KEEP[USED[0]], KEEP[USED[1]])"
ATTENTION = {"init": "self.m = nn.MultiheadAttention(8, 2)", "signature": "self, x, y"}
IDENTITIES = [
    member(
        "inputs become one",
        "h = h * (2 if x is y else 3)",
        head=PAIRS.format([0, 1]),
        steps=(Step(), Step(before="USED[1] = 0")),
        **PAIR,
    ),
    member(
        "inputs become two",
        "h = h * (2 if x is y else 3)",
        head=PAIRS.format([0, 0]),
        steps=(Step(), Step(before="USED[1] = 1")),
        **PAIR,
    ),
    member(
        "attention of one",
        "h = self.m(x, y, y)[0]",
        head=PAIRS.format([0, 0]),
        steps=(Step(), Step(before="USED[1] = 1")),
        **{**ATTENTION, **PAIR},
    ),
    member(
        "an input in a global list",
        "h = h * (2 if x is KEEP[1] else 3)",
        head=PAIRS.format([0, 2]),
        steps=(Step(), Step(before="KEEP[1] = KEEP[0]")),
        **PAIR,
    ),
    member(
        "an input taken out of it",
        "h = h * (2 if x is KEEP[1] else 3)",
        head=PAIRS.format([1, 2]),
        steps=(Step(), Step(before="USED[0] = 0")),
        **PAIR,
    ),
    member(
        "weights tied",
        "h = h * (2 if self.b.weight is self.c.weight else 3)",
        steps=(Step(), Step(before="part.b.weight = part.c.weight")),
    ),
]


def guarded(of):
    """The same, where the last step is another call than the planned one."""
    return Member(of.program, GUARDED, planned_from=0, planned_to=1)


@pytest.mark.parametrize("of", [guarded(of) for of in IDENTITIES], ids=ids(IDENTITIES))
def test_which_tensors_are_the_same_is_compared_where_the_forward_asks(of):
    assert check(of, audit=False).verdict == "mismatch"


def test_the_same_tensor_given_twice_may_be_two_later():
    steps = (Step(), Step(before="USED[1] = 1"), Step(before="USED[1] = 0"))
    check(member("nobody asks", "h = h * y * y", head=PAIRS.format([0, 0]), steps=steps, **PAIR), audit=False)


def test_a_list_of_a_library_is_compared_by_what_it_holds():
    steps = (Step(), Step(), Step(before="sys.argv.append('--planned')"), Step(before="sys.argv.pop()"))
    of = member("a list", "h = h * (2 if '--planned' in sys.argv else 3)", head="import sys", steps=steps)
    assert check(Member(of.program, GUARDED, planned_from=0, planned_to=2), audit=False).verdict == "mismatch"


def test_planning_asks_no_function_that_does_more_than_answer():
    head = "import getpass, random"
    code = "h = h * 2\nif x.shape[0] > 99:\n    h = h * random.getrandbits(8) * len(getpass.getpass())"
    check(member("code that did not run", code, head=head), audit=False)


def test_code_that_asks_for_a_base_class_of_a_weight_is_refused():
    fields = {
        "init": "self.b.weight = Mine(torch.ones(8, 8))",
        "head": "class Base(nn.Parameter): pass\nclass Mine(Base): pass",
    }
    code = "h = h * (2 if isinstance(self.b.weight, Base) else 3)"
    of = member("asked for its base", code, allowed=ANY, word="the class of b.weight", **fields)
    assert check(of, audit=False).verdict == "refused"


def test_a_submodule_that_runs_as_it_is_may_read_containers_of_a_weight():
    code = "h, _ = self.r(h)\nh = h * len(vars(self.r.weight_ih_l0))"
    fields = {"init": "self.r = nn.GRU(8, 8, batch_first=True)\nself.r.weight_ih_l0.mine = {'a': [1]}"}
    check(member("attributes of a weight", code, allowed=ANY, **fields), audit=False)


def test_code_that_asks_for_the_class_of_a_weight_is_refused():
    fields = {"init": "self.b.weight = Mine(torch.ones(8, 8))", "head": "class Mine(nn.Parameter): pass"}
    check(member("a class of weights", "h = h * 2", **fields), audit=False)
    of = member(
        "asked for",
        "h = h * (2 if isinstance(self.b.weight, Mine) else 3)",
        allowed=ANY,
        word="the class of b.weight",
        **fields,
    )
    assert check(of, audit=False).verdict == "refused"


RETAINS = {
    "by map": "list(map(torch.Tensor.retain_grad, [h]))",
    "by methodcaller": "__import__('operator').methodcaller('retain_grad')(h)",
    "directly": "h.retain_grad()",
}


@pytest.mark.parametrize("left", ["self.h = h", "self.held.append(h)"])
@pytest.mark.parametrize("how", RETAINS)
def test_a_gradient_that_is_kept_is_named_however_it_is_asked_for(how, left):
    init, call = "self.h = None\nself.held = []", f"h = h * 2\n{RETAINS[how]}\n{left}"
    found = check(member(how, call, init=init, allowed=ANY, word="retain_grad"), audit=False)
    assert found.verdict == "refused"


@pytest.mark.parametrize("how", RETAINS)
def test_an_output_whose_gradient_is_kept_is_named(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            h = self.layer(x)
            eval(RETAINS[how], {"torch": torch, "h": h})
            return h

    with pytest.raises(CaptureError, match="retain_grad"):
        plan(Net(), 1.0, (torch.randn(4, 8),), loss=0, progress=False)
