"""For the API reference: what docstrings leave to `help()` and to base classes is written out.

- `planner.options` holds each option once, and adds its help to docstrings and signatures when the package is imported.
  A reference that is made from source would not show that.
- "args, kwargs: an example call" becomes a row for each of them.
- A class also lists the attributes that its base classes describe.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
_ENTRY = re.compile(r"^    ([\w*]+(?:, [\w*]+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings and signatures of the package before they are shown."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function of the package."""
        if func.docstring is None:
            return
        if _takes_options(func):
            _take_signature(func, griffe.dynamic_import(func.path))
        _rewrite(func, lambda entries: {name: text for name, text in entries.items() if text != "see below."})

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when everything is loaded, so that base classes are known."""
        if not _takes_options(pkg["api.plan"]):
            raise griffe.ExtensionError("planner.api.plan would be shown without its options: see planner.options.with_options")
        for module in _modules(pkg):
            for kind in module.classes.values():
                if not kind.is_alias and kind.docstring is not None:
                    _describe_attributes(kind)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    inner = [found for each in module.modules.values() if not each.is_alias for found in _modules(each)]
    return [module, *inner]


def _takes_options(func: griffe.Function) -> bool:
    return any(str(decorator.value).startswith("with_options(") for decorator in func.decorators)


def _take_signature(func: griffe.Function, function: Callable[..., Any]) -> None:
    """The docstring and the keyword arguments that `with_options` gave to the imported function."""
    text = inspect.getdoc(function) or ""
    func.docstring = griffe.Docstring(text.replace("\nOptions:\n", "\nKeyword Args:\n"), parent=func)
    given = [each for each in func.parameters if each.kind is not griffe.ParameterKind.var_keyword]
    known = {each.name for each in given}
    taken = [
        griffe.Parameter(
            each.name, annotation=str(each.annotation), kind=griffe.ParameterKind.keyword_only, default=repr(each.default)
        )
        for each in inspect.signature(function).parameters.values()
        if each.name not in known
    ]
    func.parameters = griffe.Parameters(*given, *taken)


def _describe_attributes(kind: griffe.Class) -> None:
    """Add what base classes describe; the options have their help in the place of a docstring."""
    inherited: dict[str, str] = {}
    if kind.path == "planner.options.PlanOptions":
        for name, option in griffe.dynamic_import("planner.options.OPTIONS").items():
            text = f"{option.metadata['help']}. {option.metadata['details']}".strip()
            inherited[name] = f"{text} Default: `{option.default!r}`."
    for base in reversed(kind.mro()):
        if base.docstring is not None:
            found = _SECTION.search(inspect.cleandoc(base.docstring.value) + "\n")
            inherited |= _entries(found[2]) if found and found[1] == "Attributes" else {}
    if inherited and "\nAttributes:\n" not in kind.docstring.value:
        kind.docstring.value = f"{inspect.cleandoc(kind.docstring.value)}\n\nAttributes:\n    others: as in the base class"

    def with_inherited(own: dict[str, str]) -> dict[str, str]:
        own = {name: text for name, text in own.items() if name != "others"}
        return inherited | {name: text for name, text in own.items() if name not in inherited or not text.startswith("as in")}

    _rewrite(kind, with_inherited)


def _entries(section: str) -> dict[str, str]:
    """Texts by name, of entries that may have several names."""
    return {name: text for names, text in _ENTRY.findall(section) for name in names.split(", ")}


def _rewrite(described: griffe.Object, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Change the entries of the sections Args and Attributes of a docstring."""

    def section(found: re.Match[str]) -> str:
        rows = (f"    {name}: {text}\n" for name, text in change(_entries(found[2])).items())
        return f"{found[1]}:\n{''.join(rows)}\n"

    described.docstring.value = _SECTION.sub(section, inspect.cleandoc(described.docstring.value) + "\n")
