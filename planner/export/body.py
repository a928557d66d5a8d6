"""The statements of one function of an exported file: expressions, names, and where each name is deleted.

A value is freed where the plan says if its last name is deleted after its last use: with `del` inside a function. A value whose
last use is inside a called function is passed in a list, `f(x := [x])`, which the function empties: `x = x.pop()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx

from planner._compat.dispatch import OpOverload
from planner.export.lines import Line, WrittenPass
from planner.export.names import ValueNames, identifier, is_below, key_text, literal, unique
from planner.graph.source import Source
from planner.kernels import custom

_WIDTH = 120
_INDENT = "    "


@dataclass(frozen=True, slots=True)
class Words:
    """Names that all functions of a file share.

    Attributes:
        values: names of values.
        kernels: names of kernels.
        device: of the step.
    """

    values: ValueNames
    kernels: Mapping[Any, str]
    device: torch.device


@dataclass(frozen=True, slots=True)
class BlockCall:
    """Lines [start, stop) of a pass as a call of a function for the module `prefix`."""

    start: int
    stop: int
    prefix: str
    function: str
    arguments: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


class Body:
    """Lines [start, stop) of a pass as the body of a function.

    Attributes:
        text: its statements.
        arguments: values that it is passed; their names are `argument_names`.
        results: values that it returns.
    """

    def __init__(
        self, written: WrittenPass, words: Words, start: int, stop: int, prefix: str = "", calls: Collection[BlockCall] = ()
    ) -> None:
        self._written, self._words, self._start, self._stop, self._prefix = written, words, start, stop, prefix
        self._called = {i: call for call in calls for i in range(call.start, call.stop)}
        self._names: dict[fx.Node, str] = {}
        self._taken = {"w", "kept", "grads", "at", *words.kernels.values(), *(call.function for call in calls)}
        own = written.lines[start:stop]
        leaving = (n for line in own for n in line.made if written.last_read.get(n, -1) >= stop)
        self.results = tuple(leaving) if prefix else written.returned
        self.arguments = tuple(dict.fromkeys(node for line in own for node in line.reads if self._is_argument(node)))
        if prefix:
            for node in self.arguments:
                self._name(node, "grad" if self._is_gradient(node) else "x")
        self._reads = Counter(node for i in range(start, stop) for node in self._reads_at(i))
        self._read_inside = {node for i in self._called for node in written.lines[i].reads}
        handed = [self._names[node] for node in self.arguments if prefix and ends_in(written, node, stop)]
        self.text = "\n".join(_INDENT + line for line in (*(f"{name} = {name}.pop()" for name in handed), *self._statements()))

    @property
    def argument_names(self) -> list[str]:
        """Names of the function's parameters for `arguments`."""
        return [self._names[node] for node in self.arguments]

    def _is_argument(self, node: fx.Node) -> bool:
        kind, key = self._written.outside.get(node, ("", ""))
        if kind == "kept":
            return bool(self._prefix) and not is_below(key, self._prefix)
        return kind != "w" and not self._start <= self._written.made_at.get(node, -1) < self._stop

    def _is_gradient(self, node: fx.Node) -> bool:
        made_at = self._written.made_at.get(node)
        if made_at is None:
            return self._written.outside[node][0] == "output gradient"
        return not self._words.values.is_of_forward(self._written.lines[made_at])

    def _reads_at(self, i: int) -> Sequence[fx.Node]:
        call = self._called.get(i)
        if call is None:
            return self._written.lines[i].reads
        return call.arguments if call.start == i else ()

    def _name(self, node: fx.Node, wanted: str) -> str:
        self._names[node] = unique(wanted, self._taken)
        self._taken.add(self._names[node])
        return self._names[node]

    def _name_result(self, line: Line, node: fx.Node) -> str:
        key = self._words.values.key(line, line.results.index(node))
        return self._name(node, identifier(key, self._prefix, self._is_gradient(node)))

    def _statements(self) -> Iterator[str]:
        todo = [i for i in range(self._start, self._stop) if i not in self._called or self._called[i].start == i]
        for module, group in groupby(todo, key=lambda i: None if i in self._called else self._written.lines[i].module):
            if module is None:
                for i in group:
                    yield from self._call(self._called[i])
                continue
            mine = list(group)
            yield from self._heading(module, [self._written.lines[i].source for i in mine])
            for i in mine:
                yield from self._statement(i)
        if self.results:
            handed = ", ".join(self._text(node, self._stop) for node in self.results)
            is_tuple_of_one = len(self.results) == 1 and not self._prefix
            yield from wrapped([f"return ({handed},)" if is_tuple_of_one else f"return {_enclosed(handed)}"])

    def _heading(self, module: str, sources: Sequence[Source]) -> Iterator[str]:
        """A comment that names the module and its lines."""
        if module == self._prefix:
            module = "the block itself" if module else "the model itself"
        elif is_below(module, self._prefix):
            module = module[len(self._prefix) + 1 :]
        numbers: dict[str, dict[int, None]] = {}
        for source in sources:
            if source.file:
                numbers.setdefault(source.file, {})[source.line] = None
        where = "; ".join(f"{file}:{', '.join(map(str, found))}" for file, found in numbers.items())
        yield f"# {module}{'  ' if where else ''}{where}"

    def _statement(self, i: int) -> Iterator[str]:
        written, line = self._written, self._written.lines[i]
        yield from self._fetch(line.reads, i)
        expression = self._text(line.root, i)
        ended = [self._names[n] for n in dict.fromkeys(line.reads) if n in self._names and written.last_read[n] == i]
        stored = [n for n in line.made if n in written.stored]
        if line.results == (line.root,):
            targets = [self._name_result(line, line.root)] if line.root in written.last_read else []
            targets += [self._place(n) for n in stored]
            stored = []
        elif len(line.made) == 1 and not stored:
            (node,) = line.made
            expression += f"[{line.results.index(node)}]"
            targets = [self._name_result(line, node)]
        else:
            targets = [self._unpacking(line)]
            ended += ["_"] * (len(line.made) < max(len(line.results), _num_results(line)))
            stored = [n for n in stored if n in written.last_read]
            expression += self._clipped(line)
        statements = [" = ".join([*targets, expression]), *(f"{self._place(node)} = {self._names[node]}" for node in stored)]
        if ended and i + 1 < self._stop:
            statements.append(f"del {_enclosed(', '.join(ended))}")
        note = "  # recomputed" if line.again and line.kernel.target is not custom.swap_rng_state else ""
        yield from wrapped(statements, note)

    def _unpacking(self, line: Line) -> str:
        """The left side of an assignment of several results: names, places, and _ for what is not read."""
        targets = []
        for node in line.results:
            if node is None:
                targets.append("_")
            elif node in self._written.last_read:
                targets.append(self._name_result(line, node))
            else:
                targets.append(self._place(node))
        num_more = _num_results(line) - len(targets)
        return _enclosed(", ".join(targets + ["_"] * num_more) + ("," if len(targets) + num_more == 1 else ""))

    def _clipped(self, line: Line) -> str:
        """A slice that takes the results that are read off a longer list."""
        made = line.root.meta.get("val", ())
        return f"[:{len(line.results)}]" if _returns_list(line) and len(made) != len(line.results) else ""

    def _place(self, node: fx.Node) -> str:
        where, key = self._written.stored[node]
        return f"{where}[{key_text(key, self._prefix)}]"

    def _call(self, call: BlockCall) -> Iterator[str]:
        written = self._written
        yield from self._fetch(call.arguments, call.start)
        names = ["w", "kept", *(["grads"] if any(kind == "kept" for kind, _ in written.outside.values()) else [])]
        given = [self._handed(node, call) for node in call.arguments]
        results = [self._name_result(written.lines[written.made_at[n]], n) for n in call.results]
        text = f"{call.function}({', '.join([literal(call.prefix), *names, *given])})"
        yield from wrapped([f"{_enclosed(', '.join(results))} = {text}" if results else text])

    def _handed(self, node: fx.Node, call: BlockCall) -> str:
        if not ends_in(self._written, node, call.stop):
            return self._text(node, call.start)
        if node in self._names:
            return f"{self._names[node]} := [{self._names[node]}]"
        return f"[kept.pop({key_text(self._written.outside[node][1], self._prefix)})]"

    def _fetch(self, reads: Sequence[fx.Node], i: int) -> Iterator[str]:
        """Pop the kept values that are read several times from here on; one that is read once is popped in its expression."""
        for node in dict.fromkeys(reads):
            kind, key = self._written.outside.get(node, ("", ""))
            if kind == "kept" and node not in self._names and self._is_fetched(node, reads.count(node), i):
                name = self._name(node, identifier(key, self._prefix))
                yield f"{name} = kept.pop({key_text(key, self._prefix)})"

    def _is_fetched(self, node: fx.Node, count: int, i: int) -> bool:
        """Whether the value is read several times here, and neither after this body nor in a function that it calls."""
        last = self._written.last_read[node]
        if node in self._read_inside:
            return last == i and count > 1
        return last < self._stop and self._reads[node] > 1

    def _text(self, node: fx.Node, i: int) -> str:
        """A value as an expression, read by line i."""
        written = self._written
        if node in self._names:
            return self._names[node]
        if node in written.outside:
            kind, key = written.outside[node]
            if kind == "w":
                return f"w[{key_text(key, self._prefix)}]"
            if kind == "output gradient":
                return key
            key = key_text(key, self._prefix)
            return f"kept.pop({key})" if written.last_read[node] == i else f"kept[{key}]"
        given = [self._argument(arg, i) for arg in node.args]
        given += [f"{name}={self._argument(arg, i)}" for name, arg in node.kwargs.items()]
        return f"{self._words.kernels[node.target]}({', '.join(given)})"

    def _argument(self, arg: Any, i: int) -> str:
        if isinstance(arg, fx.Node):
            return self._text(self._written.same.get(arg, arg), i)
        if isinstance(arg, (list, tuple)) and any(isinstance(item, fx.Node) for item in arg):
            items = ", ".join(self._argument(item, i) for item in arg)
            return f"[{items}]"
        return literal(arg, self._words.device)


def ends_in(written: WrittenPass, node: fx.Node, stop: int) -> bool:
    """Whether the last use of a value is before line `stop`, so that nothing holds it afterwards."""
    return written.outside.get(node, ("", ""))[0] != "output gradient" and written.last_read[node] < stop


def _returns_list(line: Line) -> bool:
    target = line.root.target
    return isinstance(target, OpOverload) and "List" in str(target._schema.returns[0].type)


def _num_results(line: Line) -> int:
    """Number of results of the kernel; up to the last one that is read, where it returns a list."""
    target = line.root.target
    if not isinstance(target, OpOverload) or _returns_list(line):
        return len(line.results)
    return len(target._schema.returns)


def _enclosed(names: str) -> str:
    """In parentheses where they may not fit on a line, so that it can be broken."""
    return f"({names})" if len(names) > _WIDTH * 2 // 3 else names


def wrapped(statements: Sequence[str], note: str = "") -> Iterator[str]:
    """Statements on one line if they fit, else each on its own lines; the comment `note` follows the first."""
    line = f"{'; '.join(statements)}{note}"
    if len(line) <= _WIDTH - len(_INDENT):
        yield line
        return
    first, *others = statements
    yield from _broken(first + note)
    yield from (line for statement in others for line in _broken(statement))


def _broken(statement: str) -> Iterator[str]:
    """A statement on lines of at most the width, each broken at the best place, as late as possible."""
    width = _WIDTH - len(_INDENT)
    breaks = list(_breaks(statement))
    start, indent = 0, ""
    while len(indent) + len(statement) - start > width:
        fitting = [(badness, -end) for end, badness in breaks if start < end <= start + width - len(indent)]
        end = -min(fitting)[1] if fitting else next((end for end, _ in breaks if end > start), len(statement))
        yield indent + statement[start:end].rstrip()
        start, indent = end, _INDENT
    if start < len(statement):
        yield indent + statement[start:]


def _breaks(statement: str) -> Iterator[tuple[int, float]]:
    """(Position where a line may end, its badness): after a comma, better inside fewer brackets; else after a parenthesis."""
    depth, quoted = 0, False
    for i, letter in enumerate(statement):
        quoted ^= letter == '"' and statement[i - 1] != "\\"
        if quoted:
            continue
        depth += (letter in "({") + 2 * (letter == "[") - (letter in ")}") - 2 * (letter == "]")
        if letter == "(":
            yield i + 1, depth + 2.5
        elif depth and statement.startswith(", ", i):
            yield i + 2, depth
