"""Autocast casts a weight once, however often it is used; a trace casts it at every use. It shows in the bits:
eager sums the uses' gradients in the low precision and casts the sum.

The trace marks autocast's casts (`Casts`), and `merge_casts` turns the joint graph into what eager does.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from planner._compat.fx_graphs import results
from planner.errors import CaptureError

aten = torch.ops.aten
_TO_COPY, _ADD = aten._to_copy.default, aten.add.Tensor
_LOW = (torch.bfloat16, torch.float16)
_CONVERSIONS = frozenset(
    {torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.float}
)
MARK = "planner_cast"


class Casts(TorchFunctionMode):
    """Tells autocast's casts from the user's, while the model is traced; which share a cached result is told by `mark`.

    Args:
        are_cached: autocast's cache is enabled where the model is called. Tracing itself disables it.
    """

    def __init__(self, are_cached: bool) -> None:
        super().__init__()
        self._are_cached = are_cached
        self._converting = 0
        self._num_clears = 0
        self._without_grad: set[tuple[int, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CONVERSIONS:
            return func(*args, **(kwargs or {}))
        self._converting += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._converting -= 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """While entered, autocast's cache is followed: when it forgets its casts, and where the model switches it off."""
        names = ("clear_autocast_cache", "is_autocast_cache_enabled", "set_autocast_cache_enabled")
        clear, enabled, enable = (getattr(torch, name) for name in names)

        def counted() -> None:
            self._num_clears += 1
            clear()

        def followed(now: bool) -> None:
            self._are_cached = now

        for name, function in zip(names, (counted, lambda: self._are_cached, followed), strict=True):
            setattr(torch, name, function)
        try:
            with self:
                yield
        finally:
            for name, function in zip(names, (clear, enabled, enable), strict=True):
                setattr(torch, name, function)

    def mark(self, func: Any, args: Any, kwargs: Any) -> dict[str, int]:
        """Metadata for a kernel's node: for a cast by autocast, the number of the context in which eager would cache it.

        Raises:
            CaptureError: a weight is first cast without gradient: eager would then lose its gradient.
        """
        if func is not _TO_COPY or self._converting or (kwargs or {}).get("dtype") not in _LOW:
            return {}
        if args[0].dtype is not torch.float32 or not self._are_cached:
            return {}
        key = (id(args[0]), self._num_clears)
        if not torch.is_grad_enabled():
            self._without_grad.add(key)
        elif key in self._without_grad and args[0].requires_grad:
            raise CaptureError(
                "a weight is used under autocast first without gradient (torch.no_grad), then with it, in one context: eager "
                "reuses the first cast and loses the gradient. Use autocast(..., cache_enabled=False), or two contexts"
            )
        return {MARK: self._num_clears}


def is_cast(weight: fx.Node) -> bool:
    """A weight of a joint graph is cast to a narrow dtype: by itself, or in an opaque part that runs under autocast."""
    return any(
        (user.target is _TO_COPY and user.kwargs.get("dtype") in _LOW)
        or ("part" in user.meta and user.meta["part"].autocast[0])
        for user in weight.users
    )


def merge_casts(graph: fx.Graph, gradients: Mapping[fx.Node, int]) -> None:
    """Give every leaf that autocast casts several times one cast, and its gradient one cast back.

    Args:
        graph: the joint graph; changed.
        gradients: placeholder -> position of its gradient among the graph's results.

    Raises:
        CaptureError: the gradient's sum cannot be told to be the one that eager computes.
    """
    for leaf, position in gradients.items():
        groups: dict[Any, list[fx.Node]] = {}
        for user in leaf.users:
            mark = (user.meta.get("custom") or {}).get(MARK)
            if user.target is _TO_COPY and mark is not None:
                groups.setdefault((mark, user.kwargs.get("dtype")), []).append(user)
        for casts in groups.values():
            if len(casts) > 1:
                _merge(graph, leaf, casts, position)


def _merge(graph: fx.Graph, leaf: fx.Node, casts: Sequence[fx.Node], position: int) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(casts, key=order.__getitem__)
    uses = {cast.meta.get("seq_nr") for cast in casts}
    root = results(graph)[position]
    terms = _terms(root)
    back = [
        term for term in terms if term.target is _TO_COPY and term.meta.get("seq_nr") in uses and order[term] > order[first]
    ]
    others = [term for term in terms if term not in back]
    for cast in casts:
        if cast is not first:
            cast.replace_all_uses_with(first)
            graph.erase_node(cast)
    if len(back) < 2:
        return
    if len(others) > 1:
        raise CaptureError(
            f"{leaf.name} is used several times under autocast and several times without; the order in which eager sums its "
            "gradients cannot be told from the trace. Use autocast(..., cache_enabled=False)"
        )
    total = back[0].all_input_nodes[0]
    for before, term in itertools.pairwise(back):
        with graph.inserting_after(max(before, term, key=order.__getitem__)):
            total = _called(graph, _ADD, (total, term.all_input_nodes[0]), {}, term)
        order[total] = max(order[before], order[term])
    last = max(back, key=order.__getitem__)
    with graph.inserting_after(total):
        total = _called(graph, _TO_COPY, (total,), dict(last.kwargs), last)
    if others:
        later = others[0] if order[others[0]] > order[last] else total
        with graph.inserting_after(later):
            total = _called(graph, _ADD, (total, others[0]), {}, last)
    handed = list(results(graph))
    handed[position] = total
    graph.output_node().args = (tuple(handed),)


def _called(graph: fx.Graph, target: Any, args: tuple[fx.Node, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    vals = [arg.meta["val"] for arg in args]
    with vals[0].fake_mode:
        node.meta["val"] = target(*vals, **kwargs)
    return node


def _terms(root: fx.Node | None) -> list[fx.Node]:
    """What a gradient is the sum of, in the order of summation."""
    if root is None:
        return []
    if root.target is _ADD and not root.kwargs and len(root.users) == 1 and all(isinstance(a, fx.Node) for a in root.args):
        left, right = root.args
        return [*_terms(left), *_terms(right)]  # type: ignore[arg-type]
    return [root]
