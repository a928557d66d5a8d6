"""Kinds of steps of a training loop. Each takes a Run; what it sees goes to `run.see`, to be compared with eager's."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch


def train(run: Any) -> None:
    """Forward, backward of a loss of all outputs and what was left on the module, and an update."""
    out = run.call(*run.inputs())
    run.backward(run.loss(out))
    run.update()


def changed(run: Any) -> None:
    """A training step that changes something between the forward and the backward."""
    loss = run.loss(run.call(*run.inputs()))
    run.between()
    run.backward(loss)
    run.update()


def no_update(run: Any) -> None:
    """Forward and backward; weights stay."""
    run.backward(run.loss(run.call(*run.inputs())))
    run.model.zero_grad()


def accumulate(run: Any) -> None:
    """Two backwards, one update."""
    for _ in range(2):
        run.backward(run.loss(run.call(*run.inputs())))
    run.update()


def in_flight(run: Any) -> None:
    """Two forwards, then their backwards, the last first."""
    first, second = run.loss(run.call(*run.inputs())), None
    second = run.loss(run.call(*run.inputs()))
    run.backward(second)
    run.backward(first)
    run.update()


def in_flight_in_order(run: Any) -> None:
    """Two forwards, then their backwards, the first first."""
    first = run.loss(run.call(*run.inputs()))
    second = run.loss(run.call(*run.inputs()))
    run.backward(first)
    run.backward(second)
    run.update()


def joint(run: Any) -> None:
    """Two forwards and one backward of the sum of their losses."""
    run.backward(run.loss(run.call(*run.inputs())) + run.loss(run.call(*run.inputs())))
    run.update()


def penalized(run: Any) -> None:
    """A loss that uses the weights again."""
    loss = run.loss(run.call(*run.inputs()))
    run.backward(loss + sum(p.square().sum() for p in run.model.parameters() if p.requires_grad) * 0.01)
    run.update()


def used_again(run: Any) -> None:
    """Arguments that were computed, and that the loss uses, too."""
    given = [leaf.requires_grad_() if isinstance(leaf, torch.Tensor) else leaf for leaf in copy.deepcopy(run.inputs())]
    args = [leaf * 1.5 if isinstance(leaf, torch.Tensor) else leaf for leaf in given]
    loss = run.loss(run.call(*args))
    run.backward(loss + sum(leaf.sin().mean() for leaf in args if isinstance(leaf, torch.Tensor)))
    run.see("gradients of what was given", [leaf.grad for leaf in given if isinstance(leaf, torch.Tensor)])
    run.update()


def dropped(run: Any) -> None:
    """A forward whose outputs nobody uses."""
    run.call(*run.inputs())


def partial(run: Any) -> None:
    """Backward from the first output only."""
    run.backward(run.differentiable(run.call(*run.inputs()))[0].square().mean())
    run.update()


def last_output(run: Any) -> None:
    """Backward from the last output only."""
    run.backward(run.differentiable(run.call(*run.inputs()))[-1].square().mean())
    run.update()


def one_at_a_time(run: Any) -> None:
    """Gradients of each output by itself, as multi-task methods take them."""
    outs = run.differentiable(run.call(*run.inputs()))
    weights = [p for p in run.model.parameters() if p.requires_grad]
    for i, out in enumerate(outs):
        keep = i + 1 < len(outs)
        found = torch.autograd.grad(out.square().mean(), weights, retain_graph=keep, allow_unused=True)
        run.see(f"gradients of output {i}", list(found))


def twice(run: Any) -> None:
    """Backward twice through one forward."""
    loss = run.loss(run.call(*run.inputs()))
    loss.backward(retain_graph=True)
    run.backward(loss)
    run.update()


def _given_gradient(run: Any, make: Any) -> None:
    outs = run.differentiable(run.call(*run.inputs()))
    torch.autograd.backward(outs, [make(run, out) for out in outs])
    run.update()


def transposed(run: Any) -> None:
    """The gradients of outputs arrive with their strides turned round."""
    _given_gradient(run, lambda run, out: run.noise(*out.shape[::-1]).permute(*range(out.dim() - 1, -1, -1)))


def expanded(run: Any) -> None:
    """The gradients of outputs arrive expanded from one number."""
    _given_gradient(run, lambda run, out: run.noise(1).reshape([1] * out.dim()).expand(out.shape))


def broadcast(run: Any) -> None:
    """The gradients of outputs arrive expanded along their first dimension."""
    _given_gradient(run, lambda run, out: run.noise(*out.shape[1:]).expand(out.shape))


def sliced(run: Any) -> None:
    """The gradients of outputs arrive as every second column of a wider tensor."""
    _given_gradient(run, lambda run, out: run.noise(*out.shape[:-1], 2 * out.shape[-1])[..., ::2])


def transposed_loss(run: Any) -> None:
    """A loss of transposed outputs, as cross entropy of a sequence takes them."""
    outs = run.differentiable(run.call(*run.inputs()))
    run.backward(sum(torch.log_softmax(out.transpose(0, -1), 0).square().mean() for out in outs))
    run.update()


def written(run: Any) -> None:
    """Outputs are written into, without autograd's knowledge, before the backward."""
    outs = run.differentiable(run.call(*run.inputs()))
    with torch.no_grad():
        for leaf in outs:
            leaf.mul_(3.0)
    torch.autograd.backward(outs, [run.noise(*leaf.shape) for leaf in outs])
    run.update()


def written_by_autograd(run: Any) -> None:
    """Outputs are written into in place, as part of the graph, before the loss."""
    out = run.call(*run.inputs())
    for leaf in run.differentiable(out):
        leaf.mul_(0.5)
    run.backward(run.loss(out))
    run.update()


def evaluated(run: Any) -> None:
    """Evaluation, then training mode again."""
    run.model.eval()
    with torch.no_grad():
        run.call(*run.inputs())
    run.model.train()


def no_grad(run: Any) -> None:
    """A call in training mode without gradients."""
    with torch.no_grad():
        run.call(*run.inputs())


def smaller(run: Any) -> None:
    """A training step on half of the rows."""
    args = [leaf[: len(leaf) // 2] if isinstance(leaf, torch.Tensor) else leaf for leaf in run.inputs()]
    run.backward(run.loss(run.call(*args)))
    run.update()


def bad_shape(run: Any) -> None:
    """A call that raises in the middle of the forward: one column too many."""
    args = [torch.cat([leaf, leaf[..., :1]], -1) if isinstance(leaf, torch.Tensor) else leaf for leaf in run.inputs()]
    run.call(*args)


def interrupted(run: Any) -> None:
    """A forward that a hook of the loss interrupts in the backward."""
    loss = run.loss(run.call(*run.inputs()))
    scaled = loss * 1.0

    def stop(_: torch.Tensor) -> None:
        raise KeyError("stopped by the loop")

    scaled.register_hook(stop)
    run.backward(scaled)


def non_contiguous(run: Any) -> None:
    """Inputs of the planned size with other strides."""
    args = [leaf.t().contiguous().t() if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 else leaf for leaf in run.inputs()]
    run.backward(run.loss(run.call(*args)))
    run.update()


def input_gradients(run: Any) -> None:
    """Inputs that require grad, as for adversarial examples and discriminators."""
    args = [leaf.requires_grad_() if isinstance(leaf, torch.Tensor) else leaf for leaf in copy.deepcopy(run.inputs())]
    run.backward(run.loss(run.call(*args)))
    run.see("gradients of inputs", [leaf.grad for leaf in args if isinstance(leaf, torch.Tensor)])
    run.update()


def copied(run: Any) -> None:
    """A training step of a deep copy; the original is left."""
    twin = copy.deepcopy(run.module)
    out = run.call(*run.inputs(), module=twin)
    sum(leaf.square().mean() for leaf in run.differentiable(out)).backward()
    run.see("gradients of the copy", {name: p.grad for name, p in sorted(twin.named_parameters())})


def frozen_update(run: Any) -> None:
    """A training step with gradients set to zero in place, not to None."""
    run.backward(run.loss(run.call(*run.inputs())))
    run.update(set_to_none=False)


def written_output(run: Any) -> None:
    """A training step whose caller then writes into the lists and dictionaries of the output."""
    out = run.call(*run.inputs())
    run.backward(run.loss(out))
    run.update()
    todo = [out]
    while todo:
        value = todo.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        todo += [*inner, *(vars(value).values() if dataclasses.is_dataclass(value) else ())]
        if isinstance(value, dict):
            value["k"] = value.get("k", 1.0) + 0.5
        elif isinstance(value, list):
            value.append(0.5)
