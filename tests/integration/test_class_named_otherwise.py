"""Settings that code finds by other ways than a global variable and attributes: imports inside of functions, texts, bases."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support.members import ANY, GUARDED, Member, check, ids, member
from tests.support.source import Step

MODULES = """
import importlib, inspect, math, operator, sys

def new(name, **held):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(held)
    return module

config = new("otherwise_config", K=2.0, D={"k": 2.0}, C=type("C", (), {"k": 2.0}), n=0, seen=[])
exec("def scale(): return K", vars(config))
exec("def own():\\n    import otherwise_config as c\\n    return c.K", vars(config))
package = new("otherwise_package", K=2.0)
package.inner = new("otherwise_package.inner", K=2.0)
"""
HIDDEN = (
    MODULES
    + """
del config, package
def get(holder, name): return getattr(holder, name)
def find(name): return sys.modules[name]
"""
)
OF_CONFIG = "sys.modules['otherwise_config'].K = 3.0"
OF_INNER = "sys.modules['otherwise_package.inner'].K = 3.0"
CLASSES = """
class Meta(type):
    m = 2.0
    @property
    def of_meta(cls): return cls.m
class Base:
    k = 2.0
    @staticmethod
    def number(): return 2.0
class Derived(Base, metaclass=Meta):
    class Inner(Base): pass
"""
LIBRARIES = "import math\nF.made_up = torch.made_up = math.made_up = np.made_up = 2.0\n"


def cases(places: dict[str, tuple[str, str]], head: str, init: str = "") -> list[Member]:
    """Two planned steps, the change, two more; `places`: by name, an expression or statements for `k`, and a change."""
    made = []
    for name, (text, change) in places.items():
        forward = f"{text if 'k = ' in text else f'k = {text}'}\nh = h * k"
        steps = (Step(), Step(), Step(before=change), Step(), Step())
        made.append(member(name, forward, head=head, init=init, allowed=frozenset({"mismatch"}), steps=steps, planned_to=2))
    return made


IMPORTED = cases(
    {
        "import": ("import otherwise_config\nk = otherwise_config.K", OF_CONFIG),
        "import under another name": ("import otherwise_config as c\nk = c.K", OF_CONFIG),
        "a name": ("from otherwise_config import K as k\nk = k * 1", OF_CONFIG),
        "a table": ("from otherwise_config import D\nk = D['k']", "sys.modules['otherwise_config'].D['k'] = 3.0"),
        "a class": ("from otherwise_config import C\nk = C.k", "sys.modules['otherwise_config'].C.k = 3.0"),
        "a function": ("from otherwise_config import scale\nk = scale()", OF_CONFIG),
        "another function": (
            "from otherwise_config import scale\nk = scale()",
            "sys.modules['otherwise_config'].scale = lambda: 3.0",
        ),
        "a submodule": ("import otherwise_package.inner\nk = otherwise_package.inner.K", OF_INNER),
        "a submodule under another name": ("import otherwise_package.inner as i\nk = i.K", OF_INNER),
        "a submodule from its package": ("from otherwise_package import inner\nk = inner.K", OF_INNER),
        "import_module": ("importlib.import_module('otherwise_config').K", OF_CONFIG),
        "__import__": ("__import__('otherwise_config').K", OF_CONFIG),
        "sys.modules": ("sys.modules['otherwise_config'].K", OF_CONFIG),
        "sys.modules.get": ("getattr(sys.modules.get('otherwise_config'), 'K')", OF_CONFIG),
        "import, named to another function": ("import otherwise_config as c\nk = get(c, 'K')", OF_CONFIG),
        "found by another function": ("find('otherwise_config').K", OF_CONFIG),
        "found and read by another function": ("get(find('otherwise_config'), 'K')", OF_CONFIG),
        "imported by a module itself": ("sys.modules['otherwise_config'].own()", OF_CONFIG),
        "evaluated": ("eval('sys.modules[\"otherwise_config\"].K')", OF_CONFIG),
    },
    HIDDEN,
)
IMPORTED += cases(
    {
        "relative import": ("from . import K as k\nk = k * 1", "sys.modules['otherwise_package'].K = 3.0"),
        "relative import of a submodule": ("from .inner import K as k\nk = k * 1", OF_INNER),
    },
    HIDDEN + "__package__ = 'otherwise_package'",
)
BY_TEXT = cases(
    {
        "getattr": ("getattr(config, 'K')", "config.K = 3.0"),
        "getattr in another function": ("get(config, 'K')", "config.K = 3.0"),
        "getattr of each of some texts": ("[getattr(config, name) for name in ('K',)][0]", "config.K = 3.0"),
        "vars": ("vars(config)['K']", "config.K = 3.0"),
        "__dict__": ("config.__dict__['K']", "config.K = 3.0"),
        "attrgetter": ("operator.attrgetter('inner.K')(package)", "package.inner.K = 3.0"),
        "getattr of a class": ("getattr(Derived, 'k')", "Derived.k = 3.0"),
        "vars of a class": ("vars(Base)['k']", "Base.k = 3.0"),
        "getattr of a namespace": ("getattr(SPACE, 'k')", "SPACE.k = 3.0"),
        "vars of a namespace": ("vars(SPACE)['k']", "SPACE.k = 3.0"),
        "globals": ("globals()['G']", "globals()['G'] = 3.0"),
        "globals of a frame": ("sys._getframe().f_globals['G']", "globals()['G'] = 3.0"),
        "globals of a function": ("type(self).forward.__globals__['G']", "globals()['G'] = 3.0"),
        "getmodule": ("inspect.getmodule(type(self)).G", "globals()['G'] = 3.0"),
        "own module": ("sys.modules[__name__].G", "globals()['G'] = 3.0"),
    },
    MODULES + CLASSES + "SPACE = types.SimpleNamespace(k=2.0)\nG = 2.0\ndef get(holder, name): return getattr(holder, name)\n",
)
OF_MODULES = cases(
    {
        "function of a module": ("config.scale()", "config.scale = lambda: 3.0"),
        "class of a module": ("config.C.k", "config.C = Other"),
        "inner module": ("package.inner.K", "package.inner.K = 3.0"),
        "function of a module in an attribute": ("self.config.scale()", "config.scale = lambda: 3.0"),
        "class of a module in an attribute": ("self.config.C.k", "config.C = Other"),
        "function of a module in a list": ("HELD[0].scale()", "config.scale = lambda: 3.0"),
        "function of a module in a class": ("Holder.config.scale()", "config.scale = lambda: 3.0"),
        "function of a module among defaults": ("scaled()", "config.scale = lambda: 3.0"),
        "another inner module": ("package.inner.K", "package.inner = new('otherwise_other', K=3.0)"),
    },
    MODULES
    + """
HELD = [config]
class Other: k = 3.0
class Holder: config = config
def scaled(given=config): return given.scale()
""",
    init="self.config = config",
)
INHERITED = cases(
    {
        "of a base": ("Derived.k", "Base.k = 3.0"),
        "of a base of an inner class": ("Derived.Inner.k", "Base.k = 3.0"),
        "function of a base": ("Derived.number()", "Base.number = staticmethod(lambda: 3.0)"),
        "of a metaclass": ("Derived.m", "Meta.m = 3.0"),
        "read by a metaclass": ("Derived.of_meta", "Meta.m = 3.0"),
    },
    CLASSES,
)
OF_LIBRARIES = cases(
    {
        "import of a library": ("import torch.nn.functional as G\nk = G.made_up", "F.made_up = 3.0"),
        "a name of a library": ("from torch.nn.functional import made_up\nk = made_up", "F.made_up = 3.0"),
        "a module of a library": ("from torch.nn import functional as G\nk = G.made_up", "F.made_up = 3.0"),
        "torch": ("import torch as t\nk = t.made_up", "torch.made_up = 3.0"),
        "numpy": ("import numpy as n\nk = n.made_up", "np.made_up = 3.0"),
        "import_module of a library": ("import importlib\nk = importlib.import_module('math').made_up", "math.made_up = 3.0"),
    },
    LIBRARIES,
)
ABSENT_AT_FIRST = cases(
    {
        "asked for in globals": ("LATER if 'LATER' in globals() else 2.0", "globals()['LATER'] = 3.0"),
        "a NameError": ("try:\n    k = LATER\nexcept NameError:\n    k = 2.0", "globals()['LATER'] = 3.0"),
        "hides a builtin": ("max(1.0, 2.0)", "globals()['max'] = lambda *numbers: 3.0"),
        "getattr of a module": ("getattr(config, 'LATER', 2.0)", "config.LATER = 3.0"),
        "getattr of a class, later": ("getattr(Base, 'LATER', 2.0)", "Base.LATER = 3.0"),
        "getattr of a namespace, later": ("getattr(SPACE, 'LATER', 2.0)", "SPACE.LATER = 3.0"),
    },
    MODULES + CLASSES + "SPACE = types.SimpleNamespace()\n",
)
ANSWERED = cases(
    {"__getattr__ of a Python module": ("strict.K", "TABLE['K'] = 3.0")},
    MODULES + "TABLE = {'K': 2.0}\nstrict = new('otherwise_strict', __getattr__=lambda name: TABLE[name])\n",
)
EVERY = [*ABSENT_AT_FIRST, *ANSWERED, *IMPORTED, *BY_TEXT, *OF_MODULES, *INHERITED, *OF_LIBRARIES]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Neither the made-up modules nor what is made up in libraries."""
    yield
    for name in [name for name in sys.modules if name.startswith("otherwise_")]:
        del sys.modules[name]
    for name in ("torch", "torch.nn.functional", "math", "numpy"):
        vars(sys.modules[name]).pop("made_up", None)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", EVERY, ids=ids(EVERY))
def test_a_change_is_noticed(of: Member) -> None:
    check(of)


META = """
class Meta(type(nn.Module)):
    m = 2.0
class Part(nn.Module, metaclass=Meta):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * type(self).m)
"""


def test_a_metaclass_of_the_models_own_class_is_read() -> None:
    steps = (Step(), Step(), Step(before="type(type(part)).m = 3.0"), Step())
    check(member("metaclass", classes=META, allowed=frozenset({"mismatch"}), steps=steps, planned_to=2))


WRITTEN = {
    "number": "config.n += 1\nh = h * config.n",
    "table": "config.D['k'] += 1\nh = h * config.D['k']",
    "list": "config.seen.append(1)\nh = h * len(config.seen)",
    "number, imported": "import otherwise_config as c\nc.n += 1\nh = h * c.n",
    "list, imported": "from otherwise_config import seen\nseen.append(1)\nh = h * len(seen)",
    "number, by an attribute": "self.config.n += 1\nh = h * self.config.n",
    "table, by an attribute": "self.config.D['k'] += 1\nh = h * self.config.D['k']",
    "list, by an attribute": "self.config.seen.append(1)\nh = h * len(self.config.seen)",
    "number, by a list": "HELD[0].n += 1\nh = h * HELD[0].n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_forward_writes_into_a_python_module_is_refused_and_put_back(name: str) -> None:
    """The model itself then trains as it would have: planning has left nothing in the module."""
    check(
        member(
            name,
            WRITTEN[name],
            head=MODULES + "HELD = [config]\n",
            init="self.config = config",
            allowed=frozenset({"refused"}),
            word="changes its",
        )
    )


LATE = {
    "import": "from otherwise_config import K",
    "function of a module": "K = config.scale()",
    "getattr": "K = getattr(config, 'K')",
    "sys.modules": "K = sys.modules['otherwise_config'].K",
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("is_inside", [False, True], ids=["in the model", "in a submodule"])
@pytest.mark.parametrize("name", LATE)
def test_code_of_the_backward_is_followed_there_too(name: str, is_inside: bool) -> None:
    hook = f"def hook(g):\n    {LATE[name]}\n    return g * K\nh = h * 1\nh.register_hook(hook)"
    steps = (Step(), Step(), Step(kind="changed", between="config.K = 3.0"))
    of = member(
        name, hook, head=MODULES, allowed=ANY - GUARDED, steps=steps, planned_to=2, word="changed between", inside=is_inside
    )
    check(of)
