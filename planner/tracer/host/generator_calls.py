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
