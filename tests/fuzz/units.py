"""What a random model is put together from: layers, and behaviour of Python beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.kinds import FOR_TENSORS, HARD, SETTINGS, TENSORS, USES, Kind, named


@dataclass(frozen=True, slots=True)
class Unit:
    """A few lines of a model. `{v}` is a name of its own; `h` is the activation, [4, 5, 8] or fewer rows.

    Attributes:
        group: what it is an example of, for summaries.
        benign: a plan must hold it, from the first call on.
        losses: an expression of tensors that it leaves on the `part`.
        changes: what the loop may do to it, by name.
    """

    name: str
    forward: str
    init: str = ""
    head: str = ""
    group: str = "layer"
    benign: bool = False
    losses: str = ""
    changes: dict[str, str] = field(default_factory=dict)

    def called(self, name: str) -> Unit:
        """The same under a name of its own."""
        texts = {key: named(getattr(self, key), name) for key in ("forward", "init", "head", "losses")}
        changes = {key: named(text, name) for key, text in self.changes.items()}
        return Unit(self.name, group=self.group, benign=self.benign, changes=changes, **texts)


def _layer(name: str, forward: str, init: str = "", benign: bool = True, **more: str) -> Unit:
    return Unit(name, forward, init, benign=benign, **more)


LAYERS = [
    _layer("linear", "h = torch.tanh(self.{v}(h))", "self.{v} = nn.Linear(8, 8)"),
    _layer("residual", "h = h + torch.relu(self.{v}(h))", "self.{v} = nn.Linear(8, 8)"),
    _layer("GELU", "h = F.gelu(h)"),
    _layer("layer norm", "h = self.{v}(h)", "self.{v} = nn.LayerNorm(8)"),
    _layer("batch norm", "h = self.{v}(h.flatten(0, 1)).view_as(h)", "self.{v} = nn.BatchNorm1d(8)"),
    _layer("batch norm, transposed", "h = self.{v}(h.transpose(1, 2)).transpose(1, 2)", "self.{v} = nn.BatchNorm1d(8)"),
    _layer("dropout", "h = self.{v}(h)", "self.{v} = nn.Dropout(0.2)"),
    _layer("positions", "h = h + self.{v}(torch.arange(h.shape[1]))", "self.{v} = nn.Embedding(5, 8)"),
    _layer(
        "convolution", "h = torch.relu(self.{v}(h.transpose(1, 2))).transpose(1, 2)", "self.{v} = nn.Conv1d(8, 8, 3, padding=1)"
    ),
    _layer(
        "attention",
        "h = h + self.{v}(h, h, h, need_weights=False)[0]",
        "self.{v} = nn.MultiheadAttention(8, 2, batch_first=True)",
    ),
    _layer("attention function", "h = h + F.scaled_dot_product_attention(h, h, h)"),
    _layer("LSTM", "h = h + self.{v}(h)[0]", "self.{v} = nn.LSTM(8, 8, batch_first=True)", benign=False),
    _layer("GRU", "h = self.{v}(h)[0]", "self.{v} = nn.GRU(8, 8, batch_first=True)", benign=False),
    _layer("tied", "h = torch.tanh(F.linear(h, self.a.weight))"),
    _layer("frozen", "h = torch.sigmoid(self.{v}(h))", "self.{v} = nn.Linear(8, 8).requires_grad_(False)"),
    _layer("sequential", "h = self.{v}(h)", "self.{v} = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))"),
    _layer("group norm", "h = self.{v}(h.transpose(1, 2)).transpose(1, 2)", "self.{v} = nn.GroupNorm(2, 8)"),
    _layer("gate", "h = h * self.{v}(h).softmax(-1)", "self.{v} = nn.Linear(8, 8)"),
    _layer("in place", "h = F.relu(h * 1.5, inplace=True)"),
    _layer("weight norm", "h = self.{v}(h)", "self.{v} = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))", benign=False),
    _layer(
        "autograd function",
        "h = Cube_{v}.apply(h)",
        head="class Cube_{v}(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        ctx.save_for_backward(x)\n        return x ** 3\n    @staticmethod\n    def backward(ctx, g):\n"
        "        return 3 * ctx.saved_tensors[0] ** 2 * g\n",
        benign=False,
    ),
]

MEAN = "def mean(h):\n    return h.detach().reshape(-1, 8).mean(0)\n"
_PLACES = {
    "attribute": ("self.{v}", "self.{v} = torch.zeros(8)", True),
    "list": ("self.{v}[0]", "self.{v} = [torch.zeros(8)]", True),
    "dict": ("self.{v}['m']", "self.{v} = {{'m': torch.zeros(8)}}", True),
    "dict of lists": ("self.{v}['m'][1]", "self.{v} = {{'m': [0, torch.zeros(8)]}}", True),
    "buffer": ("self.{v}", "self.register_buffer('{v}', torch.zeros(8))", True),
    "child": ("self.a.{v}", "self.a.{v} = torch.zeros(8)", True),
    "namespace": ("self.{v}.m", "self.{v} = types.SimpleNamespace(m=torch.zeros(8))", False),
    "class": ("type(self).{v}", "type(self).{v} = torch.zeros(8)", False),
}
_WRITES = {"new": "{p} = 0.9 * {p} + 0.1 * mean(h)", "in place": "{p}.mul_(0.9).add_(mean(h), alpha=0.1)"}

CARRIED = [
    Unit(f"carried, {place}, {how}", f"h = h - {p}\n{write.replace('{p}', p)}", init, group="carried tensor", benign=benign)
    for place, (p, init, benign) in _PLACES.items()
    for how, write in _WRITES.items()
] + [
    Unit(
        "carried, tuple",
        "p_{v}, q_{v} = self.{v}\nh = h + p_{v} - q_{v}\nself.{v} = (mean(h), p_{v})",
        "self.{v} = (torch.zeros(8), torch.ones(8))",
        group="carried tensor",
        benign=True,
    ),
    Unit(
        "carried, deque",
        "h = h - self.{v}[0]\nself.{v}.append(mean(h))",
        "self.{v} = collections.deque([torch.zeros(8)] * 2, maxlen=2)",
        group="carried tensor",
        benign=True,
    ),
    Unit(
        "carried, None first",
        "h = h if self.{v} is None else h - self.{v}\nself.{v} = mean(h)",
        "self.{v} = None",
        group="carried tensor, late",
    ),
    Unit(
        "carried, empty list first",
        "h = h - sum(self.{v})\nself.{v}[:] = [mean(h)]",
        "self.{v} = []",
        group="carried tensor, late",
    ),
    Unit(
        "carried, with its graph",
        "h = h + self.{v}\nself.{v} = h.mean() * 0.1",
        "self.{v} = torch.zeros(())",
        group="carried graph",
        changes={"detached": "part.{v} = part.{v}.detach()"},
    ),
    Unit(
        "carried, over a few layers",
        "for _ in range(2):\n    self.{v} = torch.tanh(h + self.{v} * 0.5)\nh = h + self.{v}",
        "self.{v} = 0.0",
        group="carried graph",
        changes={
            "detached": "part.{v} = part.{v}.detach() if isinstance(part.{v}, torch.Tensor) else 0.0",
            "reset": "part.{v} = 0.0",
        },
    ),
]

KEPT = [
    Unit(
        "kept input, first", "if self.{v} is None:\n    self.{v} = x\nh = h + self.{v}", "self.{v} = None", group="kept input"
    ),
    Unit(
        "kept input, last", "h = h if self.{v} is None else h + self.{v}\nself.{v} = x", "self.{v} = None", group="kept input"
    ),
    Unit(
        "kept input, list",
        "self.{v} = [*self.{v}[-1:], x]\nh = h + self.{v}[0].mean()",
        "self.{v} = [torch.zeros(8)] * 2",
        group="kept input",
    ),
    Unit("kept input, global", "G_{v}.append(x)\nh = h + G_{v}[0].mean()", head="G_{v} = []", group="kept input"),
]

LEFT = [
    Unit(
        f"left, {place}", f"{p} = h.square().mean()", init, group="left tensor", benign=benign, losses=p.replace("self", "part")
    )
    for place, (p, init, benign) in {
        "attribute": ("self.{v}", "", True),
        "None first": ("self.{v}", "self.{v} = None", True),
        "dict": ("self.{v}['x']", "self.{v} = {{}}", True),
        "list": ("self.{v}[0]", "self.{v} = [None]", True),
        "child": ("self.a.{v}", "", True),
        "namespace": ("self.{v}.x", "self.{v} = types.SimpleNamespace()", False),
        "global": ("G_{v}['x']", "", False),
    }.items()
] + [
    Unit(
        "left, list appended",
        "self.{v}.clear()\nself.{v}.append(h)\nself.{v}.append(h.mean())",
        "self.{v} = []",
        group="left tensor",
        benign=True,
        losses="*part.{v}",
    ),
    Unit("left, detached", "self.{v} = mean(h)", group="left tensor", benign=True),
    Unit(
        "left, list that grows",
        "self.{v}.append(mean(h))",
        "self.{v} = []",
        group="left tensor, growing",
        changes={"cleared": "part.{v}.clear()"},
    ),
]
LEFT[6] = Unit("left, global", LEFT[6].forward, "", "G_{v} = {{}}", group="left tensor", losses="G_{v}['x']")

_COUNTED = {
    "int": ("self.{v} += 1", "self.{v}", "self.{v} = 0", ""),
    "float": ("self.{v} = self.{v} * 0.5", "self.{v}", "self.{v} = 4.0", ""),
    "bool": ("self.{v} = not self.{v}", "(1 + self.{v})", "self.{v} = False", ""),
    "dict": ("self.{v}['n'] += 1", "self.{v}['n']", "self.{v} = {{'n': 0}}", ""),
    "list": ("self.{v}.append(1)", "len(self.{v})", "self.{v} = []", ""),
    "set": ("self.{v}.add(len(self.{v}))", "len(self.{v})", "self.{v} = set()", ""),
    "tuple": ("self.{v} = (self.{v}[0] + 1,)", "self.{v}[0]", "self.{v} = (0,)", ""),
    "deque": ("self.{v}.rotate()", "self.{v}[0]", "self.{v} = collections.deque([1, 2, 3])", ""),
    "namespace": ("self.{v}.n += 1", "self.{v}.n", "self.{v} = types.SimpleNamespace(n=0)", ""),
    "slots": (
        "self.{v}.n += 1",
        "self.{v}.n",
        "self.{v} = S_{v}()",
        "class S_{v}:\n    __slots__ = ('n',)\n    def __init__(self):\n        self.n = 0\n",
    ),
    "iterator": ("n_{v} = next(self.{v})", "n_{v}", "self.{v} = iter(range(1, 99))", ""),
    "cycle": ("n_{v} = next(self.{v})", "n_{v}", "self.{v} = itertools.cycle([1, 2, 3])", ""),
    "generator": ("n_{v} = next(self.{v})", "n_{v}", "self.{v} = (i + 1 for i in range(99))", ""),
    "global": ("global G_{v}\nG_{v} += 1", "G_{v}", "", "G_{v} = 0"),
    "class": ("type(self).{v} += 1", "self.{v}", "type(self).{v} = 0", ""),
    "function": ("f_{v}.n += 1", "f_{v}.n", "", "def f_{v}(): pass\nf_{v}.n = 0"),
    "context variable": ("C_{v}.set(C_{v}.get() + 1)", "C_{v}.get()", "", "C_{v} = contextvars.ContextVar('C_{v}', default=0)"),
    "numpy": ("self.{v}[0] += 1", "float(self.{v}[0])", "self.{v} = np.zeros(1)", ""),
}
COUNTERS = [
    Unit(f"counter, {name}", f"{step}\nh = h * ({read})", init, head, group="counter")
    for name, (step, read, init, head) in _COUNTED.items()
]

_STEERED = {
    "every third call": "if {p} % 3 == 0:\n    h = h * 2",
    "the first calls": "if {p} < 3:\n    h = torch.tanh(h)",
    "none": "",
    "an equal one": "h = h * 2 if {p} == 4 else h",
    "a large one resets it": "if {p} > 2:\n    {p} = 0\n    h = h * 0.5",
}
COUNTED = [
    Unit(
        f"counted, {place}, {name}",
        f"{p} += 1\n{steered.replace('{p}', p)}",
        init,
        head,
        group="counted",
        changes={"set": f"{p.replace('self', 'part')} = 7"},
    )
    for place, (p, init, head) in {
        "attribute": ("self.{v}", "self.{v} = 0", ""),
        "dict": ("self.{v}['n']", "self.{v} = {{'n': 0}}", ""),
        "global": ("G_{v}['n']", "", "G_{v} = {{'n': 0}}"),
        "float": ("self.{v}", "self.{v} = 0.0", ""),
    }.items()
    for name, steered in _STEERED.items()
]

BACKWARD = [
    Unit(name, text, "self.{v} = 2.0", head, group="backward code", changes={"set": "part.{v} = 3.0"})
    for name, text, head in (
        ("hook", "h.register_hook(lambda g: g * self.{v})", ""),
        ("hook that keeps", "h.register_hook(lambda g: setattr(self, '{v}', float(g.sum())))", ""),
        (
            "Function",
            "h = F_{v}.apply(h, self)",
            "class F_{v}(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, h, m):\n        ctx.m = m\n"
            "        return h * 1.0\n    @staticmethod\n    def backward(ctx, g):\n        return g * ctx.m.{v}, None\n",
        ),
    )
]

CACHES = [
    Unit(
        "cache, attribute",
        "if self.{v} is None:\n    self.{v} = torch.arange(8).float().cos()\nh = h * self.{v}",
        "self.{v} = None",
        group="cache",
    ),
    Unit(
        "cache, dict",
        "if 8 not in self.{v}:\n    self.{v}[8] = torch.arange(8).float().cos()\nh = h * self.{v}[8]",
        "self.{v} = {{}}",
        group="cache",
    ),
    Unit(
        "cache, buffer",
        "if self.{v} is None:\n    self.register_buffer('{v}', torch.arange(8).float(), persistent=False)\nh = h + self.{v}",
        "self.register_buffer('{v}', None, persistent=False)",
        group="cache",
    ),
    Unit(
        "cache, lru_cache",
        "h = h * f_{v}(8)",
        head="@functools.lru_cache\ndef f_{v}(n):\n    return torch.arange(n).float().cos()\n",
        group="cache outside",
    ),
    Unit(
        "cache, global",
        "if 8 not in G_{v}:\n    G_{v}[8] = torch.arange(8).float().cos()\nh = h * G_{v}[8]",
        head="G_{v} = {{}}",
        group="cache outside",
    ),
]

RANDOM = [
    Unit(name, text, init, head, group="random")
    for name, (text, init, head) in {
        "manual_seed": ("torch.manual_seed(7)\nh = h + torch.rand(8)", "", ""),
        "fork_rng": ("with torch.random.fork_rng([]):\n    torch.manual_seed(3)\n    h = h + torch.randn(8)", "", ""),
        "state put back": ("s_{v} = torch.get_rng_state()\nh = h + torch.rand(8)\ntorch.set_rng_state(s_{v})", "", ""),
        "numpy": ("h = h * float(np.random.rand())", "", ""),
        "numpy Generator": ("h = h * float(self.{v}.random())", "self.{v} = np.random.default_rng(0)", ""),
        "Python": ("h = h * random.random()", "", ""),
        "Random": ("h = h * self.{v}.random()", "self.{v} = random.Random(0)", ""),
        "global Random": ("h = h * R_{v}.random()", "", "R_{v} = random.Random(0)"),
        "torch Generator": ("h = h + torch.rand(8, generator=self.{v})", "self.{v} = torch.Generator().manual_seed(1)", ""),
        "layer drop": ("h = h if random.random() < 0.5 else torch.tanh(h)", "", ""),
    }.items()
] + [
    Unit("rand", "h = h + torch.rand(8)", group="torch random", benign=True),
    Unit("randperm", "h = h[torch.randperm(h.shape[0])]", group="torch random", benign=True),
    Unit("bernoulli", "h = h * torch.bernoulli(torch.full((8,), 0.7))", group="torch random", benign=True),
]


def setting(kind: Kind, use: str) -> Unit:
    """A setting of this kind, used in this way."""
    group = "setting that may be refused" if kind in HARD else "tensor setting" if kind in TENSORS else "setting"
    text = USES[use].replace("{e}", kind.read)
    return Unit(f"{kind.name}, {use}", text, kind.init, kind.head, group, group == "setting", changes=kind.changes)


def uses_of(kind: Kind) -> list[str]:
    """The uses that a setting of this kind can stand in."""
    return [use for use in USES if kind.exact or use in FOR_TENSORS]


KINDS = [*SETTINGS, *TENSORS, *HARD]
BEHAVIOURS = {"carried": CARRIED, "left": LEFT, "counter": COUNTERS, "cache": CACHES, "kept": KEPT, "random": RANDOM}
BEHAVIOURS |= {"counted": COUNTED, "backward": BACKWARD}
