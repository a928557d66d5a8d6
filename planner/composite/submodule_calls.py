"""How a real step calls submodules, and what it does with their outputs: which of them can be units."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.backward_state import backward_id, in_backward
from planner._compat.switches import in_transform, saved_tensors_hooks
from planner._compat.tensors import address_of
from planner.composite.in_place import replaced
from planner.composite.node_reads import NodeReads
from planner.composite.uses import Uses
from planner.tracer.checks import hooks_last_node
from planner.tracer.host.observe import Observer
from planner.tracer.replay import Strides
from planner.tracer.results import OutputIdentity


class SubmoduleCalls:
    """What a step does with the submodules of a model, as noted by hooks on them.

    Calls without gradients do not count: they run as they are.

    Attributes:
        counts: per submodule, its calls.
        gradient_strides: per submodule and call, the strides of its outputs' gradients, by position of the output.
        refused: submodules that cannot be units by what the step does with them, and why.
        weight_users, inputs_used_after: as of Uses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.gradient_strides: dict[str, list[dict[int, Strides]]] = {}
        self.refused: dict[str, str] = {}
        self._model = model
        self._nodes = NodeReads()
        self._uses = Uses(model, self._nodes.made)
        self._names_read: frozenset[str] = frozenset()
        self._saved_hooks: Any = None

    @property
    def weight_users(self) -> Mapping[str, set[str]]:
        """By a parameter's name, names of the submodules whose own code uses it."""
        return self._uses.weight_users

    @property
    def inputs_used_after(self) -> Mapping[str, set[int]]:
        """By a submodule's name, positions of those among the tensors of its call that are used again after it."""
        return self._uses.inputs_used_after

    @property
    def follows_nodes(self) -> bool:
        """Code reads `next_functions`. In this step the graph has nodes of the planner's, so that the code may fail."""
        return "next_functions" in self._names_read and bool(self._nodes.found or self._nodes.follows)

    @contextlib.contextmanager
    def noted(self, observer: Observer) -> Iterator[None]:
        """While entered, a step runs; what code reads and kernels write is remembered by the observer."""
        named = [(name, module) for name, module in self._model.named_modules() if name]
        # next to the forward: a user's own hooks of a unit run around its planned call
        hooks = [module.register_forward_hook(self._left, always_call=True, prepend=True) for _, module in named]
        hooks += [module.register_forward_hook(partial(self._after, name), prepend=True) for name, module in named]
        hooks += [module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True) for name, module in named]
        self._saved_hooks = saved_tensors_hooks()
        try:
            with observer.remembering(), self._nodes.noted(observer.reads), self._uses:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._uses.close()
            self._names_read = observer.reads.names
            self._refuse_looked_at()

    def _refuse_looked_at(self) -> None:
        found = self._nodes.found | (self._nodes.follows if self.follows_nodes else {})
        for name, attribute in found.items():
            self.refused[name] = (
                f"code around it looks at its part of autograd's graph (by {attribute}); a planned unit is a single node there"
            )

    def _before(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        reason = self._why_not_planned(pytree.tree_leaves((args, kwargs))) if torch.is_grad_enabled() else ""
        if reason:
            self.refused[name] = reason
        if reason or not torch.is_grad_enabled():
            self._uses.pass_by(name)
        else:
            args, kwargs = self._uses.enter(name, args, kwargs)
        self._nodes.enter(name)
        return args, kwargs

    def _left(self, module: nn.Module, _args: Any, out: Any) -> None:
        self._uses.leave()
        self._nodes.leave()
        if hooks_last_node(module):
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._nodes.see(leaf.grad_fn, "register_backward_hook")

    def _after(self, name: str, _module: nn.Module, args: Any, out: Any) -> Any:
        if not torch.is_grad_enabled():
            return out
        self.counts[name] += 1
        leaves = pytree.tree_leaves(out)
        has_nested = any(map(_is_nested, leaves))
        if has_nested:
            self.refused[name] = _NESTED
        if has_nested or in_transform():
            return out
        used: dict[int, Strides] = {}
        backwards: set[int] = set()
        self.gradient_strides.setdefault(name, []).append(used)
        given = pytree.tree_leaves(args)
        handed: dict[int, list[torch.Tensor]] = {}  # one for each place
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                # what the submodule itself does with the leaf goes past this one; a view, or an input, is written as such
                is_own = not leaf._is_view() and not any(leaf is one for one in given)
                leaves[i] = OutputIdentity.apply(leaf, None) if is_own else leaf.view_as(leaf)
                leaves[i].register_hook(partial(self._note_gradient, name, used, backwards, i))
                self._nodes.made(leaves[i])
                handed.setdefault(id(leaf), []).append(leaves[i])
        self._nodes.returned(given, leaves)
        return replaced(out, lambda tensor: handed[id(tensor)].pop(0) if handed.get(id(tensor)) else tensor, [])

    def _note_gradient(self, name: str, used: dict[int, Strides], backwards: set[int], i: int, gradient: torch.Tensor) -> None:
        """The gradient of output i of a submodule's call arrives: note its strides, or why the submodule cannot be a unit."""
        backwards.add(backward_id())
        reason = ""
        if torch.is_grad_enabled():
            reason = "its backward runs with create_graph=True, and a planned module has no second derivative"
        elif torch.is_autocast_enabled(gradient.device.type):
            reason = "its backward runs under autocast: eager casts the kernels there, a plan does not"
        elif gradient.layout is not torch.strided or address_of(gradient) is None:
            reason = "it gets a sparse gradient, or those of many backwards at once (is_grads_batched=True)"
        elif len(backwards) > 1:
            reason = "the step runs its backward more than once (retain_graph=True)"
        if reason:
            self.refused.setdefault(name, reason)
        else:
            used[i] = gradient.stride()

    def _why_not_planned(self, leaves: Sequence[Any]) -> str:
        """Why no planned module can take the call of a submodule that is made now, with these arguments; "" if one can."""
        if any(map(_is_nested, leaves)):
            return _NESTED
        if in_transform():
            return "it is called under a transform of torch.func (vmap, grad, jvp) or forward-mode differentiation"
        if in_backward():
            return "the backward runs it again (torch.utils.checkpoint): plan it without, a plan chooses what is recomputed"
        if saved_tensors_hooks() != self._saved_hooks:
            return "it is called under saved_tensors_hooks, or without them being allowed: a plan keeps what it needs itself"
        return ""


_NESTED = "it takes or returns a nested tensor"


def _is_nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested
