"""Layouts of upstream gradients, weights, inputs and kernels' results; outputs that the caller writes into."""

from dataclasses import replace

import pytest

from tests.support.itself import check_against_itself
from tests.support.members import ANY, GUARDED, REFUSABLE, check, ids, inside, member
from tests.support.source import Step

IMAGES = {
    "layers": "self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)",
    "given": "(torch.randn(2, 3, 8, 8),)",
}
SEQUENCE = {"given": "(torch.randn(3, 6, 8),)"}
LANGUAGE = {
    "layers": "self.a, self.b, self.c = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)",
    "given": "(torch.randint(0, 20, (3, 6)),)",
    "out": "self.c(torch.tanh(self.b(h)))",
}
NORM = {"init": "self.n = nn.BatchNorm1d(8)"}

MODELS = {
    "linear": {},
    "without biases": {"layers": "self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))"},
    "sequence": SEQUENCE,
    "language model": LANGUAGE,
    "convolution": {**IMAGES, "out": "self.c(torch.tanh(self.b(torch.relu(h))))"},
    "pixels as rows": {**IMAGES, "out": "self.c(torch.tanh(self.b(torch.relu(h)))).permute(0, 2, 3, 1)"},
    "batch norm": {**NORM, "out": "self.n(self.b(torch.tanh(h)))"},
    "batch norm of a sequence": {
        **SEQUENCE,
        **NORM,
        "out": "self.c(self.n(h.transpose(1, 2)).transpose(1, 2))",
    },
    "layer norm": {"init": "self.n = nn.LayerNorm(8)", "out": "self.n(self.b(torch.tanh(h)))"},
    "attention": {
        **SEQUENCE,
        "init": "self.t = nn.MultiheadAttention(8, 2, batch_first=True)",
        "out": "self.t(h, h, h, need_weights=False)[0]",
    },
    "broadcast": {
        "init": "self.s = nn.Parameter(torch.ones(8))\nself.t = nn.Parameter(torch.zeros(16, 1))",
        "out": "h * self.s + self.t",
    },
    "two outputs": {"out": "(self.c(torch.tanh(self.b(h))), torch.relu(h))"},
    "a view": {"out": "self.c(torch.tanh(self.b(h)))[2:9, ::2]"},
    "expanded": {"out": "self.c(torch.tanh(h)).mean(0, keepdim=True).expand(4, 8)"},
    "an activation": {"out": "torch.relu(self.b(torch.tanh(h)))"},
    "softmax": {"out": "self.b(torch.tanh(h)).log_softmax(-1)"},
    "embedding": {**LANGUAGE, "out": "h + self.b(h)"},
    "several weights' uses": {"out": "self.b(torch.tanh(self.b(torch.sigmoid(self.b(h)))))"},
    "recurrent layer": {**SEQUENCE, "init": "self.r = nn.GRU(8, 8, batch_first=True)", "out": "self.c(self.r(h)[0])"},
}
OF_WIDTH_8 = ("linear", "sequence", "batch norm of a sequence", "attention", "softmax", "recurrent layer")
GRADIENTS = ("transposed", "expanded", "broadcast", "sliced", "transposed_loss")


def upstream():
    made = []
    for name, fields in MODELS.items():
        steps = tuple(Step(kind) for kind in (*GRADIENTS, "train", *GRADIENTS[:2]))
        made.append(member(name, steps=steps, measured=True, **fields))
    return made


WEIGHTS = {
    "channels_last": "m.to(memory_format=torch.channels_last)",
    "one weight in channels_last": "part.b.weight.data = part.b.weight.data.contiguous(memory_format=torch.channels_last)",
    "replaced by a transposed one": "part.b.weight = nn.Parameter(part.b.weight.detach().mT.contiguous().mT)",
    "data transposed": "part.b.weight.data = part.b.weight.data.transpose(0, 1).contiguous().transpose(0, 1)",
    "expanded": "part.b.weight = nn.Parameter(part.b.weight.detach()[:1].expand(part.b.weight.shape))",
    "a slice of a larger one": "w = part.b.weight.detach()\nw = torch.cat([w, w], -1)[..., : w.shape[-1]]\n"
    "part.b.weight = nn.Parameter(w)",
    "in one flat buffer": "flat = nn.utils.parameters_to_vector(m.parameters()).detach()\nfor p in m.parameters():\n"
    "    n = p.numel()\n    p.data, flat = flat[:n].view_as(p), flat[n:]",
}


def weights():
    made = []
    for model in ("linear", "convolution", "language model"):
        for name, change in WEIGHTS.items():
            if name.endswith("channels_last") and model != "convolution":
                continue
            kind = "no_update" if name == "expanded" else "train"  # which cannot be written into
            steps = (Step(), Step(kind, before=change), Step(kind))
            made.append(member(f"{model}: {name}", steps=steps, allowed=GUARDED, planned_to=1, **MODELS[model]))
    return made


WRITES = ("written", "written_by_autograd", "train")
OUTPUTS = {
    "a linear layer's": {},
    "hidden, read by a function without saving": {
        "layers": "self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))",
        "out": "(self.c(torch.sigmoid(torch.tanh(torch.tanh(h + 1.0) * 2.0) * 3.0)), h)",
    },
    "hidden, then scaled": {"out": "(self.c(torch.tanh(torch.tanh(h * 2.0) * 3.0)), h)"},
    "a sum": {"forward": "s = h + self.b(x)", "out": "(self.c(torch.tanh(torch.sigmoid(s + 1.0))), s)"},
    "in a list": {"out": "[self.c(torch.tanh(torch.sigmoid(h + 1.0))), h + 2.0]"},
    "in a dict": {"out": "{'y': self.c(torch.tanh(torch.sigmoid(h + 1.0))), 'h': h}"},
    "detached": {"out": "(self.c(torch.tanh(torch.sigmoid(h + 1.0))), h.detach())"},
    "normed": {"init": "self.n = nn.LayerNorm(8)", "out": "(self.c(torch.tanh(h + 1.0)), self.n(h))"},
    "dropped out": {"out": "(self.c(torch.tanh(h + 1.0)), F.dropout(h, 0.3))"},
    "saved by eager": {"forward": "t = torch.tanh(h)", "out": "(self.c(torch.sigmoid(t)), t)"},
    "left on the module": {
        "forward": "self.kept = h",
        "out": "self.c(torch.tanh(torch.tanh(h + 1.0) * 2.0))",
        "losses": "[part.kept]",
    },
}


def written():
    return [
        member(name, steps=tuple(map(Step, WRITES)), allowed=ANY if name == "saved by eager" else frozenset({"same"}), **fields)
        for name, fields in OUTPUTS.items()
    ]


PATTERNS = ("partial", "last_output", "one_at_a_time", "twice", "in_flight", "dropped", "input_gradients", "non_contiguous")


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", upstream(), ids=ids(upstream()))
def test_gradients_in_any_layout_train_within_the_budget(of):
    check(replace(of, allowed=REFUSABLE))  # the budget may have no place for what another layout needs


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", [of for of in upstream() if of.name in OF_WIDTH_8], ids=OF_WIDTH_8)
def test_gradients_in_any_layout_reach_a_submodule(of):
    check(inside(replace(of, allowed=REFUSABLE)))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", weights(), ids=ids(weights()))
def test_weights_of_another_layout_are_noticed(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", written(), ids=ids(written()))
@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_outputs_may_be_written_into(of, budget):
    check(of, budget=budget)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("name", ["linear", "two outputs", "language model", "batch norm of a sequence"])
def test_ways_to_call_backward(kind, name):
    steps = (Step(), Step(kind), Step())
    allowed = GUARDED if kind in ("input_gradients", "non_contiguous") else frozenset({"same"})
    of = member(f"{name}, {kind}", steps=steps, allowed=allowed, planned_to=1, **MODELS[name])
    if not (kind == "input_gradients" and name == "language model"):  # integers have none
        check(of)


def test_eager_shows_nothing_against_itself():
    check_against_itself([*upstream(), *weights(), *written()])


LITERALS = [
    member("literal", "h = h * torch.tensor([2.0] * 8)"),
    member("literal that is left", "self.k = torch.tensor([2.0] * 8)\nh = h * self.k"),
    member(
        "literal that the first call keeps",
        "if self.k is None:\n    self.k = torch.tensor(2.0)\nh = h * self.k",
        init="self.k = None",
    ),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", LITERALS, ids=ids(LITERALS))
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_literals_in_the_forward_under_other_gradients(of, kind):
    check(type(of)(of.program.within(steps=(Step(kind),) * 3)))
