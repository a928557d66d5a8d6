"""State of the process that a training step can read or change: saved, put back, and compared by name."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.backends import cuda as attention
from torch.nn.modules import module as module_hooks

_DETERMINISTIC = ("deterministic", "warn only")
_ATTENTION = {
    "flash attention": (attention.flash_sdp_enabled, attention.enable_flash_sdp),
    "memory-efficient attention": (attention.mem_efficient_sdp_enabled, attention.enable_mem_efficient_sdp),
    "plain attention": (attention.math_sdp_enabled, attention.enable_math_sdp),
}
_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    **_ATTENTION,
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "mkldnn": (lambda: torch.backends.mkldnn.enabled, torch.backends.mkldnn.set_flags),
    "anomaly mode": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "fill of uninitialized memory": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
        lambda on: setattr(torch.utils.deterministic, "fill_uninitialized_memory", on),
    ),
    "autocast cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    "torch's profile function": (sys.getprofile, sys.setprofile),
    "trace function": (sys.gettrace, sys.settrace),
    "profile function of new threads": (threading.getprofile, threading.setprofile),
}


def generators() -> dict[str, str]:
    """The states of torch's, Python's and numpy's global random generators, as text that can be compared."""
    return {
        "torch's generator": str(hash(torch.get_rng_state().numpy().tobytes())),
        "Python's generator": str(hash(random.getstate())),
        "numpy's generator": numpy_text(np.random.get_state.__self__),
    }


def numpy_text(state: np.random.RandomState) -> str:
    """A digest of the state of a generator of numpy's old kind."""
    name, keys, *rest = state.get_state(legacy=True)
    return f"{name} {hash(keys.tobytes())} {rest}"


def seed(number: int) -> None:
    """Set all three."""
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes milliseconds for a CUDA that is not there
    random.seed(number)
    np.random.seed(number % 2**32)


def switches() -> dict[str, str]:
    """Global settings of torch and the interpreter, and the methods and hooks that every module shares."""
    found = {name: repr(read()) for name, (read, _) in _SWITCHES.items()}
    found["deterministic"] = repr(_deterministic())
    found["environment"] = repr(sorted(os.environ.items()))
    found |= {f"nn.Module.{name}": repr(value) for name, value in vars(nn.Module).items() if callable(value)}
    shared = {name: value for name, value in vars(module_hooks).items() if name.startswith("_global_") and "hook" in name}
    found |= {name: repr([*value.items()]) for name, value in shared.items() if isinstance(value, dict)}
    return found


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever runs inside, generators, switches, module hooks and the environment are put back after."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    before = {name: read() for name, (read, _) in _SWITCHES.items()}
    deterministic, environment = _deterministic(), dict(os.environ)
    hooks = {name: dict(value) for name, value in vars(module_hooks).items() if isinstance(value, dict) and "hooks" in name}
    try:
        yield
    finally:
        for name, (_, write) in _SWITCHES.items():
            write(before[name])
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        for name, items in hooks.items():
            held = vars(module_hooks)[name]
            held.clear()
            held.update(items)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@contextlib.contextmanager
def captures() -> Iterator[list[str]]:
    """What the planner's log says of captures while entered."""
    said: list[str] = []
    log, handler = logging.getLogger("planner"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "captured in" in record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
