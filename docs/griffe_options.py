"""For the API reference: options are shown with `PlanOptions`, and as keyword arguments of the functions that take them.

`planner.options` holds each option once, with its help, and adds it to docstrings and signatures when the package is imported,
which a reference made from source would not show.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class Options(griffe.Extension):
    """Takes docstring and keyword arguments of functions decorated by `with_options` from the imported function."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for every class of the package."""
        if cls.path != "planner.options.PlanOptions":
            return
        described = griffe.dynamic_import("planner.options.OPTIONS")
        texts = {
            name: " ".join(f"{field.metadata['help']}. {field.metadata['details']}".split())
            for name, field in described.items()
        }
        rows = "\n".join(
            f"    {name} ({described[name].type}): {text} Default: `{described[name].default!r}`."
            for name, text in texts.items()
        )
        cls.docstring = griffe.Docstring(f"{inspect.cleandoc(cls.docstring.value)}\n\nAttributes:\n{rows}", parent=cls)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function of the package."""
        if not any(str(decorator.value).startswith("with_options(") for decorator in func.decorators):
            return
        function = griffe.dynamic_import(func.path)
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
