"""Kinds of places where a model keeps a setting: how it is made, read as a number, and changed by the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Kind:
    """A place for a setting. In every text `{v}` is a name of its own.

    Attributes:
        read: an expression in `forward` that is 2 until a change makes it another number.
        changes: what the loop may do, as a statement by name; `part` is the module.
        head, init: statements that make it.
        word: what a message about it must contain.
        exact: `read` is a plain number, so that it can be an index or a shape.
    """

    name: str
    read: str
    changes: dict[str, str]
    init: str = ""
    head: str = ""
    word: str = "{v}"
    exact: bool = field(default=True)


_POINT = "@dataclasses.dataclass\nclass Point_{v}:\n    x: float = 2.0\n    y: tuple = (1, 2)\n"
_PLAIN_CLASS = "class Held_{v}:\n    def __init__(self):\n        self.x = 2.0\n        self.deep = {{'k': [0.0, 2.0]}}\n"
_SLOTS = "class Slots_{v}:\n    __slots__ = ('x', 'y')\n    def __init__(self):\n        self.x, self.y = 2.0, 1\n"
_ENUM = "class Mode_{v}(enum.Enum):\n    LOW = 2\n    HIGH = 5\n"
_DESCRIPTOR = (
    "class Reader_{v}:\n    def __set_name__(self, owner, name):\n        self.key = name + '_kept'\n"
    "    def __get__(self, held, owner=None):\n        return held.__dict__[self.key]\n"
    "    def __set__(self, held, value):\n        held.__dict__[self.key] = value\n"
)
_MAKER = "def make_{v}():\n    k = 2.0\n    def read():\n        return k\n    return read\n"
_MAKER_DICT = "def make_{v}():\n    k = {{'x': [2.0]}}\n    return lambda: k['x'][0]\n"
_CALLABLE = "class Reads_{v}:\n    def __init__(self):\n        self.x = 2.0\n    def __call__(self):\n        return self.x\n"

SCALARS = [
    Kind(
        "float", "self.{v}", {"set": "part.{v} = 5.0", "to int": "part.{v} = 2", "to 1.0": "part.{v} = 1.0"}, "self.{v} = 2.0"
    ),
    Kind("int", "self.{v}", {"set": "part.{v} = 5", "to float": "part.{v} = 2.0", "add": "part.{v} += 1"}, "self.{v} = 2"),
    Kind("one", "self.{v} + 1", {"to float": "part.{v} = 1.0", "to True": "part.{v} = True"}, "self.{v} = 1"),
    Kind("zero", "2 * math.copysign(1, self.{v})", {"sign": "part.{v} = -0.0"}, "self.{v} = 0.0", "import math", exact=False),
    Kind("bool", "(5 if self.{v} else 2)", {"set": "part.{v} = True", "to 1": "part.{v} = 1"}, "self.{v} = False"),
    Kind("str", "{{'a': 2, 'b': 5}}[self.{v}]", {"set": "part.{v} = 'b'"}, "self.{v} = 'a'"),
    Kind("bytes", "len(self.{v})", {"set": "part.{v} = b'abcde'"}, "self.{v} = b'ab'"),
    Kind("complex", "abs(self.{v})", {"set": "part.{v} = 5j"}, "self.{v} = 2j"),
    Kind("not a number", "(2 if self.{v} != self.{v} else 5)", {"set": "part.{v} = 1.0"}, "self.{v} = float('nan')"),
    Kind("None", "(2 if self.{v} is None else self.{v})", {"filled": "part.{v} = 5"}, "self.{v} = None"),
    Kind("to None", "(5 if self.{v} is None else self.{v})", {"emptied": "part.{v} = None"}, "self.{v} = 2"),
    Kind("dtype", "(2 if self.{v} == torch.float32 else 5)", {"set": "part.{v} = torch.float64"}, "self.{v} = torch.float32"),
    Kind("slice", "len(range(9)[self.{v}])", {"set": "part.{v} = slice(5)"}, "self.{v} = slice(2)"),
    Kind("range", "len(self.{v})", {"set": "part.{v} = range(5)"}, "self.{v} = range(2)"),
    Kind("enum", "self.{v}.value", {"set": "part.{v} = type(part.{v}).HIGH"}, "self.{v} = Mode_{v}.LOW", _ENUM),
    Kind("absent", "getattr(self, '{v}', 2)", {"made": "part.{v} = 5"}),
    Kind("deleted", "getattr(self, '{v}', 5)", {"deleted": "vars(part).pop('{v}', None)"}, "self.{v} = 2"),
    Kind("computed name", "getattr(self, '{v}'[:1] + '{v}'[1:])", {"set": "part.{v} = 5"}, "self.{v} = 2"),
    Kind("through vars", "vars(self)['{v}']", {"set": "part.{v} = 5"}, "self.{v} = 2"),
    Kind("child's attribute", "self.a.{v}", {"set": "part.a.{v} = 5"}, "self.a.{v} = 2"),
]

CONTAINERS = [
    Kind("list", "self.{v}[1]", {"item": "part.{v}[1] = 5", "replaced": "part.{v} = [0, 5]"}, "self.{v} = [0, 2]"),
    Kind("list length", "len(self.{v})", {"append": "part.{v}.append(1)", "clear": "part.{v}.clear()"}, "self.{v} = [0, 2]"),
    Kind("list of lists", "self.{v}[0][1]", {"item": "part.{v}[0][1] = 5"}, "self.{v} = [[0, 2]]"),
    Kind("list type", "self.{v}[0]", {"to float": "part.{v}[0] = 2.0"}, "self.{v} = [2]"),
    Kind("dict", "self.{v}['k']", {"item": "part.{v}['k'] = 5", "replaced": "part.{v} = {{'k': 5}}"}, "self.{v} = {{'k': 2}}"),
    Kind("dict of lists", "self.{v}['k'][0]", {"item": "part.{v}['k'][0] = 5"}, "self.{v} = {{'k': [2]}}"),
    Kind(
        "dict order", "[*self.{v}.values()][0]", {"order": "part.{v}['k'] = part.{v}.pop('k')"}, "self.{v} = {{'k': 2, 'l': 5}}"
    ),
    Kind("dict key", "self.{v}.get('new', 2)", {"key": "part.{v}['new'] = 5"}, "self.{v} = {{}}"),
    Kind("defaultdict", "self.{v}['k'] + 2", {"item": "part.{v}['k'] = 3"}, "self.{v} = collections.defaultdict(int, k=0)"),
    Kind("OrderedDict", "self.{v}['k']", {"item": "part.{v}['k'] = 5"}, "self.{v} = collections.OrderedDict(k=2)"),
    Kind("Counter", "self.{v}['k']", {"item": "part.{v}['k'] += 1"}, "self.{v} = collections.Counter('kk')"),
    Kind("ChainMap", "self.{v}['k']", {"item": "part.{v}['k'] = 5"}, "self.{v} = collections.ChainMap({{}}, {{'k': 2}})"),
    Kind("tuple", "self.{v}[0]", {"replaced": "part.{v} = (5, 'a')"}, "self.{v} = (2, 'a')"),
    Kind("nested tuple", "self.{v}[0][1]", {"replaced": "part.{v} = (('a', 5),)"}, "self.{v} = (('a', 2),)"),
    Kind("list in a tuple", "self.{v}[0][0]", {"item": "part.{v}[0][0] = 5"}, "self.{v} = ([2], 'a')"),
    Kind("set", "(5 if 3 in self.{v} else 2)", {"add": "part.{v}.add(3)", "replaced": "part.{v} = {{3}}"}, "self.{v} = {{1}}"),
    Kind("frozenset", "len(self.{v})", {"replaced": "part.{v} = frozenset('abcde')"}, "self.{v} = frozenset('ab')"),
    Kind("deque", "self.{v}[-1]", {"append": "part.{v}.append(5)"}, "self.{v} = collections.deque([1, 2], maxlen=2)"),
    Kind(
        "namedtuple",
        "self.{v}.x",
        {"replaced": "part.{v} = part.{v}._replace(x=5)"},
        "self.{v} = Pair_{v}(2, 1)",
        "Pair_{v} = collections.namedtuple('Pair_{v}', 'x y')",
    ),
]

OBJECTS = [
    Kind("namespace", "self.{v}.x", {"set": "part.{v}.x = 5"}, "self.{v} = types.SimpleNamespace(x=2)"),
    Kind("namespace of lists", "self.{v}.x[0]", {"item": "part.{v}.x[0] = 5"}, "self.{v} = types.SimpleNamespace(x=[2])"),
    Kind("dataclass", "self.{v}.x", {"set": "part.{v}.x = 5.0", "tuple": "part.{v}.x = 2"}, "self.{v} = Point_{v}()", _POINT),
    Kind("object", "self.{v}.x", {"set": "part.{v}.x = 5.0"}, "self.{v} = Held_{v}()", _PLAIN_CLASS),
    Kind(
        "deep object", "self.{v}.deep['k'][1]", {"item": "part.{v}.deep['k'][1] = 5.0"}, "self.{v} = Held_{v}()", _PLAIN_CLASS
    ),
    Kind("object in a list", "self.{v}[0].x", {"set": "part.{v}[0].x = 5.0"}, "self.{v} = [Held_{v}()]", _PLAIN_CLASS),
    Kind("slots", "self.{v}.x", {"set": "part.{v}.x = 5.0"}, "self.{v} = Slots_{v}()", _SLOTS),
    Kind("slots in a dict", "self.{v}['k'].x", {"set": "part.{v}['k'].x = 5.0"}, "self.{v} = {{'k': Slots_{v}()}}", _SLOTS),
    Kind("numpy array", "int(self.{v}[0])", {"item": "part.{v}[0] = 5"}, "self.{v} = np.array([2, 1])"),
    Kind(
        "numpy array replaced", "int(self.{v}[0])", {"replaced": "part.{v} = np.array([5, 1])"}, "self.{v} = np.array([2, 1])"
    ),
    Kind("numpy number", "int(self.{v})", {"set": "part.{v} = np.float32(5)"}, "self.{v} = np.float32(2)"),
    Kind("callable object", "self.{v}()", {"set": "part.{v}.x = 5.0"}, "self.{v} = Reads_{v}()", _CALLABLE),
    Kind(
        "property",
        "self.{v}",
        {"set": "part.{v}_kept = 5"},
        "self.{v}_kept = 2\ntype(self).{v} = property(lambda s: s.{v}_kept)",
    ),
    Kind(
        "descriptor",
        "self.held_{v}.d",
        {"set": "part.held_{v}.d = 5"},
        "self.held_{v} = Has_{v}()",
        _DESCRIPTOR + "class Has_{v}:\n    d = Reader_{v}()\n    def __init__(self):\n        self.d = 2\n",
    ),
]

OUTSIDE = [
    Kind("class attribute", "self.{v}", {"set": "type(part).{v} = 5"}, "type(self).{v} = 2"),
    Kind("class attribute shadowed", "self.{v}", {"shadowed": "part.{v} = 5"}, "type(self).{v} = 2"),
    Kind("class list", "self.{v}[0]", {"item": "part.{v}[0] = 5"}, "type(self).{v} = [2]"),
    Kind("base class attribute", "Base_{v}.x", {"set": "Base_{v}.x = 5"}, "", "class Base_{v}:\n    x = 2\n", "x"),
    Kind("global", "G_{v}", {"set": "global G_{v}\nG_{v} = 5"}, "", "G_{v} = 2", "G_{v}"),
    Kind("global list", "G_{v}[0]", {"item": "G_{v}[0] = 5"}, "", "G_{v} = [2]", "G_{v}"),
    Kind("global dict", "G_{v}['k']", {"item": "G_{v}['k'] = 5"}, "", "G_{v} = {{'k': 2}}", "G_{v}"),
    Kind("global object", "G_{v}.x", {"set": "G_{v}.x = 5"}, "", "G_{v} = types.SimpleNamespace(x=2)", "G_{v}"),
    Kind(
        "global in a helper",
        "read_{v}()",
        {"set": "global G_{v}\nG_{v} = 5"},
        "",
        "G_{v} = 2\ndef read_{v}():\n    return G_{v}\n",
        "G_{v}",
    ),
    Kind("module object", "M_{v}.x", {"set": "M_{v}.x = 5"}, "", "M_{v} = types.ModuleType('M_{v}')\nM_{v}.x = 2", "{v}"),
    Kind("function attribute", "f_{v}.x", {"set": "f_{v}.x = 5"}, "", "def f_{v}():\n    return 1\nf_{v}.x = 2\n", "x"),
    Kind("default argument", "f_{v}()", {"set": "f_{v}.__defaults__ = (5,)"}, "", "def f_{v}(x=2):\n    return x\n", "{v}"),
    Kind(
        "keyword default", "f_{v}()", {"set": "f_{v}.__kwdefaults__['x'] = 5"}, "", "def f_{v}(*, x=2):\n    return x\n", "{v}"
    ),
    Kind(
        "default list", "f_{v}()", {"item": "f_{v}.__defaults__[0][0] = 5"}, "", "def f_{v}(x=[2]):\n    return x[0]\n", "{v}"
    ),
    Kind("closure cell", "self.{v}()", {"set": "part.{v}.__closure__[0].cell_contents = 5.0"}, "self.{v} = make_{v}()", _MAKER),
    Kind(
        "closure dict",
        "self.{v}()",
        {"item": "part.{v}.__closure__[0].cell_contents['x'][0] = 5.0"},
        "self.{v} = make_{v}()",
        _MAKER_DICT,
    ),
    Kind("helper with self", "f_{v}(self)", {"set": "part.{v} = 5"}, "self.{v} = 2", "def f_{v}(m):\n    return m.{v}\n"),
    Kind("partial", "self.{v}()", {"replaced": "part.{v} = functools.partial(int, 5)"}, "self.{v} = functools.partial(int, 2)"),
    Kind("partial's list", "self.{v}()", {"item": "part.{v}.args[0][0] = 5"}, "self.{v} = functools.partial(max, [2, 0])"),
    Kind("function", "self.{v}()", {"replaced": "part.{v} = lambda: 5"}, "self.{v} = lambda: 2"),
    Kind("method of the class", "self.{v}()", {"replaced": "type(part).{v} = lambda s: 5"}, "type(self).{v} = lambda s: 2"),
    Kind("method on the instance", "self.{v}()", {"set": "part.{v} = lambda: 5"}, "type(self).{v} = lambda s: 2"),
    Kind(
        "code of a function",
        "f_{v}()",
        {"set": "f_{v}.__code__ = (lambda: 5).__code__"},
        "",
        "def f_{v}():\n    return 2\n",
        "{v}",
    ),
    Kind(
        "lru_cache",
        "f_{v}(self.{v})",
        {"set": "part.{v} = 5"},
        "self.{v} = 2",
        "@functools.lru_cache\ndef f_{v}(x):\n    return x\n",
    ),
]

HARD = [
    Kind("weight's attribute", "self.a.weight.{v}", {"set": "part.a.weight.{v} = 5"}, "self.a.weight.{v} = 2"),
    Kind(
        "environment variable",
        "int(os.environ.get('FUZZ_{v}', 2))",
        {"set": "os.environ['FUZZ_{v}'] = '5'"},
        word="FUZZ_{v}|environ",
    ),
    Kind(
        "context variable",
        "C_{v}.get()",
        {"set": "C_{v}.set(5)"},
        "",
        "C_{v} = contextvars.ContextVar('C_{v}', default=2)",
        "C_{v}",
    ),
    Kind(
        "cell of a decorated function",
        "f_{v}()",
        {"set": "f_{v}.__wrapped__.x = 5"},
        "",
        "def wraps(f):\n    @functools.wraps(f)\n    def inner():\n        return f.x\n    return inner\ndef g(): pass\n"
        "g.x = 2\nf_{v} = wraps(g)\n",
        "{v}|x",
    ),
]
"""Places that may be refused when they are read, by name."""

TENSORS = [
    Kind(
        "tensor",
        "self.{v}",
        {"filled": "part.{v}.fill_(5)", "replaced": "part.{v} = torch.full((8,), 5.0)"},
        "self.{v} = torch.full((8,), 2.0)",
        exact=False,
    ),
    Kind(
        "tensor of another type",
        "self.{v}.to(h.dtype)",
        {"replaced": "part.{v} = torch.full((8,), 2.0).double()"},
        "self.{v} = torch.full((8,), 2.0)",
        exact=False,
    ),
    Kind(
        "tensor in a list",
        "self.{v}[0]",
        {"filled": "part.{v}[0].fill_(5)", "item": "part.{v}[0] = torch.full((8,), 5.0)"},
        "self.{v} = [torch.full((8,), 2.0)]",
        exact=False,
    ),
    Kind(
        "tensor in a dict",
        "self.{v}['k']",
        {"filled": "part.{v}['k'].fill_(5)", "item": "part.{v}['k'] = torch.full((8,), 5.0)"},
        "self.{v} = {{'k': torch.full((8,), 2.0)}}",
        exact=False,
    ),
    Kind(
        "tensor in a tuple",
        "self.{v}[0]",
        {"replaced": "part.{v} = (torch.full((8,), 5.0),)"},
        "self.{v} = (torch.full((8,), 2.0),)",
        exact=False,
    ),
    Kind(
        "tensor in a deque",
        "self.{v}[0]",
        {"append": "part.{v}.append(torch.full((8,), 5.0))"},
        "self.{v} = collections.deque([torch.full((8,), 2.0)], maxlen=1)",
        exact=False,
    ),
    Kind(
        "tensor in an object",
        "self.{v}.x",
        {"set": "part.{v}.x = torch.full((8,), 5.0)"},
        "self.{v} = types.SimpleNamespace(x=torch.full((8,), 2.0))",
        exact=False,
    ),
    Kind("global tensor", "G_{v}", {"filled": "G_{v}.fill_(5)"}, "", "G_{v} = torch.full((8,), 2.0)", "G_{v}", exact=False),
    Kind(
        "global tensor replaced",
        "G_{v}",
        {"set": "global G_{v}\nG_{v} = torch.full((8,), 5.0)"},
        "",
        "G_{v} = torch.full((8,), 2.0)",
        "G_{v}",
        exact=False,
    ),
    Kind(
        "empty slot of a buffer",
        "(2.0 if self.{v} is None else self.{v})",
        {"filled": "part.{v} = torch.full((8,), 5.0)"},
        "self.register_buffer('{v}', None)",
        exact=False,
    ),
    Kind(
        "empty slot of a parameter",
        "(2.0 if self.{v} is None else self.{v})",
        {"filled": "part.{v} = nn.Parameter(torch.full((8,), 5.0))"},
        "self.register_parameter('{v}', None)",
        exact=False,
    ),
    Kind(
        "number in a tensor",
        "self.{v}.item()",
        {"filled": "part.{v}.fill_(5)", "replaced": "part.{v} = torch.tensor(5.0)"},
        "self.{v} = torch.tensor(2.0)",
        word="{v}|value read",
    ),
    Kind(
        "tensor that requires grad",
        "self.{v}",
        {"filled": "part.{v}.data.fill_(5)"},
        "self.{v} = torch.full((8,), 2.0, requires_grad=True)",
        exact=False,
    ),
]

SETTINGS = [*SCALARS, *CONTAINERS, *OBJECTS, *OUTSIDE]

USES: dict[str, str] = {
    "scale": "h = h * ({e})",
    "shift": "h = torch.tanh(h) + ({e})",
    "branch": "h = torch.relu(h) * 3 if ({e}) > 3 else torch.tanh(h)",
    "index": "h = h + torch.stack([h.detach() * i for i in range(9)])[int({e})]",
    "pad": "h = F.pad(h, (int({e}), 0))[..., :8]",
    "repeat": "for _ in range(int({e})):\n    h = torch.tanh(h)",
    "type": "h = h * (1.5 if torch.full((1,), {e}).is_floating_point() else 0.5)",
    "activation": "h = (torch.relu, torch.tanh, F.silu, F.gelu, torch.sigmoid, F.softplus)[int({e}) % 6](h)",
    "format": "h = h * len('x' * int({e}))",
}
"""Uses of a number `{e}` in `forward`."""
FOR_TENSORS = ("scale", "shift")
"""Those that a tensor can stand in."""


def named(text: str, name: str) -> str:
    """The text of a kind with its own name in it."""
    return text.replace("{v}", name).replace("{{", "{").replace("}}", "}")
