"""Trains a model for three steps and says all that came of it. Runs where `planner` cannot be imported, too.

python -I exported.py CASES.pt RESULTS.pt THREADS trains the exported files that CASES.pt lists; bits depend on the number of
threads, in eager too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def leaves(out: Any) -> list[Any]:
    """An output's tensors and constants, whatever holds them."""
    if isinstance(out, Mapping):
        out = list(out.values())
    elif dataclasses.is_dataclass(out):
        out = [getattr(out, field.name) for field in dataclasses.fields(out)]
    return [leaf for item in out for leaf in leaves(item)] if isinstance(out, (list, tuple)) else [out]


def train(module: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Three AdamW steps from the loss, or from all outputs that require grad; seeded, the caller's RNG untouched."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    seen: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for step in range(3):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                out = module(*args, **kwargs)
            found = leaves(out)
            loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
            starts = [leaf for leaf in found if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            torch.stack([start.float().square().sum() for start in ([loss] if loss is not None else starts)]).sum().backward()
            seen |= {
                f"output {i}, {step}": t.detach().clone() if isinstance(t, torch.Tensor) else t for i, t in enumerate(found)
            }
            seen |= {f"gradient {name}, {step}": p.grad for name, p in module.named_parameters()}
            given = [leaf for leaf in leaves([*args, *kwargs.values()]) if isinstance(leaf, torch.Tensor)]
            seen |= {f"input gradient {i}, {step}": None if t.grad is None else t.grad.clone() for i, t in enumerate(given)}
            optimizer.step()
            optimizer.zero_grad()
        seen["rng"] = torch.get_rng_state()
    seen |= {f"buffer {name}": tensor.clone() for name, tensor in module.named_buffers()}
    return seen | {f"parameter {name}": p.detach().clone() for name, p in module.named_parameters()}


def load(path: str | Path) -> Any:
    """An exported file as a module; its one class is `.model_class`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    (module.model_class,) = kinds
    return module


def main(cases: str, results: str, threads: str) -> None:
    """Train every case: (path, state_dict, args, kwargs, dtype) by name."""
    sys.modules.update(planner=None, transformers=None)
    torch.set_num_threads(int(threads))
    found = {}
    for name, (path, state, args, kwargs, dtype) in torch.load(cases).items():
        model = load(path).model_class()
        missing = model.load_state_dict(state)
        assert not missing.missing_keys and list(model.state_dict()) == list(state), name
        found[name] = train(model, args, kwargs, dtype)
    assert not [name for name in sys.modules if name.startswith("planner.")]
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
