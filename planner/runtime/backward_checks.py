"""Refusals of a planned backward: BackwardErrors that say what to do instead. Most come before it changes anything."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner._compat.switches import kernel_switches
from planner.errors import BackwardError
from planner.runtime.executable import Executable, OtherBackward


def check_modes(device: torch.device) -> None:
    """Refuse what no planned backward can do.

    Raises:
        BackwardError: second derivatives, or autocast; says what to do instead.
    """
    if torch.is_grad_enabled():
        raise BackwardError(
            "backward was called with create_graph=True, and a planned module has no second derivative. "
            "Use the original model for this step."
        )
    if torch.is_autocast_enabled(device.type):
        raise BackwardError(
            "leave the autocast context before calling backward(): inside autocast eager casts the backward's kernels, and "
            "a plan's are not cast."
        )


def check_inner_outputs(
    outputs: Mapping[int, weakref.ref[torch.Tensor]], names: Sequence[str], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Refuse hooks on an output that another output is computed from.

    In eager such a hook gets the gradient that comes from inside of the model, too. A plan does not return that.

    Args:
        outputs: by their positions. They may be gone.
        names: of the outputs.

    Raises:
        BackwardError: one has a hook, or keeps its gradient, and gradients of others arrive.
    """
    for i, found in outputs.items():
        output = found()
        others = any(gradient is not None for j, gradient in enumerate(gradients) if j != i)
        if output is None or not others:
            continue
        hooks = list((output._backward_hooks or {}).values())
        # those of torch's wrappers ask when a gradient comes, and not for its values
        modules = [str(getattr(hook, "__module__", "")) for hook in hooks]
        if output.retains_grad or not all(module.startswith("torch.distributed") for module in modules):
            raise BackwardError(
                f"output {names[i]!r} has a hook, or retain_grad(), and other outputs are computed from it: in eager its "
                "gradient has a part from inside of the model, which a plan does not return. Use the original model for this "
                "step, or let the model return this output alone"
            )


def check_switches(planned: Mapping[str, Any] | None) -> None:
    """Refuse to run kernels of the forward again under other switches.

    Args:
        planned: `kernel_switches` in the forward; None where the plan runs nothing again.

    Raises:
        BackwardError: names the switch.
    """
    now = kernel_switches() if planned else {}
    for name, then in (planned or {}).items():
        if now[name] != then:
            raise BackwardError(
                f"the switch {name} is {now[name]}, and was {then} in the forward, of which a plan runs parts again in the "
                "backward. Set it for both, or use the original model for this step"
            )


def check_backward(
    gradients: Sequence[torch.Tensor | None], differentiated: Sequence[int], names: Sequence[str], device: torch.device
) -> None:
    """Refuse what a backward cannot do that was written for one set of outputs, as an exported file's.

    Args:
        gradients: per output, its gradient; None where none came.
        differentiated: positions of the outputs that the plan differentiates.
        names: of the outputs.

    Raises:
        BackwardError: as `check_modes`, or gradients of other outputs; says what to do instead.
    """
    check_modes(device)
    for i, gradient in enumerate(gradients):
        if gradient is not None and i not in differentiated:
            raise BackwardError(
                f"backward came through output {names[i]!r}, but the plan differentiates only "
                f"{', '.join(names[j] for j in differentiated)}. Plan with loss={names[i]!r}, "
                "or loss=a function of the output that returns all the tensors your loss is made of."
            )
    for i in differentiated:
        if gradients[i] is None:
            raise BackwardError(
                f"no gradient came through output {names[i]!r}, which the plan differentiates. "
                "Plan with loss= naming just the outputs your loss is made of."
            )


def modified_in_place(what: str) -> str:
    """The message for a tensor that was written into too early."""
    return (
        f"{what} was modified by an inplace operation between a planned forward and its backward, which reads it again. "
        "Modify it after backward, or a copy of it"
    )


def written_activations(ctx: Any, executable: Executable) -> tuple[int, ...]:
    """Positions of the exposed saved activations that the caller has written into.

    Raises:
        BackwardError: the caller wrote into another output, which the backward (eager's, too) reads.
    """
    written = []
    for (output, position), tensor, version in zip(
        executable.version_checked, ctx.version_checked, ctx.checked_versions, strict=False
    ):
        if tensor._version != version:
            if position is None:
                raise BackwardError(modified_in_place(f"output {executable.names[output]!r}"))
            written.append(position)
    return tuple(written)


def check_views(ctx: Any, executable: Executable, gradients: Sequence[torch.Tensor | None]) -> None:
    """Refuse gradients of a written view where eager would compute other bits.

    After a write into a view, autograd rebuilds its node. A gradient whose strides differ from the view's then reaches
    eager's kernels with other strides than the planned ones.

    Raises:
        BackwardError: an output that is a view in eager was written into, and its gradient has other strides.
    """
    for view in ctx.views:
        gradient = gradients[view.position]
        if gradient is None or not view.is_written or gradient.stride() in view.strides:
            continue
        raise BackwardError(
            f"output {executable.names[view.position]!r} was modified in place, and its gradient has strides "
            f"{tuple(gradient.stride())} where it has {view.strides[0]}: eager would differentiate it in another way than a "
            "plan. Write into a copy of it"
        )


@dataclass(frozen=True, slots=True)
class WatchedOutput:
    """A result as the forward returned it: a view, or one that shares its memory. It may be gone by the backward.

    Attributes:
        position: among the results.
        output: the result, or None where it is gone.
        counter: holds no bytes and has the result's version.
        version: what that was.
        strides: its own, and those of a new tensor like it.
    """

    position: int
    output: weakref.ref[torch.Tensor]
    counter: torch.Tensor
    version: int
    strides: tuple[tuple[int, ...], tuple[int, ...]]

    @staticmethod
    def of(position: int, output: torch.Tensor) -> WatchedOutput:
        """A result as it is now."""
        counter = output.detach()  # shares the version, also after its memory is replaced
        counter.data = torch.empty(0, dtype=output.dtype, device=output.device)
        strides = (tuple(output.stride()), tuple(torch.empty_like(output, device="meta").stride()))
        return WatchedOutput(position, weakref.ref(output), counter, output._version, strides)

    @property
    def is_written(self) -> bool:
        """It was written into since."""
        return self.counter._version != self.version


def check_shared_outputs(ctx: Any, executable: Executable, gradients: Sequence[torch.Tensor | None]) -> None:
    """Refuse gradients of an output whose memory was written through another output, while autograd recorded.

    In eager the one is a view of the other, so the write is a part of what both are differentiated through.

    Raises:
        BackwardError: one was written, or one that is gone may have been.
    """
    for group in ctx.shared:
        is_written = any(shared.is_written for shared in group)
        arriving = [shared.position for shared in group if gradients[shared.position] is not None]
        for shared in group if is_written else ():
            output = shared.output()
            others = [position for position in arriving if position != shared.position]
            if others and (output is None or output.grad_fn is not ctx):
                one, other = executable.names[shared.position], executable.names[others[0]]
                raise BackwardError(
                    f"output {one!r} shares its memory with {other!r}, and was modified in place: eager would differentiate "
                    "the write, too. Write into a copy of it: output.clone()"
                )


def check_spare_inputs(ctx: Any, executable: Executable, other: OtherBackward) -> None:
    """Refuse another backward that reads an input which was modified since the forward.

    Raises:
        BackwardError: names the input.
    """
    first = executable.num_saved + len(executable.saved_inputs)
    for i, (tensor, version) in enumerate(zip(ctx.spare, ctx.spare_versions, strict=False)):
        if first + i in other.takes and tensor._version != version:
            raise BackwardError(modified_in_place(executable.inputs[executable.spare[i]]))


def check_unreached_inputs(ctx: Any, executable: Executable, other: OtherBackward) -> None:
    """Refuse another backward that computes no gradient for an input that autograd would visibly visit; see `check_visited`."""
    if None not in other.gradients:
        return
    node = ctx
    for stage, positions in enumerate(executable.stage_gradients):
        node = node.next_functions[0][0]
        check_visited(node, executable, stage, [other.position(i) for i in positions])


def check_visited(ctx: Any, executable: Executable, stage: int, gradients: Sequence[object | None]) -> None:
    """Refuse None as the gradient of an input where autograd would visibly visit it.

    Eager's graph does not contain that input. Here it gets None: a parameter's `grad` stays unchanged, but its tensor hooks
    would run, and so would the backward of the operation that produced an input.

    Args:
        ctx: the autograd node of the stage.
        gradients: one per input of the stage.

    Raises:
        BackwardError: names the input.
    """
    if not any(gradient is None for gradient in gradients):
        return
    edges = [edge for edge, _ in ctx.next_functions][int(ctx.has_token) :]
    positions = executable.stage_gradients[stage]
    for position, i, gradient, edge in zip(executable.owners[stage], positions, gradients, edges, strict=True):
        if gradient is not None or edge is None or i >= executable.num_gradients:
            continue
        leaf = getattr(edge, "variable", None)
        why = "was computed by an earlier step" if leaf is None else "has a tensor hook" if leaf._backward_hooks else ""
        if why:
            raise BackwardError(
                f"this backward does not reach {executable.inputs[position]}, which {why}: eager would leave it alone, a "
                "planned module cannot. Use the original model for this step"
            )
