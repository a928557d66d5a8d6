"""What a forward reads of tensors beside their data and form: gradients, versions, flags, addresses, attributes of the user's.

A traced tensor shows others than the real one: it has no gradient and no memory, and is a leaf where the real one is not. So
reads of weights, of the call's tensors and of those in Python state are noted in the recording forward, answered in the trace,
and compared at each call. What tensors that the forward makes show is compared between the two.
"""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat.fake_tensors import FakeTensor
from planner.errors import CaptureError
from planner.tracer.faults import calls_users_code
from planner.tracer.host.backward_code import LeftOut
from planner.tracer.host.fingerprint import Fingerprint, alike, everything
from planner.tracer.host.scopes import is_library_code
from planner.tracer.host.tensor_patches import METHODS, get_attribute, patched
from planner.tracer.host.tensor_places import LOST, TensorPlace, TensorRead
from planner.tracer.host.values import ABSENT, members

_COMPARED_WITH_TRACE = frozenset(
    {"grad", "grad_fn", "is_leaf", "retains_grad", "_version", "_base", "storage_offset", "_is_view"}
)
"""What a traced tensor may show otherwise than the real one that the forward makes."""
_READ_GRADIENTS = tuple(f"{package.__path__[0]}{os.sep}" for package in (torch.nn, torch.optim))
"""Code of torch that acts on gradients."""
_APPLY = nn.Module._apply.__code__
"""Moves weights and their gradients (`module.to(...)`): the gradient decides about nothing but itself."""


def shows_itself(name: str) -> bool:
    """`shown` is the fingerprint of the attribute's own value."""
    return name not in METHODS and name not in ("grad_fn", "_base", "_backward_hooks", "_post_accumulate_grad_hooks")


@calls_users_code
def shown(tensor: torch.Tensor, name: str) -> Fingerprint:
    """What a tensor's attribute is, or its method returns, as a fingerprint."""
    value = getattr(tensor, name, ABSENT)
    if name in METHODS:
        try:
            value = value()
        except RuntimeError:  # of a tensor without memory
            value = ABSENT
    if name == "grad_fn":
        value = None if value is None else value.name()
    elif name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        value = len(value or ())
    elif name == "_base":
        value = value is None
    elif isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
        value = (value.data_ptr(), value.nbytes())
    return everything().of(value)


SeenByLine = Mapping[tuple[types.CodeType, int, str], Sequence[Fingerprint]]
"""What tensors showed, by the line of code that read it and the attribute."""


@dataclass(slots=True)
class _Note:
    """Reads of one attribute of one tensor.

    Attributes:
        tensor: what it was read of.
        value: what was read.
        print: its fingerprint.
        module: the submodule that read it first.
        is_steady: all reads were alike.
    """

    tensor: torch.Tensor
    value: Any
    print: Fingerprint
    module: str
    is_steady: bool = True


class TensorReads:
    """Notes, while `recording`, what code reads of tensors.

    Args:
        where: the submodule that is running.
        is_made: the forward has made this tensor.
        originals: by identity of a tensor that takes the place of one of the call's, that one.

    Attributes:
        paused: nothing is noted.
        seen_by_line: what tensors showed, by the line of code that read it and the attribute.
    """

    def __init__(
        self, where: Callable[[], str], is_made: Callable[[torch.Tensor], bool], originals: Mapping[int, torch.Tensor]
    ) -> None:
        self.originals, self.paused = originals, False
        self.seen_by_line: dict[tuple[types.CodeType, int, str], list[Fingerprint]] = {}
        self._where, self._is_made = where, is_made
        self._of_stand_ins: dict[tuple[types.CodeType, int, str], tuple[list[Fingerprint], str]] = {}
        self._notes: dict[tuple[int, str], _Note] = {}
        self._mode = ""
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While entered, reads are noted; attributes that are set on tensors from before the forward are refused."""
        with patched(self._read, self._write):
            yield

    @contextlib.contextmanager
    def inside_opaque(self) -> Iterator[None]:
        """While entered, an opaque module runs on the tensors that eager gives it."""
        with self._in_mode("opaque"):
            yield

    @contextlib.contextmanager
    def of_stand_ins(self) -> Iterator[None]:
        """While entered, an opaque module runs on tensors that take the place of those, as it does in a planned step."""
        with self._in_mode("stand-ins"):
            yield

    @contextlib.contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        before = self.paused, self._mode
        self.paused, self._mode = False, mode
        try:
            yield
        finally:
            self.paused, self._mode = before

    @calls_users_code
    def _read(self, this: torch.Tensor, name: str, frame: types.FrameType) -> Any:
        if self.paused or threading.get_ident() != self._thread or not _counts(name, frame):
            return get_attribute(this, name)
        self.paused = True
        try:
            source = self.originals.get(id(this), this)
            found = shown(source, name)
            if self._mode == "stand-ins":
                seen, _ = self._of_stand_ins.setdefault((frame.f_code, frame.f_lineno, name), ([], self._where()))
            else:
                seen = self.seen_by_line.setdefault((frame.f_code, frame.f_lineno, name), [])
                if not self._is_made(source):
                    self._note(source, name, found)
            if not _is_among(found, seen):
                seen.append(found)
        finally:
            self.paused = False
        return get_attribute(source, name)

    def _note(self, tensor: torch.Tensor, name: str, found: Fingerprint) -> None:
        known = self._notes.get((id(tensor), name))
        if known is not None:
            known.is_steady &= alike(known.print, found)
            return
        value = getattr(tensor, name, ABSENT)
        self._notes[id(tensor), name] = _Note(tensor, value() if name in METHODS else value, found, self._where())

    @calls_users_code
    def _write(self, this: torch.Tensor, name: str, frame: types.FrameType) -> None:
        if self.paused or threading.get_ident() != self._thread or not _counts(name, frame):
            return
        if self._is_made(this) or (this.grad_fn is not None and id(this) not in self.originals):
            return
        what = "the gradient (.grad)" if name in ("grad", "_grad") else f"the attribute {name}"
        raise CaptureError(
            f"the forward of {self._where() or 'the model'} sets {what} of a tensor that it has not made, which a plan would "
            "not do: set it outside of the forward, or keep the value on the module",
            module=self._where(),
        )

    def found(self, places: Mapping[int, TensorPlace], outside: Collection[int]) -> tuple[TensorRead, ...]:
        """What was read of weights, the call's tensors and those in Python state.

        Args:
            places: of these, by identity.
            outside: identities of the tensors that kernels read and the forward has not made.

        Raises:
            CaptureError: what was read changes during the forward, is itself a tensor that kernels read, or cannot be compared
                at later calls.
        """
        for line, (seen, module) in self._of_stand_ins.items():
            if not all(_is_among(one, self.seen_by_line.get(line, ())) for one in seen):
                raise _unlike(line[2], module, "while the submodule runs as it is inside of a plan")
        reads = []
        for (key, name), note in self._notes.items():
            place = places.get(key)
            if place is None and name in _COMPARED_WITH_TRACE and (note.tensor.grad_fn is not None or note.tensor._is_view()):
                continue  # a view that the forward has made
            who = f"the forward of {note.module or 'the model'} reads {name} of {'a tensor' if place is None else place}"
            if not note.is_steady or not alike(note.print, shown(note.tensor, name)):
                text = f"{who}, which changes during the forward: a plan would repeat one value"
            elif any(id(tensor) in outside for tensor in _tensors_in(note.value)):
                text = (
                    f"{who}, a tensor that its kernels use, and a plan would use the same one for ever: pass it as an "
                    "argument, or make it a buffer"
                )
            elif place is None and note.value is not ABSENT:
                text = (
                    f"{who} that is neither a weight, an argument nor found in the model's attributes, which a plan cannot "
                    "compare at later calls: make it a buffer, or pass it as an argument"
                )
            else:
                if place is not None:
                    reads.append(TensorRead(place, name, note.print, note.module, _without_memory(note.value)))
                continue
            raise CaptureError(text, module=note.module)
        return tuple(reads)


def _without_memory(value: Any) -> Any:
    """A gradient's form instead of its data, which no kernel uses: a plan outlives the step that it was made in."""
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def refuse_marked(outputs: Sequence[Any], is_made: Callable[[torch.Tensor], bool]) -> None:
    """Raise CaptureError where a tensor that the forward made and returns has attributes, or keeps its gradient.

    Those of a plan have none, and keep none.
    """
    refuse_retained(("", leaf) for leaf in outputs)
    for i, leaf in enumerate(outputs):
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):  # a fake one has attributes of torch's own
            continue
        if (is_made(leaf) or leaf.grad_fn is not None) and vars(leaf):
            raise CaptureError(
                f"the model's forward sets the attribute {next(iter(vars(leaf)))} of its output {i}, which a plan would not "
                "do: return the value beside the tensor"
            )


def refuse_retained(values: Iterable[tuple[str, Any]]) -> None:
    """Raise CaptureError where a tensor that outlives the forward keeps its gradient, however it was asked to (`map`).

    Args:
        values: what the forward returns or leaves, each with the submodule where it is.
    """
    for module, value in values:
        if isinstance(value, torch.Tensor) and value.grad_fn is not None and value.retains_grad:
            raise CaptureError(LeftOut.RETAINED_GRADIENT.value.format(module or "the model"), module=module)


def _is_among(found: Fingerprint, seen: Sequence[Fingerprint]) -> bool:
    return any(alike(one, found) for one in seen)


def _unlike(name: str, module: str, when: str) -> CaptureError:
    return CaptureError(
        f"the forward of {module or 'the model'} reads {name} of a tensor, which is another one {when}: a plan cannot follow "
        "that",
        module=module,
    )


@contextlib.contextmanager
def answered(
    reads: Sequence[TensorRead],
    tensor_of: Callable[[TensorPlace], torch.Tensor | None],
    seen_by_line: SeenByLine | None,
    where: Callable[[], str],
) -> Iterator[None]:
    """While entered, code that reads attributes of traced tensors gets what the real ones showed.

    Args:
        tensor_of: the traced tensor at a place.
        seen_by_line: what tensors showed in the recorded forward; None where none was recorded.

    Raises:
        CaptureError: a traced tensor shows something that no real one did.
    """
    answers = {(id(tensor_of(read.place)), read.name): read.value for read in reads}
    thread, busy = threading.get_ident(), False

    @calls_users_code
    def read(this: torch.Tensor, name: str, frame: types.FrameType) -> Any:
        nonlocal busy
        if busy or threading.get_ident() != thread or not _counts(name, frame):
            return get_attribute(this, name)
        busy = True
        try:
            if (id(this), name) in answers:
                return _answer(answers[id(this), name], name)
            line = (frame.f_code, frame.f_lineno, name)
            is_compared = name in _COMPARED_WITH_TRACE and not is_library_code(frame.f_code)
            if is_compared and seen_by_line is not None and not _is_among(shown(this, name), seen_by_line.get(line, ())):
                raise _unlike(name, where(), "while the forward is traced")
        finally:
            busy = False
        return get_attribute(this, name)

    with patched(read, lambda this, name, frame: None):
        yield


@calls_users_code
def _answer(value: Any, name: str) -> Any:
    if value is LOST:
        raise CaptureError(f"the forward reads {name} of a tensor, whose value was lost when the plan was pickled: plan again")
    if value is ABSENT:
        raise AttributeError(name)
    return (lambda: value) if name in METHODS else value


def _counts(name: str, frame: types.FrameType) -> bool:
    """A read in this frame is the model's: of its own code, or of a gradient by torch.nn's (clip_grad_norm_) or optimizers'."""
    code = frame.f_code
    if not is_library_code(code):
        return True
    return name == "grad" and code is not _APPLY and code.co_filename.startswith(_READ_GRADIENTS)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    todo, seen = [value], set[int]()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        else:
            todo += [inner for _, inner in members(item, lambda _, name: True)]
