"""Opaque parts in a trace: which submodules run as they are, and how their calls stand in the joint graph."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from planner._compat import pytree
from planner._compat.module_calls import calls_intercepted
from planner._compat.private_names import MODULE_HOOKS
from planner.errors import CaptureError, InputError
from planner.graph.source import Source
from planner.kernels import custom
from planner.tracer import fidelity
from planner.tracer.casts import MARK
from planner.tracer.fidelity import SOURCE
from planner.tracer.part import PartCall, TensorSpec
from planner.tracer.storage import items

_CALLS: ContextVar[Mapping[str, PartCall]] = ContextVar("calls of opaque parts")
_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definitions
_LIBRARY.define("part(Tensor[] tensors, str key) -> Tensor[]")
_LIBRARY.define("part_backward(Tensor?[] grads, Tensor ticket, Tensor[] read, str key) -> Tensor[]")


@torch.library.register_fake("checkpoint_planner::part", lib=_LIBRARY)
def _fake_part(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    spec, device = _CALLS.get()[key], tensors[0].device
    ticket = torch.empty(spec.ticket_bytes, dtype=torch.uint8, device=device)
    return [*(result.empty(device) for result in spec.results), ticket]


@torch.library.register_fake("checkpoint_planner::part_backward", lib=_LIBRARY)
def _fake_backward(grads: list[Any], ticket: torch.Tensor, read: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    return [spec.empty(ticket.device) for spec in _CALLS.get()[key].gradients if spec is not None]


_FORWARD = torch.ops.checkpoint_planner.part.default
_BACKWARD = torch.ops.checkpoint_planner.part_backward.default


def parts_from_start(model: nn.Module, named: Collection[str]) -> tuple[str, ...]:
    """Submodules that the user names, and those known not to be captured exactly.

    Raises:
        InputError: a name is no submodule's.
    """
    modules = dict(model.named_modules())
    for name in named:
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, 3)
            raise InputError(f"opaque={name!r} is no submodule of the model{f'; did you mean {close}?' if close else ''}")
    known = [name for name, module in modules.items() if name and _runs_as_it_is(module)]
    return outermost((*named, *known))


def _runs_as_it_is(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):  # traced, its fused kernel is taken apart, and the bits differ
        return True
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.sparse or module.max_norm is not None):
        return True
    hooks = [hook for kind in MODULE_HOOKS for hook in vars(module)[kind].values()]
    return any(map(fidelity.is_foreign, hooks))  # a trace would call them once and never again


def widened(model: nn.Module, parts: Sequence[str], failed: str) -> tuple[str, ...]:
    """More opaque parts, after a capture with `parts` failed in the submodule `failed`; () if nothing is left to try.

    A module's likes fail as well: all of its class are taken. What is opaque already is taken with what it stands in.
    """
    while failed in parts or isinstance(model.get_submodule(failed), (nn.ModuleList, nn.ModuleDict)):  # these are never called
        failed = failed.rpartition(".")[0]
    if not failed:
        return ()
    module = model.get_submodule(failed)
    alone = type(module).__module__.startswith("torch.nn.modules.container")
    likes = [name for name, other in model.named_modules() if type(other) is type(module) and name]
    more = outermost((*parts, *([failed] if alone else likes)))
    return more if set(more) != set(parts) else ()


def outermost(names: Collection[str]) -> tuple[str, ...]:
    """Those that stand in no other one, each once."""
    inside = {name for name in names for other in names if name.startswith(f"{other}.")}
    return tuple(dict.fromkeys(name for name in names if name not in inside))


@contextmanager
def known(calls: Mapping[str, PartCall]) -> Iterator[None]:
    """While entered, the fake kernels know what these calls take and return; the traced backward too."""
    token = _CALLS.set(calls)
    try:
        yield
    finally:
        _CALLS.reset(token)


@contextmanager
def tracing(model: nn.Module, calls: Mapping[str, PartCall]) -> Iterator[None]:
    """While entered, calls of the parts are traced as one kernel each."""
    counts: dict[str, int] = {}

    def trace(module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        counts[name] = counts.get(name, 0) + 1
        spec = calls.get(f"{name}#{counts[name] - 1}")
        if spec is None:
            raise CaptureError(f"{name} is called more often while traced than in a real run", module=name)
        return _traced(module, spec, args, kwargs)

    with calls_intercepted({model.get_submodule(spec.module): spec.module for spec in calls.values()}, trace):
        yield


def _traced(module: nn.Module, spec: PartCall, args: Any, kwargs: Any) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    arguments: list[Any] = [None] * len(spec.arguments)
    for position, place in zip(spec.call.tensors, spec.places, strict=True):
        arguments[place] = leaves[position]
    if [a.requires_grad for a in arguments] != [a.requires_grad for a in spec.arguments]:
        raise CaptureError(f"{spec.module} is given other arguments while traced than in a real run", module=spec.module)
    weights, buffers = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False))
    state = [*(weights[name] for name, _ in spec.weights), *(buffers[name] for name in spec.buffers)]
    results = iter(_TracedPart.apply(spec, *arguments, *state))
    out = [next(results) if isinstance(o, TensorSpec) else o[0] if isinstance(o, tuple) else arguments[o] for o in spec.outputs]
    return pytree.tree_unflatten(out, spec.call.out_spec)


class _TracedPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: PartCall, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *results, ticket = torch.ops.checkpoint_planner.part(list(tensors), spec.key)
        num_arguments = len(spec.arguments)
        weights = [tensors[num_arguments + i] for i, (_, trained) in enumerate(spec.weights) if trained]
        read = [tensors[i] for i in spec.reads[0]] + [results[i] for i in spec.reads[1]]
        ctx.spec, ctx.num_tensors = spec, len(tensors)
        ctx.save_for_backward(ticket, *read, *weights)  # the weights too: nobody may write into them before
        ctx.set_materialize_grads(False)
        fixed = [result for result, made in zip(results, spec.results, strict=True) if not made.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ticket, *read = ctx.saved_tensors
        found = torch.ops.checkpoint_planner.part_backward(list(grads), ticket, read, ctx.spec.key)
        handed: list[Any] = [None] * ctx.num_tensors
        for i, grad in zip(ctx.spec.taken, found, strict=True):
            handed[i] = grad
        return (None, *handed)


def part_of(node: fx.Node) -> PartCall | None:
    """The call that a node of the joint graph stands for."""
    return node.meta.get("part")


def is_traced_part(node: fx.Node) -> bool:
    """The node is a call of a part, as the trace has it."""
    return node.target is _FORWARD


def write_parts(graph: fx.Graph, calls: Mapping[str, PartCall]) -> frozenset[str]:
    """Turn traced calls of parts into their kernels; the names of the nodes that hold tickets.

    Raises:
        CaptureError: a part was traced as something that cannot run exactly.
    """
    tickets = set()
    found = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=_FORWARD)}
    for key, spec in calls.items():
        if key not in found:
            raise CaptureError(f"nothing is made of what {spec.module} returns, but it runs as it is", module=spec.module)
    for key, node in found.items():
        spec = calls[str(key)]
        node.target, node.args = custom.part, (key, node.args[0])
        _mark(node, spec)
        tickets |= {item.name for item in items(node) if item.args[1] == len(spec.results)}
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        grads, ticket, read, key = node.args
        spec = calls[str(key)]
        node.target, node.args = custom.part_backward, (key, grads, ticket, read, [None] * len(spec.taken))
        _mark(node, spec)
        node.args = (*node.args[:-1], _arrived(graph, node, spec))
    for node in found.values():
        _check_state(graph, node, calls[str(node.args[0])])
    return frozenset(tickets)


def _mark(node: fx.Node, spec: PartCall) -> None:
    node.meta["part"] = spec
    source = Source(spec.module, note="runs as it is")
    node.meta["custom"] = {**(node.meta.get("custom") or {}), SOURCE: source}


_SUMS = (torch.ops.aten.add.Tensor, custom.add_gradients)


def _arrived(graph: fx.Graph, node: fx.Node, spec: PartCall) -> list[Any]:
    """Per gradient, the sum that it is added to, which the kernel then starts from; that sum's node goes."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    arrived: list[Any] = [None] * len(spec.taken)
    for item in list(items(node)):
        position = int(item.args[1])  # type: ignore[arg-type]
        added = [user for user in item.users if user.target in _SUMS and user.args[1] is item]
        earlier = added[0].args[0] if len(added) == len(item.users) == 1 else None
        if isinstance(earlier, fx.Node) and earlier is not item and order[earlier] < order[node]:
            arrived[position] = earlier
            item.meta["val"] = added[0].meta["val"]  # the engine adds, and lays the sum out as that kernel does
            results = list(node.meta["val"])
            results[position] = item.meta["val"]
            node.meta["val"] = results
            added[0].replace_all_uses_with(item)
            graph.erase_node(added[0])
        if spec.taken[position] >= len(spec.arguments):
            for user in item.users:
                if user.target in _SUMS:
                    user.target = custom.add_gradients  # one of them may be None
    return arrived


def _check_state(graph: fx.Graph, node: fx.Node, spec: PartCall) -> None:
    """Raise CaptureError where a part's weights or buffers are used outside of it in a way that a plan cannot follow."""
    for i, given in enumerate(node.args[1][len(spec.arguments) :]):  # type: ignore[index,arg-type]
        assert isinstance(given, fx.Node)
        name = (*(w for w, _ in spec.weights), *spec.buffers)[i]
        others = [user for user in given.users if part_of(user) is None or part_of(user).module != spec.module]  # type: ignore[union-attr]
        if name in spec.mutates and others:
            raise CaptureError(
                f"{spec.module}.{name}, which the forward writes into, is read elsewhere too", module=spec.module
            )
        again = [user for user in given.users if user.target is custom.part and user is not node]
        cast = [user for user in given.users if MARK in (user.meta.get("custom") or {})]
        if spec.autocast[0] and i < len(spec.weights) and spec.weights[i][1] and (again or cast):
            raise CaptureError(
                f"{spec.module}.{name} is cast by autocast in several places, where eager shares the cast", module=spec.module
            )


def written_by_parts(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders that parts write into."""
    for node in graph.find_nodes(op="call_function", target=custom.part):
        spec: PartCall = node.meta["part"]
        names = (*(w for w, _ in spec.weights), *spec.buffers)
        given = node.args[1][len(spec.arguments) :]  # type: ignore[index]
        yield from (tensor for name, tensor in zip(names, given, strict=True) if name in spec.mutates)  # type: ignore[misc,arg-type]
