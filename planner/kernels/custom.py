"""Plain functions that captured graphs call where ATen has no kernel that says it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from planner.errors import PlannerError


def rng_state(device: torch.device) -> torch.Tensor:
    """State of the device's default generator; uint8, kept in host memory."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def swap_rng_state(state: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Set the device's default generator to `state` and return the state it had."""
    previous = rng_state(device)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
    return previous


@contextlib.contextmanager
def rng_put_back_on_error(device: torch.device) -> Iterator[None]:
    """An exception inside leaves the generator as it was before: a recompute may have stopped under an earlier state."""
    # as bytes, because a tensor would be memory of the step that no plan counts
    state = rng_state(device).numpy().tobytes()
    try:
        yield
    except BaseException:
        swap_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), device)
        raise


def bernoulli(p: float, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0/1 draws, drawn as eager's `empty_like(x).bernoulli_(p)` draws them for an x of this layout."""
    return torch.empty_strided(size, stride, dtype=dtype, device=device).bernoulli_(p)


def noise(draws: torch.Tensor, keep: float, dtype: torch.dtype) -> torch.Tensor:
    """Dropout's factor for 0/1 draws with probability `keep` of 1: 0 or 1/keep, rounded as eager's `div_` rounds it."""
    return draws.to(dtype).div_(keep)


def laid_out(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A copy with the given strides: what the engine makes of a gradient it cannot take over as it is.

    A dimension with stride 0 stays expanded.
    """
    expanded = [n > 1 and step == 0 for n, step in zip(size, stride, strict=True)]
    if not any(expanded):
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    once = tensor[tuple(slice(0, 1) if is_expanded else slice(None) for is_expanded in expanded)]
    copy = torch.empty_strided(once.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(once)
    return copy.expand(size)


def add_gradients(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum, as the engine adds them: nothing counts as zero."""
    if one is None or other is None:
        return one if other is None else other
    return torch.add(one, other)


def opaque_forward(key: str, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """A call of an opaque module: results, then its saved handle. Run by planner.tracer.opaque.module.OpaqueModule.forward."""
    raise PlannerError(f"the opaque module call {key} runs in a CheckpointedModule only, which knows its submodule")


def opaque_backward(
    key: str, grads: Sequence[Any], handle: Any, read: Sequence[torch.Tensor], partial_sums: Sequence[Any]
) -> list[torch.Tensor | None]:
    """The backward of an opaque module: gradients. Run by planner.tracer.opaque.module.OpaqueModule.backward."""
    raise PlannerError(f"the opaque module call {key} runs in a CheckpointedModule only, which knows its submodule")


STORED_NAMES = {opaque_forward: "planner.part", opaque_backward: "planner.part_backward"}
"""Names in plan files where they are not those of the functions: they are compared when a plan is applied, and must stay."""
