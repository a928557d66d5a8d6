"""What the traced function returns: outputs of the model, and tensors that its forward leaves in Python state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from planner._compat.dispatch import is_traced
from planner.errors import CaptureError
from planner.tracer.host.arguments import WrittenArguments
from planner.tracer.host.path import Path
from planner.tracer.host.scopes import ARGUMENTS
from planner.tracer.host.state import Effect, HostState, Ref, same_build
from planner.tracer.host.values import ABSENT, hidden_in
from planner.tracer.host.written_values import Built, rebuilt
from planner.tracer.joint import Output
from planner.tracer.libraries import is_cache
from planner.tracer.replay import Replay, Strides, usual_strides, with_strides


class OutputIdentity(torch.autograd.Function):
    """Identity that makes an output a tensor of its own, which gets a gradient, and hooks, of its own.

    It is no view: a write into it (`x = block(x); x += 1`) would pass a view's hooks by.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, strides: Strides | None) -> torch.Tensor:
        """The tensor; `strides`: of its gradient, None where they are its own."""
        ctx.strides = strides
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, with these strides."""
        return with_strides(grad, ctx.strides), None


class Results:
    """Collects the tensors that the traced function returns, each once. Backward starts from some; the others are detached."""

    def __init__(self, replay: Replay | None, given: Iterable[torch.Tensor]) -> None:
        """`replay` says which results get a gradient, if the call was captured before; `given`: what the function takes."""
        self._replay, self._given = replay, frozenset(map(id, given))
        self._tensors: dict[int, torch.Tensor] = {}
        self._edges: list[tuple[Any, int]] = []
        self._leaves: dict[int, torch.Tensor] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What was added, in order."""
        return list(self._tensors.values())

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._tensors

    def position(self, tensor: torch.Tensor) -> int:
        """Of a tensor that was added."""
        return list(self._tensors).index(id(tensor))

    def add(
        self, tensor: torch.Tensor, name: str, is_start: bool, strides: Strides | None = None, *, is_returned: bool = False
    ) -> Output:
        """Add a tensor, unless it was added before.

        Args:
            name: for messages.
            is_start: backward starts from it; not used with a replay.
            strides: of its gradient then; None: its own.
            is_returned: by the model's forward; else it is left in Python state.

        Raises:
            CaptureError: the forward made it without history, and left it.
        """
        is_leaf = tensor.is_leaf and tensor.requires_grad and id(tensor) not in self._given
        if is_leaf and not is_returned:
            raise leaf_left(f"as {name}")
        position = self.position(tensor) if tensor in self else len(self._tensors)
        differentiated = is_start and not is_leaf  # a backward from that one reaches nothing of the model
        if self._replay is not None:
            strides = self._replay.strides[position]
            differentiated = strides is not None
        if position == len(self._tensors):
            self._edges.append((tensor.grad_fn, tensor.output_nr))
            self._leaves |= {position: tensor} if is_leaf else {}
            self._tensors[id(tensor)] = OutputIdentity.apply(tensor, strides) if differentiated else tensor.detach()
        return Output(name, position, differentiated, tensor.requires_grad, is_leaf=is_leaf)

    def marked(self, outputs: Sequence[Output]) -> tuple[Output, ...]:
        """These, of which some are `is_inner`.

        Raises:
            CaptureError: another result is computed from one without history: autograd would fill its `.grad`, a plan does not.
        """
        inside, todo = set[Any](), [node for node, _ in self._edges if node is not None]
        seen = set(todo)
        while todo:
            following = {edge for edge in todo.pop().next_functions if edge[0] is not None}
            inside |= following
            todo += {node for node, _ in following} - seen
            seen |= {node for node, _ in following}
        used = {id(getattr(node, "variable", None)) for node in seen}
        for out in outputs:
            if out.result in self._leaves and id(self._leaves[out.result]) in used:
                raise leaf_left(f"as {out.name}")
        is_inner = [edge in inside for edge in self._edges]
        return tuple(out if out.result is None else replace(out, is_inner=is_inner[out.result]) for out in outputs)


def leaf_left(where: str, module: str = "") -> CaptureError:
    """That a forward makes a tensor without history that requires grad, and leaves it where its user finds it."""
    return CaptureError(
        f"the forward of {module or 'the model'} makes a tensor that requires grad and has no history "
        f"(detach().requires_grad_(), torch.zeros(..., requires_grad=True)), and leaves it {where}: autograd fills its .grad, "
        "which a plan does not do. Detach what is left, or make it outside of the model and hand it in",
        module=module,
    )


def add_outputs(
    results: Results,
    leaves: Sequence[Any],
    names: Sequence[str],
    starts: Mapping[int, Strides | None],
    inputs: Sequence[torch.Tensor],
) -> tuple[Output, ...]:
    """One Output per leaf of the model's output: a result, an input that is returned unchanged, or a constant.

    Args:
        results: filled.
        names: of the leaves, for messages.
        starts: the leaves that backward starts from, by identity: strides of their gradients, None where they are their own.
        inputs: the traced function's inputs.
    """
    outputs = []
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            left_out = is_cache(leaf)
            outputs.append(Output(name, None, constant=None if left_out else leaf, left_out=left_out))
        elif any(leaf is tensor for tensor in inputs):
            outputs.append(Output(name, None, input=next(i for i, tensor in enumerate(inputs) if leaf is tensor)))
        else:
            outputs.append(results.add(leaf, name, id(leaf) in starts, starts.get(id(leaf)), is_returned=True))
    return tuple(outputs)


def add_left(
    results: Results,
    model: nn.Module,
    host: HostState,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    reassigned: Mapping[str, torch.Tensor],
    written: Sequence[Effect],
    arguments: WrittenArguments,
    held: Built,
) -> tuple[tuple[Output, ...], tuple[Effect, ...]]:
    """What the traced forward left in Python state: (one Output per tensor, how a planned call writes them there).

    Args:
        results: filled.
        host: as recorded; its effects say where to look.
        inputs: the traced function's inputs.
        weights: the model's parameters and buffers by name.
        reassigned: tensors that the forward assigned to buffers, by the buffer's name.
        written: what it wrote into its arguments.
        arguments: knows the call's own containers.
        held: those of Python state.

    Raises:
        CaptureError: a place has another structure than after a real forward.
    """
    left: list[Output] = []
    sources = {id(tensor): Ref("input", i) for i, tensor in enumerate(inputs)}
    sources |= {id(tensor): Ref("weight", name) for name, tensor in weights.items()}

    def ref(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or type(leaf) in (torch.Tensor, nn.Parameter):
            _check_holds_none(leaf, path)
            return leaf
        if id(leaf) not in sources:
            is_returned = leaf in results
            # the loop may add it to its loss; if it does not, that backward is captured when it first runs
            found = results.add(leaf, str(path), leaf.requires_grad, usual_strides(leaf))
            left.extend([] if is_returned else [found])
            sources[id(leaf)] = Ref("result", results.position(leaf))
        return sources[id(leaf)]

    effects, built = [], dict(held)
    of_arguments = list(written)
    for effect in (effect for effect in host.effects if not _is_buffer(effect.path, weights)):
        if effect.path.scope is ARGUMENTS:
            live = of_arguments.pop(0).template if of_arguments and of_arguments[0].path == effect.path else ABSENT
        else:
            live = effect.live(model)
        marked = arguments.marked(live)
        template = rebuilt(marked, partial(ref, effect.path), built)
        if not same_build(rebuilt(marked, partial(ref, effect.path)), effect.template):
            raise CaptureError(
                f"{effect.path} has another structure after the traced forward than after a real one", module=effect.path.module
            )
        effects.append(replace(effect, template=template))
    if of_arguments:
        raise CaptureError(f"the traced forward writes into {of_arguments[0].path}, which a real one does not")
    for name, new in reassigned.items():
        module, _, attribute = name.rpartition(".")
        path = Path(module, attribute)
        effects.append(Effect(path, ref(path, new)))
    return tuple(left), tuple(effects)


def _check_holds_none(value: Any, path: Path) -> None:
    """Raise CaptureError where what is left at a place, and is not built again, holds tensors of the trace."""
    if any(is_traced(one) or isinstance(one, Node) for one in hidden_in(value)):
        raise CaptureError(
            f"the model's forward leaves in {path} a {type(value).__name__} that holds tensors which it computed, and a plan "
            "cannot make one. Leave the tensors, in lists, dictionaries or plain objects",
            module=path.module,
        )


def _is_buffer(path: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    return not path.steps and path.scope is None and f"{path.module}.{path.name}".lstrip(".") in weights


def reassigned_buffers(given: Mapping[str, torch.Tensor], left: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `self.buffer = new` in the model's forward has put in place of buffers.

    Args:
        given: parameters and buffers before the forward.
        left: what functional_call left in its dictionary: what the module held at the end.

    Raises:
        CaptureError: a parameter was replaced, or a buffer by a tensor of another shape or dtype.
    """
    found = {name: left[name] for name, tensor in given.items() if left[name] is not tensor}
    for name, new in found.items():
        tensor = given[name]
        if isinstance(tensor, nn.Parameter) or new.shape != tensor.shape or new.dtype != tensor.dtype:
            raise CaptureError(f"the model's forward replaces {name} by another tensor; only in-place updates can be planned")
    return found
