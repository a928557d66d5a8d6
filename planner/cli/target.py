"""FILE.py:FUNCTION, the user's function that builds a model: found without running it, then run."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.arguments import check_call, check_function
from planner.errors import InputError, PlannerError
from planner.report.progress import line, stage
from planner.units import kind

Call = tuple[tuple[Any, ...], dict[str, Any]]
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Target:
    """A function of a file that exists.

    Attributes:
        text: as it was given.
        path: of the file, absolute.
        function: its name.
    """

    text: str
    path: Path
    function: str

    @staticmethod
    def find(text: str) -> Target:
        """The target; its file is not run.

        Raises:
            InputError: there is no such file, or no function is named.
        """
        file, _, function = text.rpartition(":")
        if not file and Path(text).is_file():
            raise InputError(f"{text!r}: name the function that builds the model, too, {text}:FUNCTION")
        if not file or not Path(file).is_file():
            raise InputError(f"{text!r}: give FILE.py:FUNCTION; there is no file {file!r}")
        return Target(text, Path(file).absolute(), function)

    def build(self, *, on_meta: bool = False) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The model and its example call; `on_meta`: built of tensors without data.

        Raises:
            InputError: the file or the function cannot be run, or it returned something else than (model, args, kwargs).
        """
        with stage(f"build {self.path.name}:{self.function}", True):
            function = self._load()
            if not on_meta:
                return self._call(function)
            import torch

            with torch.device("meta"):
                return self._call(function)

    def build_batches(self) -> tuple[Any, Callable[[int], Call]]:
        """The model, and what makes the call of a batch.

        FUNCTION() returns both. Or it takes `batch` and returns (model, args, kwargs): then it is called again for each batch,
        and the model that comes with the inputs is dropped at once.

        Raises:
            InputError: the file or the function cannot be run, or it returned something else.
        """
        line(f"build {self.path.name}:{self.function}", True)
        function = self._load()
        if not _takes_batch(function):
            built = self._run(function)
            if not isinstance(built, tuple) or len(built) != 2:
                raise InputError(
                    f"{self.text} takes no batch=, so it must return (model, make_inputs), not {kind(built)}; "
                    "args, kwargs = make_inputs(batch)"
                )
            model, make_inputs = built
            return model, check_function(make_inputs, "make_inputs", "args, kwargs = make_inputs(batch)")
        model, args, kwargs = self._call(function, batch=1)
        first: list[Call] = [(args, kwargs)]

        def make_inputs_of(batch: int) -> Call:
            if batch == 1 and first:
                return first.pop()
            _, args, kwargs = self._call(function, batch=batch)
            return args, kwargs

        return model, make_inputs_of

    def _call(self, function: Callable[..., Any], **sizes: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        built = self._run(function, **sizes)
        if not isinstance(built, tuple) or len(built) != 3:
            raise InputError(f"{self.text} must return (model, args, kwargs), not {kind(built)}")
        model, args, kwargs = built
        return model, *check_call(args, kwargs)

    def _run(self, function: Callable[..., Any], **sizes: int) -> Any:
        try:
            return function(**sizes)
        except PlannerError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.text} cannot be run: {self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        """An exception of the user's code in one line, with the innermost line of the file or one beside it that led to it."""
        lines = traceback.extract_tb(error.__traceback__)
        places = [(Path(entry.filename), entry.lineno) for entry in lines if self._is_users(entry.filename)]
        if isinstance(error, SyntaxError) and error.filename and self._is_users(error.filename):
            places = [(Path(error.filename), error.lineno)]
        where = f" at {places[-1][0].name}:{places[-1][1]}" if places else ""
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"

    def _is_users(self, file: str) -> bool:
        """The file is the target's, or lies in its folder and is of no installed package."""
        path = Path(file)
        inside = path.is_relative_to(self.path.parent) and not {"site-packages", "dist-packages"}.intersection(path.parts)
        return path == self.path or inside

    def _load(self) -> Callable[..., Any]:
        """The function; runs the file."""
        name, is_own = _module_name(self.path)
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None or spec.loader is None:
            raise InputError(f"{self.path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        folder = str(self.path.parent.resolve())
        if folder not in sys.path:
            # in front, as `python FILE.py` has it; but not where FILE would hide a module of its name (torch.py)
            sys.path.insert(0 if is_own else len(sys.path), folder)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise InputError(f"{self.text} cannot be run: {self._reason(error)}") from error
        build = getattr(module, self.function, None)
        if not callable(build):
            raise InputError(f"{self.path} has no function {self.function!r}")
        return build  # type: ignore[no-any-return]


def _module_name(path: Path) -> tuple[str, bool]:
    """The name to import a file under, and whether it is the file's own.

    That is what other processes find the file's classes by when they unpickle them. Where it is another module's name, which
    must stay what it is (json.py, torch.py), a private one takes its place, by which this process unpickles them.
    """
    stem = path.stem
    if stem.isidentifier() and stem not in sys.modules:
        spec = importlib.util.find_spec(stem)
        if spec is None or (spec.origin and Path(spec.origin).resolve() == path.resolve()):
            return stem, True
    return f"_planner_target_{next(_numbers)}_{stem.replace('.', '_')}", False


def _takes_batch(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.name == "batch" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
