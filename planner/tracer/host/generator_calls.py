"""What a forward does with random generators that no plan repeats: refused by name."""

from __future__ import annotations

from planner.errors import CaptureError
from planner.tracer.host.kernels import RecordKernels
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.module_stack import ModuleStack


def refuse_generators(reads: ReadRecorder, kernels: RecordKernels, modules: ModuleStack) -> None:
    """Raise CaptureError where a recorded forward controlled torch's generator, or drew from others.

    Args:
        reads, kernels, modules: what recorded it.
    """
    if reads.controlled is not None:
        module, function = reads.controlled.module, reads.controlled.function
        if reads.controlled.is_checkpoint:
            raise CaptureError(
                f"switch {module or 'the model'}'s own activation checkpointing off (torch.utils.checkpoint; "
                "model.gradient_checkpointing_disable() in transformers): a plan recomputes what the budget asks for",
                module=module,
            )
        raise CaptureError(
            f"the forward of {module or 'the model'} controls torch's random generator (Generator.{function}: manual_seed, "
            "fork_rng, set_rng_state, ...), which a plan does not repeat. Do it outside of the forward",
            module=module,
        )
    if kernels.generator_at is not None:
        module = kernels.generator_at
        raise CaptureError(
            f"the model's forward ({module or 'the model'}) draws from a torch.Generator of its own; a plan repeats draws "
            "of the default generator only",
            module=module,
        )
    drew = modules.drew if modules.drew is not None else reads.drew
    if drew is not None:
        raise CaptureError(
            f"the forward of {drew or 'the model'} draws random numbers from Python's random module or from numpy; "
            "a plan would repeat one draw for ever. Draw with torch",
            module=drew,
        )


def refuse_in_backward(reads: ReadRecorder) -> None:
    """Raise CaptureError where code of the model's own gets what is saved for the backward, or hooks nodes of its graph."""
    if reads.hooks_nodes is not None:
        raise CaptureError(
            f"the forward of {reads.hooks_nodes or 'the model'} registers a hook on a node of autograd's graph "
            "(grad_fn.register_hook), whose code a plan cannot know. Register it on the tensor: tensor.register_hook",
            module=reads.hooks_nodes,
        )
    if reads.retains is not None:
        raise CaptureError(
            f"the forward of {reads.retains or 'the model'} keeps the gradient of an activation (retain_grad), which a plan "
            "returns to no one. Return the activation from the model, and call retain_grad() on it there",
            module=reads.retains,
        )
    if reads.late_environment is not None:
        raise CaptureError(
            f"code of {reads.late_environment or 'the model'} that runs in the backward reads environment variables, which a "
            "plan cannot compare. Read them in the forward",
            module=reads.late_environment,
        )
    if reads.packs_saved is not None:
        raise CaptureError(
            f"the forward of {reads.packs_saved or 'the model'} packs or changes what is saved for the backward "
            "(torch.autograd.graph.saved_tensors_hooks), which a plan would leave out: it keeps what it needs itself. Do it "
            "around the call of the model, or not at all",
            module=reads.packs_saved,
        )
