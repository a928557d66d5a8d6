"""Inductor: a graph of ATen kernels becomes compiled code that frees its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from planner._compat.fake_tensors import fake_mode
from planner._compat.fx_graphs import results
from planner._compat.private_names import INDUCTOR, check

_SETTINGS = {"layout_optimization": False}
"""Other memory layouts for convolutions take copies that no plan counts (9 % of the plain peak on a UNet, torch 2.13)."""


def compile_boxed(graph: fx.Graph, examples: Sequence[torch.Tensor]) -> Callable[[list[Any]], Sequence[torch.Tensor]]:
    """Compile a graph of ATen kernels, which may write into its inputs; no gradient is recorded.

    Args:
        graph: results are a tuple of tensors, whose strides are kept.
        examples: per placeholder, a tensor (fake ones do) of the shape, strides, dtype and device that will come.

    Returns:
        a function that takes a list of tensors, and empties it.

    Raises:
        UnsupportedTorchError: the installed inductor does not have a name that is used here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's words about torch's own code
        return _compile_boxed(graph, examples)


def _compile_boxed(graph: fx.Graph, examples: Sequence[torch.Tensor]) -> Callable[[list[Any]], Sequence[torch.Tensor]]:
    check(INDUCTOR)  # here, as inductor takes seconds to import
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    run = fx.GraphModule({}, graph)

    def forward(*tensors: torch.Tensor) -> Any:  # tracing counts the arguments that a function's signature names
        return run(*tensors)

    with fake_mode():
        fakes = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=e.device) for e in examples]
        functional = torch.func.functionalize(forward)  # writes become one copy each, at the end
        with torch.no_grad():
            flat = make_fx(functional, decomposition_table=select_decomp_table())(*fakes)
    # without a caller inside torch.compile, every result is one whose layout somebody relies on
    flat.graph.output_node().meta["user_visible_output_idxs"] = list(range(len(results(flat.graph))))
    flat.graph.eliminate_dead_code()
    flat.recompile()
    with config.patch(_SETTINGS), torch.no_grad():
        return compile_fx_inner(flat, fakes)  # type: ignore[no-any-return]
