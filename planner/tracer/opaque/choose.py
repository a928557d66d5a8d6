"""Which submodules run as they are: those that the user names, those of known kinds, and those that could not be captured."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner.errors import InputError
from planner.tracer.libraries import is_users_hook


def opaque_from_start(model: nn.Module, named: Collection[str]) -> tuple[str, ...]:
    """Names of the submodules that the user names, and of those known not to be captured exactly.

    Raises:
        InputError: a name is no submodule's.
    """
    modules = dict(model.named_modules())
    for name in named:
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, 3)
            raise InputError(f"opaque={name!r} is no submodule of the model{f'; did you mean {close}?' if close else ''}")
    known = [name for name, module in modules.items() if name and why_opaque(module)]
    return outermost((*named, *known))


def why_opaque(module: nn.Module) -> str:
    """Why a module of this kind is never captured; "" where it may be."""
    if isinstance(module, nn.RNNBase):
        return "a trace decomposes its fused kernel, and the bits differ"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.sparse or module.max_norm is not None):
        return "its gradient is sparse" if module.sparse else "its forward writes into its weight (max_norm)"
    hooks = [hook for kind in MODULE_HOOKS for hook in vars(module)[kind].values()]
    if any(map(is_users_hook, hooks)):
        return "it has hooks, which a trace would call once and never again"
    return ""


def widened(model: nn.Module, opaque: Sequence[str], failed: str) -> tuple[str, ...]:
    """More opaque modules, after a capture with `opaque` failed in the submodule `failed`; () if there are none.

    Makes every module of this class opaque, because they fail as well; if this one already is, its parent instead. Of torch's
    own containers, which have nothing in common, only this one.
    """
    while failed and (failed in opaque or not _is_callable(model.get_submodule(failed))):
        failed = failed.rpartition(".")[0]
    if not failed:
        return ()
    module = model.get_submodule(failed)
    alone = type(module).__module__.startswith("torch.nn.modules.container")
    same_class = [name for name, other in model.named_modules() if type(other) is type(module) and name]
    more = outermost((*opaque, *([failed] if alone else same_class)))
    return more if set(more) != set(opaque) else ()


def _is_callable(module: nn.Module) -> bool:
    """The module has a forward: nn.ModuleList and nn.ModuleDict have none, classes derived from them may."""
    return type(module).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)


def outermost(names: Collection[str]) -> tuple[str, ...]:
    """The names that lie inside of no other one, each once."""
    inside = {name for name in names for other in names if name.startswith(f"{other}.")}
    return tuple(dict.fromkeys(name for name in names if name not in inside))
