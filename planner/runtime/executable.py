"""Executable: the code of a planned step for one model, and where its inputs and outputs lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planner.runtime.backward_key import BackwardKey

Boxed = Callable[[list[Any]], tuple[Any, ...]]
"""Code that takes one list of inputs and empties it, so that each input is freed after its last use."""


@dataclass(frozen=True, slots=True)
class Executable:
    """The code of a planned step. It knows tensors by their position only; "results" are those of the forward graph.

    Attributes:
        forward: inputs -> results, then saved activations.
        stages: the backward in stages; see rewriter/stages.py.
        num_outputs: number of results.
        num_saved: number of saved activations.
        aliased: per result: it shares its storage with an input or an earlier result, and is returned detached.
        alone: per result: no input and no other result shares its storage. If it is a view, `result.data` is returned: autograd
            forbids in-place writes into views that a custom Function returns, and does not regard `.data` as one. Writes
            are detected by `version_checked`.
        differentiable: per result: eager's tensor requires grad.
        output_gradients: positions of the results whose gradients the backward takes, in its order.
        checked_inputs: positions of the inputs that the backward reads; writing into one before the backward is an error.
        unchecked_inputs: likewise, but the forward itself writes into them (running statistics).
        saved_inputs: the order in which the backward takes them: (is checked, position among the checked or unchecked ones).
        owners: per stage, positions of the inputs whose gradients it returns, in order.
        names: per result, its name in errors.
        swaps: per stage: it recomputes under an earlier state of the random generator.
        device: where the step runs.
        stage_gradients: per stage, positions of its gradients among the joint graph's; from `num_gradients` on further terms of
            these, see rewriter/sums.py.
        num_gradients: of the joint graph.
        inputs: names of the inputs in errors.
        call_inputs: positions of the checked inputs that belong to the call instead of the model.
        key: the gradients that the stages are right for.
        kept_on_ctx: positions of the saved activations that are kept on ctx instead of by `save_for_backward`: saved handles of
            opaque modules, which are not tensors, and the `exposed` ones.
        exposed: saved activations that are also results and that the backward reads only to recompute. Eager does not save
            them, so the caller may write into them.
        version_checked: (position of a result, position of the exposed saved activation in its storage) for each result whose
            storage the backward reads; the second is None where that storage is not exposed.
        spare: positions of inputs that the planned backward does not read but another backward may recompute from.
        views: positions of the results that are views in eager.
        recomputes: the backward runs kernels of the forward again.
        sharing: per storage that several differentiable results share, their positions.
        inner: positions of the differentiable results that others are computed from.
        cast: positions of the trained weights that autocast casts.
        summed: positions of the inputs whose gradient is a sum over several uses.
        separated: those of them whose terms the stages return one by one.
        unversioned: positions of the inputs that eager's kernels write into without a new version: batch norm's statistics.
    """

    forward: Boxed
    stages: tuple[Boxed, ...]
    num_outputs: int
    num_saved: int
    aliased: tuple[bool, ...]
    alone: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    output_gradients: tuple[int, ...]
    checked_inputs: tuple[int, ...]
    unchecked_inputs: tuple[int, ...]
    saved_inputs: tuple[tuple[bool, int], ...]
    owners: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    swaps: tuple[bool, ...]
    device: torch.device
    stage_gradients: tuple[tuple[int, ...], ...]
    num_gradients: int
    inputs: tuple[str, ...]
    call_inputs: tuple[int, ...]
    key: BackwardKey
    kept_on_ctx: tuple[int, ...] = ()
    exposed: frozenset[int] = frozenset()
    version_checked: tuple[tuple[int, int | None], ...] = ()
    spare: tuple[int, ...] = ()
    views: tuple[int, ...] = ()
    recomputes: bool = False
    sharing: tuple[tuple[int, ...], ...] = ()
    inner: tuple[int, ...] = ()
    cast: tuple[int, ...] = ()
    summed: frozenset[int] = frozenset()
    separated: frozenset[int] = frozenset()
    unversioned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OtherBackward:
    """The backward of the same forward for another key, in one stage.

    Attributes:
        run: what it reads of what the forward saved, then gradients of results -> gradients.
        takes: positions of the former among saved activations, then saved inputs, then spare inputs.
        output_gradients: positions of the results whose gradients it takes, in its order.
        gradients: per gradient of the joint graph, its position among those computed here; None where it is not computed.
        swaps: it recomputes under an earlier state of the random generator.
        peak_bytes: simulated peak of the step with this backward.
    """

    run: Boxed
    takes: tuple[int, ...]
    output_gradients: tuple[int, ...]
    gradients: tuple[int | None, ...]
    swaps: bool
    peak_bytes: int

    def position(self, i: int) -> int | None:
        """Position here of a stage's gradient; further terms of sums, which have none, come with the first."""
        return self.gradients[i] if i < len(self.gradients) else None
