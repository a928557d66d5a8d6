"""Kernels that communicate with other processes, while a model is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planner._compat import pytree
from planner._compat.dispatch import TorchDispatchMode
from planner._compat.fake_tensors import InPlaceCollectiveError, fake_mode
from planner.errors import InputError
from planner.kernels.facts import COLLECTIVE_NAMESPACES


class Refusing(TorchDispatchMode):
    """In a real forward, run to learn what a trace cannot know: refuses collectives that no plan can hold.

    Those are the ones that write in place; and all of them where submodules run as they are, because these are run several
    times, and not equally often on every rank.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space = getattr(func, "namespace", "")
        if space == "c10d":
            raise InPlaceCollectiveError(str(func))
        if space in COLLECTIVE_NAMESPACES and self._parts:
            raise InputError(
                f"the model communicates ({func}) and has submodules that run as they are ({', '.join(self._parts)}), which no "
                "plan of it can hold: plan submodules that do not communicate"
            )
        if space in COLLECTIVE_NAMESPACES:
            return alone(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def alone(func: Any, args: Any, kwargs: Any) -> Any:
    """What a collective returns as far as shapes go, without the other ranks: nobody waits for a rank that captures a model."""
    mode = fake_mode()
    fakes = pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t.detach(), static_shapes=True), (args, kwargs))
    with mode:
        out = func(*fakes[0], **fakes[1])
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def real(fake: torch.Tensor) -> torch.Tensor:
        like = next((t for t in given if t.shape == fake.shape and t.dtype == fake.dtype), None)
        if like is not None:
            return like.detach().clone().requires_grad_(like.requires_grad and like.is_floating_point())
        return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)

    return pytree.tree_map_only(torch.Tensor, real, out)
