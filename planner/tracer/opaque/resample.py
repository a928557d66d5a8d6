"""Other data for the call of an opaque module, of the same kind as its own: which kernels run may depend on the data.

A bootstrap: rows are drawn with replacement, the same rows from each argument. Experts, for instance, are then chosen by other
numbers of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from planner.tracer.opaque.call import TensorSpec


def resampled(arguments: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """The arguments with rows drawn from their own; those that have other rows than the first one stay as they are.

    The rows of (batch, tokens, channels) are the tokens of all samples; of integers, like (batch, tokens), each is a row. The
    rows that are drawn keep their order. Integers are drawn only where they are categories: others may point to rows.

    Args:
        seed: for other rows; the generators of torch are not used.
    """
    number = _num_rows(arguments)
    if number < 2:
        return list(arguments)
    chosen = torch.randint(number, (number,), generator=torch.Generator().manual_seed(seed)).sort().values
    return [_with_rows(tensor, chosen) for tensor in arguments]


def _is_feature(tensor: torch.Tensor, number: int) -> bool:
    """Integers say something of their row alone: a few categories in columns. Others may point to rows, which change places."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return True
    return tensor.ndim > 1 and 4 * tensor.unique().numel() <= number


def _num_rows(arguments: Sequence[torch.Tensor]) -> int:
    """Rows of the first argument with channels; without such a one, elements of the first one that has several."""
    for tensor in arguments:
        if tensor.is_floating_point() and tensor.ndim > 1:
            return math.prod(tensor.shape[:-1])
    return next((tensor.numel() for tensor in arguments if tensor.ndim), 0)


def _with_rows(tensor: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    number = len(chosen)
    leading = next((k for k in range(1, tensor.ndim + 1) if math.prod(tensor.shape[:k]) == number), 0)
    if not leading or 0 in tensor.stride() or not tensor.numel() or not _is_feature(tensor, number):
        return tensor
    rows = tensor.reshape(number, *tensor.shape[leading:])[chosen.to(tensor.device)]
    return TensorSpec.of(tensor).empty(tensor.device).copy_(rows.reshape(tensor.shape))
