"""Which output of a model backward starts from, and how its outputs are named to users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from planner._compat import pytree
from planner.errors import InputError
from planner.tracer.faults import calls_users_code, concerns_model
from planner.units import kind, shown

Loss = str | int | Callable[[Any], torch.Tensor | Sequence[torch.Tensor]] | None
"""The output that backward starts from: its name, its position, a function of the output; None: see `loss_leaves`."""

_MOST_LISTED = 8
"""Outputs that a message lists."""


def flatten_output(out: Any) -> tuple[list[Any], list[str], Any]:
    """An output's leaves, how a user reaches each ("loss", "[0]", ...), and its structure.

    Containers may be registered with pytree with or without key functions (diffusers' outputs have none).
    """
    leaves, spec = pytree.tree_flatten(out)
    return leaves, [reached.name for reached in _reached(out, leaves)], spec


@dataclass(frozen=True, slots=True)
class _Reached:
    """How a user reaches a leaf of an output.

    Attributes:
        name: "loss" for a key or attribute, "aux.loss" or "['aux']['loss']" for longer paths, "[0]" for a position.
        argument: what to pass as `loss` for it: its position in a tuple, else its name.
    """

    name: str
    argument: int | str


def _reached(out: Any, leaves: Sequence[Any]) -> list[_Reached]:
    try:
        paths, _ = pytree.tree_flatten_with_path(out)
    except (ValueError, TypeError, NotImplementedError):  # a container without key functions
        return [_member_or_position(leaf, i, out) for i, leaf in enumerate(leaves)]
    return [_at_path(path, i) for i, (path, _) in enumerate(paths)]


def _member_or_position(leaf: Any, position: int, out: Any) -> _Reached:
    """The attribute or key of the output that holds a leaf, else its position."""
    members = out if isinstance(out, Mapping) else getattr(out, "__dict__", {})
    name = next((str(name) for name, member in members.items() if member is leaf and leaf is not None), None)
    return _Reached(f"[{position}]", position) if name is None else _Reached(name, name)


def _at_path(path: Any, position: int) -> _Reached:
    """A leaf at a path of pytree's keys; `position` is its own among all leaves."""
    if not path:
        return _Reached("the output", position)
    if len(path) == 1 and isinstance(path[0], pytree.SequenceKey):
        return _Reached(f"[{path[0].idx}]", path[0].idx)
    if len(path) == 1 and isinstance(path[0], pytree.MappingKey) and type(path[0].key) is str:
        return _Reached(path[0].key, path[0].key)
    name = str(pytree.keystr(path)).removeprefix(".")
    return _Reached(name, name)


def loss_leaves(out: Any, leaves: Sequence[Any], loss: Loss) -> list[torch.Tensor]:
    """The output leaves that backward starts from.

    Args:
        out: what the model returned.
        leaves: its pytree leaves.
        loss: a name, a position or a function of the output. None: the output if it is one tensor; its `.loss` or ["loss"];
            the only scalar that requires grad, if it depends on every parameter that an output depends on (the KL term beside
            a reconstruction does not, nor a logit scale beside features); else every output that requires grad.

    Raises:
        InputError: there is no such output, or it does not require grad; lists what there is.
    """
    chosen = _default(out, leaves) if loss is None else _chosen(out, leaves, loss)
    for leaf in chosen:
        if not isinstance(leaf, torch.Tensor) or not any(leaf is other for other in leaves):
            named = f"loss={_text(loss)} does not name a tensor of the model's output"
            if isinstance(leaf, torch.Tensor):
                cure = "loss= chooses among the outputs; what computes a loss of them is criterion=..."
                raise InputError(f"{named} (found a tensor that is not among its outputs): {cure}. {_listed(out)}")
            raise InputError(f"{named} (found {kind(leaf)}). {_listed(out)}")
        if not leaf.requires_grad:
            which = "its loss" if loss is None else f"the output named by loss={_text(loss)}"
            raise InputError(f"{which} does not require grad: nothing to differentiate. {_listed(out)}")
    if not chosen:
        raise InputError(f"no output of the model requires grad: nothing to differentiate. {_listed(out)}")
    return chosen


def _default(out: Any, leaves: Sequence[Any]) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out] if out.requires_grad else []
    named = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(named, torch.Tensor):
        return [named]
    candidates = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    scalars = list({id(leaf): leaf for leaf in candidates if leaf.dim() == 0}.values())
    is_loss = len(scalars) == 1 and _leaves_behind(scalars) >= _leaves_behind(candidates)
    return scalars if is_loss else candidates


def _leaves_behind(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """The ends of the autograd graph of these outputs: one per parameter and input."""
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen, found = set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            found.add(node)
        todo += [following for following, _ in node.next_functions]
    return found


@calls_users_code
def _chosen(out: Any, leaves: Sequence[Any], loss: Any) -> list[Any]:
    if isinstance(loss, str):
        return [_member(out, leaves, loss)]
    if isinstance(loss, Integral):
        return [_at(out, leaves, int(loss))]
    try:
        picked = loss(out)
        return [picked] if isinstance(picked, torch.Tensor) else list(picked)
    except InputError:
        raise
    except Exception as error:
        if not concerns_model(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"loss={_text(loss)} cannot be applied to the model's output ({type(error).__name__}: {reason}); it takes the "
            f"output and returns a tensor of it, or several. {_listed(out)}"
        ) from error


def _member(out: Any, leaves: Sequence[Any], name: str) -> Any:
    """The output of this name: a key, an attribute, or as messages write it ("[0]")."""
    if isinstance(out, Mapping) and name in out:
        return out[name]
    if not isinstance(out, (torch.Tensor, Mapping)) and isinstance(getattr(out, name, None), torch.Tensor):
        return getattr(out, name)
    _, names, _ = flatten_output(out)
    if name in names:
        return leaves[names.index(name)]
    raise InputError(f"the model's output has no {shown(name)}. {_listed(out)}")


def _at(out: Any, leaves: Sequence[Any], position: int) -> Any:
    """The output at a position: of the tuple that the model returns, else among all leaves."""
    if isinstance(out, (tuple, list)) and -len(out) <= position < len(out) and isinstance(out[position], torch.Tensor):
        return out[position]
    if not -len(leaves) <= position < len(leaves):
        raise InputError(f"the model's output has no position {position}. {_listed(out)}")
    return leaves[position]


def _text(loss: Any) -> str:
    return getattr(loss, "__name__", "") or shown(loss)


def _listed(out: Any) -> str:
    """The tensors of an output, and what to pass for one of them."""
    leaves = pytree.tree_leaves(out)
    reached = zip(_reached(out, leaves), leaves, strict=True)
    rows = [(place.argument, leaf) for place, leaf in reached if isinstance(leaf, torch.Tensor)]
    if not rows:
        return f"It returns {kind(out)} without a tensor"
    lines = [_row(argument, leaf) for argument, leaf in rows[:_MOST_LISTED]]
    more = f"; {len(rows) - _MOST_LISTED} more" if len(rows) > _MOST_LISTED else ""
    trained = [(argument, leaf) for argument, leaf in rows if leaf.requires_grad]
    scalars = [argument for argument, leaf in trained if leaf.dim() == 0]
    able = scalars[0] if scalars else trained[0][0] if trained else None
    cure = "" if able is None else f". Pass the one that backward starts from (at the shell, --loss {able})"
    return f"Its outputs: {'; '.join(lines)}{more}{cure}"


def _row(argument: int | str, leaf: torch.Tensor) -> str:
    able = "requires grad" if leaf.requires_grad else "does not require grad"
    return f"loss={shown(argument)}: {str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}, {able}"
