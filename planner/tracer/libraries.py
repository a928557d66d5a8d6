"""What the tracer knows of particular libraries, one table per fact."""

from __future__ import annotations

from typing import Any

TRACED_HOOKS = ("torch.nn.utils", "transformers.")
"""Prefixes of the modules whose hooks compute (weight_norm, spectral_norm, recorded outputs): a trace includes them."""

CACHES = (("transformers.", "Cache"),)
"""(module prefix, end of the class's name) of key-value caches: of use in generation only, and left out of a planned output."""

RETURN_DICT = ("transformers.", "diffusers.")
"""Prefixes of the modules whose models return a plain tuple where they are called with return_dict=False."""

_DDP = "planned = plan({module}, budget, args); model = DistributedDataParallel(planned)"
WRAPPERS = {
    "DistributedDataParallel": f"gradients would be reduced once, while planning, and never again. Plan what it wraps: {_DDP}",
    "FullyShardedDataParallel": "parameters are gathered for the time of a forward. Plan the blocks before they are sharded: "
    "for block in blocks: install(block, plan(block, budget, args)), then fully_shard(block) (FSDP2)",
    "FSDPModule": "parameters are gathered for the time of a forward. Plan the blocks before they are sharded: for block in "
    "blocks: install(block, plan(block, budget, args)), then fully_shard(block)",
    "ReplicateModule": "gradients are reduced by hooks. Plan it before: install(model, plan(model, budget, args)), then "
    "replicate(model)",
    "DataParallel": f"each call copies the model to several devices. Use a process for each device: {_DDP}",
    "DeepSpeedEngine": "its own backward and step are needed. Plan what it wraps, before: "
    "planned = plan({module}, budget, args); deepspeed.initialize(model=planned, ...)",
}
"""Classes that communicate around a model's forward -> why they are not planned, and the lines that work."""

SHARDED_TENSORS = ("DTensor", "ShardedTensor")
"""Classes of tensors of which each rank holds a part."""


def is_users_hook(hook: Any) -> bool:
    """The hook is the user's: a trace would call it once and never again."""
    return not str(getattr(hook, "__module__", "")).startswith(TRACED_HOOKS)


def is_cache(value: Any) -> bool:
    """The value is a key-value cache."""
    return any(
        base.__module__.startswith(prefix) and base.__name__.endswith(suffix)
        for base in type(value).__mro__
        for prefix, suffix in CACHES
    )
