"""What the tracer knows of particular libraries, one table per fact."""

from __future__ import annotations

from typing import Any

from planner.tracer.host.foreign import python_module_of

TRACED_HOOKS = ("torch.nn.utils", "transformers.")
"""Prefixes of the modules whose hooks compute (weight_norm, spectral_norm, recorded outputs): a trace includes them."""

CACHES = (("transformers.", "Cache"),)
"""(module prefix, end of the class's name) of key-value caches: of use in generation only, and left out of a planned output."""

RETURN_DICT = ("transformers.", "diffusers.")
"""Prefixes of the modules whose models return a plain tuple where they are called with return_dict=False."""

_DDP = "planned = plan({it}.module, budget, args); model = DistributedDataParallel(planned)"
_SHARDED = (
    "plan the blocks before they are sharded, for block in blocks: install(block, plan(block, budget, args)), then "
    "fully_shard(block)",
    "which gathers parameters for the time of a forward",
)
WRAPPERS = {
    "DistributedDataParallel": (
        f"plan what it wraps, {_DDP}",
        "whose gradients would be reduced once, while planning, and never again",
    ),
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
    "ReplicateModule": (
        "plan before replicate(model), install(model, plan(model, budget, args))",
        "which reduces gradients by hooks",
    ),
    "DataParallel": (
        f"use a process for each device: {_DDP}",
        "which copies the model to several devices at each call",
    ),
    "DeepSpeedEngine": (
        "plan what it wraps, planned = plan({it}.module, budget, args); deepspeed.initialize(model=planned, ...)",
        "whose own backward and step are needed",
    ),
    "OptimizedModule": (
        "plan what torch.compile was given, {it}._orig_mod; plan(..., compile=True) compiles the planned step",
        "made by torch.compile",
    ),
    "CheckpointedModule": ("plan the original, {it}.original", "which is planned already"),
}
"""Classes around a model that no plan can hold -> the lines that work, with the instance as `it`; what is in the way."""

SHARDED_TENSORS = ("DTensor", "ShardedTensor")
"""Classes of tensors of which each rank holds a part."""


def is_users_hook(hook: Any) -> bool:
    """The hook is the user's: a trace would call it once and never again."""
    return not str(getattr(hook, "__module__", "")).startswith(TRACED_HOOKS)


def is_cache(value: Any) -> bool:
    """The value is a key-value cache."""
    return any(
        python_module_of(base).startswith(prefix) and base.__name__.endswith(suffix)
        for base in type(value).__mro__
        for prefix, suffix in CACHES
    )
