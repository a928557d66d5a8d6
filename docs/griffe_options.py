"""For the API reference: functions that take `PlanOptions` show them as keyword arguments, as `help()` does.

`planner.options.with_options` adds options to the docstring and the signature of a function when it is imported, which a
reference made from source would not show.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class Options(griffe.Extension):
    """Takes docstring and keyword arguments of functions decorated by `with_options` from the imported function."""

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
