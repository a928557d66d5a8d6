"""Weights that a module keeps in attributes besides its parameters, as torch's RNN modules keep the list they hand to cuDNN.

An opaque submodule runs on aliases of its weights (Parameters of the same memory). Those that it stores must not stay there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_INTERNAL = frozenset(vars(nn.Module()))


@contextmanager
def weights_restored(module: nn.Module, weights: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """At exit, attributes that hold aliases hold the weights instead; in the containers of before, where these held the same.

    Args:
        weights: the weight by the identity of its alias.
    """
    before = [(vars(inner), dict(vars(inner))) for inner in module.modules()]
    contents = {id(value): list(value) for _, held in before for value in held.values() if isinstance(value, list)}
    try:
        yield
    finally:
        for now, held in before:
            for name in [name for name in now if name not in _INTERNAL]:
                value = now[name]
                kept = _with_weights(value, weights)
                if kept is not value:
                    now[name] = _as_it_was(held.get(name), kept, contents)


def _with_weights(value: Any, weights: Mapping[int, torch.Tensor]) -> Any:
    """The value with weights instead of aliases; itself, if it holds none."""
    if isinstance(value, torch.Tensor):
        return weights.get(id(value), value)
    if isinstance(value, weakref.ref):
        weight = weights.get(id(value()))
        return value if weight is None else weakref.ref(weight)
    if type(value) in (list, tuple):
        items = [_with_weights(item, weights) for item in value]
        return value if all(map(_is, items, value)) else type(value)(items)
    if type(value) is dict:
        found = {key: _with_weights(item, weights) for key, item in value.items()}
        return value if all(map(_is, found.values(), value.values())) else found
    return value


def _as_it_was(old: Any, kept: Any, contents: Mapping[int, list[Any]]) -> Any:
    """The old container, with its old items, if it held just these; else the new one."""
    items = contents.get(id(old))
    if items is None or not isinstance(kept, list) or len(items) != len(kept) or not all(map(_is, items, kept)):
        return kept
    old[:] = items
    return old


def _is(one: Any, other: Any) -> bool:
    return one is other
