"""Torch's names for communication between processes."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def collectives_forbidden() -> Iterator[list[str]]:
    """While entered, torch.distributed's operators raise, on CPU and CUDA tensors; yields the names of those that were called.

    In a forked child, or on one rank alone, they would wait for ever.
    """
    refused: list[str] = []
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        yield refused
        return

    def refuse(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            refused.append(name)
            raise RuntimeError(f"{name} is not run while a kernel is looked at")

        return call

    known = [name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("c10d", "_c10d_functional")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of every kernel that is replaced
            for name in sorted(set(known)):
                space, _, op = name.partition("::")
                for key in ("CPU", "CUDA") if space in libraries else ():
                    libraries[space].impl(op, refuse(name), key, allow_override=True)
        yield refused
    finally:
        for library in libraries.values():
            library._destroy()


def key_value_store() -> Any:
    """The store by which the processes of torch.distributed find each other; None where it is not in use."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def ranks_of_group(name: str) -> tuple[list[int], int]:
    """The ranks of a process group, by its name ('' for the default one), and this process's rank, all in the world."""
    c10d: Any = torch.distributed.distributed_c10d
    group = c10d._resolve_process_group(name) if name else c10d._get_default_group()
    return torch.distributed.get_process_group_ranks(group), torch.distributed.get_rank()
