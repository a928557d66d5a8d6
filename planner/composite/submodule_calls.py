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
from planner._compat.backward_state import in_backward
from planner._compat.switches import in_transform
from planner._compat.tensors import address_of
from planner.composite.node_reads import NodeReads
from planner.composite.uses import Uses
from planner.tracer.host.observe import Observer
from planner.tracer.replay import Strides
from planner.tracer.results import OutputIdentity


class SubmoduleCalls:
    """What a step does with the submodules of a model, as noted by hooks on them.

    Calls without gradients do not count: they run as they are.

    Attributes:
        counts: per submodule, its calls.
        used: per submodule and call, the strides of its outputs' gradients, by position of the output.
        refused: submodules that cannot be units by what the step does with them, and why.
        weight_users, inputs_used_after: as of Uses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.used: dict[str, list[dict[int, Strides]]] = {}
        self.refused: dict[str, str] = {}
        self._model = model
        self._uses = Uses(model)
        self._nodes = NodeReads()

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
        """Code follows autograd's graph, which has further nodes in this step: it may fail for that."""
        return self._nodes.has_seen

    @contextlib.contextmanager
    def noted(self, observer: Observer) -> Iterator[None]:
        """While entered, a step runs; what code reads and kernels write is remembered by the observer."""
        named = [(name, module) for name, module in self._model.named_modules() if name]
        # from here on: what hooks write to before is put back
        hooks = [module.register_forward_hook(partial(self._after, name)) for name, module in named]
        hooks += [module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True) for name, module in named]
        hooks += [module.register_forward_hook(self._left, always_call=True) for _, module in named]
        try:
            with observer.remembering(), self._nodes.noted(observer.reads), self._uses:
                yield
            follows = "next_functions" in observer.reads.reads().names
            for name, attribute in self._nodes.inside_of(follows=follows).items():
                self.refused[name] = (
                    f"code around it reads {attribute} of a tensor that it computes, which shows autograd's graph; planned, it "
                    "has another one"
                )
        finally:
            for hook in hooks:
                hook.remove()
            self._uses.close()
            self._nodes.close()

    def _before(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        reason = _why_not_planned(pytree.tree_leaves((args, kwargs)))
        if reason:
            self.refused[name] = reason
            self._uses.pass_by(name)
        else:
            args, kwargs = self._uses.enter(name, args, kwargs)
        self._nodes.enter(name, (args, kwargs))
        return args, kwargs

    def _left(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._uses.leave()
        self._nodes.leave()

    def _after(self, name: str, _module: nn.Module, args: Any, out: Any) -> Any:
        if not torch.is_grad_enabled():
            return out
        self.counts[name] += 1
        leaves, spec = pytree.tree_flatten(out)
        if any(map(_is_nested, leaves)):
            self.refused[name] = _NESTED
        if in_transform() or any(map(_is_nested, leaves)):
            return out
        used: dict[int, Strides] = {}
        self.used.setdefault(name, []).append(used)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                # what the submodule itself does with the leaf goes past this one; a view, or an input, is written as such
                is_own = not leaf._is_view() and not any(leaf is given for given in pytree.tree_leaves(args))
                leaves[i] = OutputIdentity.apply(leaf, None) if is_own else leaf.view_as(leaf)
                leaves[i].register_hook(partial(self._note_gradient, name, used, i))
        self._nodes.returned(name, leaves)
        return pytree.tree_unflatten(leaves, spec)

    def _note_gradient(self, name: str, used: dict[int, Strides], i: int, gradient: torch.Tensor) -> None:
        """The gradient of output i of a submodule's call arrives: note its strides, or why the submodule cannot be a unit."""
        if torch.is_grad_enabled():
            self.refused[name] = "its backward runs with create_graph=True, and a planned module has no second derivative"
        elif torch.is_autocast_enabled(gradient.device.type):
            self.refused[name] = "its backward runs under autocast: eager casts the kernels there, a plan does not"
        elif gradient.layout is not torch.strided or address_of(gradient) is None:
            self.refused[name] = "it gets a sparse gradient, or those of many backwards at once (is_grads_batched=True)"
        elif i in used:
            self.refused[name] = "the step runs its backward more than once (retain_graph=True)"
        else:
            used[i] = gradient.stride()


_NESTED = "it takes or returns a nested tensor"


def _is_nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested


def _why_not_planned(leaves: Sequence[Any]) -> str:
    """Why no planned module can take the call of a submodule that is made now, with these arguments; "" if one can."""
    if any(map(_is_nested, leaves)):
        return _NESTED
    if in_transform():
        return "it is called under a transform of torch.func (vmap, grad, jvp) or forward-mode differentiation"
    if in_backward():
        return "the backward runs it again (torch.utils.checkpoint): plan it without, a plan chooses what is recomputed"
    return ""
