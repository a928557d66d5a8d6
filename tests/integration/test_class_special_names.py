"""Attributes with two underscores that are the user's own, and modules' lists of hooks, read as state."""

import pytest

from tests.support.members import check, ids, inside, member
from tests.support.source import Step

MISMATCH = frozenset({"mismatch"})
HEAD = """
__scale__ = 2.0
class Has:
    __scale__ = 2.0
    def __init__(self): self.__own__ = 2.0
class Settings: pass
Settings.__scale__ = 2.0
def hook(*args): return None
def made(k):
    class Takes:
        k = 2.0
        def __call__(self, h): return h * k
        def __getitem__(self, i): return k
        def __len__(self): return int(k)
        def __float__(self): return k
        def __iter__(self): return iter([k])
        def __contains__(self, i): return k == 2.0
        def __enter__(self): return k
        def __exit__(self, *args): return None
        def __eq__(self, other): return k == 2.0
        def __abs__(self): return k
        def __floordiv__(self, other): return k
        def __getattr__(self, name): return k
        def __hash__(self): return 0
        def read(self): return self.k
    return Takes
Takes, Other = made(2.0), made(3.0)
Other.k = 3.0
"""


def changed(name, init, use, change, word):
    """A model whose forward reads what the loop changes at the third step."""
    steps = (Step(), Step(), Step(before=change), Step())
    return member(
        name, use, init=init, head=HEAD, steps=steps, allowed=MISMATCH, word=word, planned_from=0, planned_to=2, warm=0
    )


NAMES = [
    changed("of the module", "self.__scale__ = 2.0", "h = h * self.__scale__", "part.__scale__ = 3.0", r"__scale__ is 3\.0"),
    changed("by vars", "self.__s__ = 2.0", "h = h * vars(self)['__s__']", "part.__s__ = 3.0", r"__s__ is 3\.0"),
    changed("in a dictionary", "self.__d__ = {'k': 2.0}", "h = h * self.__d__['k']", "part.__d__['k'] = 3.0", r"'k'\] is 3\.0"),
    changed(
        "of the module's class", "type(self).__t__ = 2.0", "h = h * self.__t__", "type(part).__t__ = 3.0", r"__t__ is 3\.0"
    ),
    changed("of an object", "self.o = Has()", "h = h * self.o.__own__", "part.o.__own__ = 3.0", r"__own__ is 3\.0"),
    changed("of an object's class", "self.o = Has()", "h = h * self.o.__scale__", "Has.__scale__ = 3.0", r"__scale__ is 3\.0"),
    changed("of a class", "pass", "h = h * Settings.__scale__", "Settings.__scale__ = 3.0", r"__scale__ is 3\.0"),
    changed("a global variable", "pass", "h = h * __scale__", "global __scale__\n__scale__ = 3.0", r"__scale__ is 3\.0"),
    changed("without a use of the name's end", "self.__x = 2.0", "h = h * self.__x", "part._Part__x = 3.0", "__x is 3"),
]
HOOKS = [
    changed(
        f"the number of {kind}",
        "pass",
        f"h = h * (1 + len(self.{kind}))",
        f"part.{register}",
        rf"hooks of .*\({kind}\)|new hook",
    )
    for kind, register in {
        "_forward_hooks": "register_forward_hook(hook)",
        "_forward_pre_hooks": "register_forward_pre_hook(hook)",
        "_forward_hooks_with_kwargs": "register_forward_hook(hook, with_kwargs=True)",
        "_forward_hooks_always_called": "register_forward_hook(hook, always_call=True)",
        "_backward_hooks": "register_full_backward_hook(hook)",
        "_backward_pre_hooks": "register_full_backward_pre_hook(hook)",
        "_state_dict_hooks": "_register_state_dict_hook(hook)",
        "_state_dict_pre_hooks": "register_state_dict_pre_hook(hook)",
        "_load_state_dict_pre_hooks": "register_load_state_dict_pre_hook(hook)",
        "_load_state_dict_post_hooks": "register_load_state_dict_post_hook(hook)",
    }.items()
]
HOOKS.append(
    changed(
        "the kind of backward hooks",
        "pass",
        "h = h * (3 if self._is_full_backward_hook else 2)",
        "part._is_full_backward_hook = True",
        r"_is_full_backward_hook\) is True",
    )
)


USES = {
    "__call__": "h = self.o(h)",
    "__getitem__": "h = h * self.o[0]",
    "__len__": "h = h * len(self.o)",
    "__float__": "h = h * float(self.o)",
    "__iter__": "h = h * [*self.o][0]",
    "__contains__": "h = h * (2 if 1 in self.o else 3)",
    "__eq__": "h = h * (2 if self.o == 1 else 3)",
    "__abs__": "h = h * abs(self.o)",
    "__floordiv__": "h = h * (self.o // 1)",
    "__getattr__": "h = h * self.o.made_up",
    "__enter__": "with self.o as k:\n    h = h * k",
}
METHODS = [
    *(
        changed(f"{name}, replaced", "self.o = Takes()", use, f"Takes.{name} = Other.{name}", rf"o\.{name}")
        for name, use in USES.items()
    ),
    changed(
        "a variable of __call__",
        "self.o = Takes()",
        USES["__call__"],
        "Takes.__call__.__closure__[0].cell_contents = 3.0",
        r"o\.__call__",
    ),
    changed("the class of an object", "self.o = Takes()", "h = h * self.o.read()", "part.o.__class__ = Other", "o "),
    changed(
        "the dictionary of an object",
        "self.o = Has()",
        "h = h * self.o.__own__",
        "part.o.__dict__ = {'__own__': 3.0}",
        r"__own__ is 3\.0",
    ),
]


@pytest.mark.parametrize("of", [*NAMES, *HOOKS, *METHODS], ids=ids([*NAMES, *HOOKS, *METHODS]))
def test_a_change_is_named(of):
    check(of)


@pytest.mark.parametrize("of", NAMES[:3] + HOOKS[:1] + HOOKS[6:7], ids=lambda of: of.name)
def test_in_a_submodule_too(of):
    check(inside(of))
