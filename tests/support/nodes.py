"""Calls of kernels as nodes of a graph, each made by itself."""

import os

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten


def call(target, *args, **kwargs):
    """A node calling `target`; tensors among the arguments become placeholders, an equal tensor the same one."""
    graph, made = fx.Graph(), {}

    def node_of(arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        if id(arg) not in made:
            made[id(arg)] = graph.placeholder(f"arg_{len(made)}")
            with FakeTensorMode() as mode:
                made[id(arg)].meta["val"] = mode.from_tensor(arg)
        return made[id(arg)]

    args, kwargs = tree_map(node_of, (args, kwargs))
    return graph.call_function(target, args, kwargs)


def node(target, *args, out, **kwargs):
    """A call whose fake output is `out`."""
    made = call(target, *args, **kwargs)
    made.meta["val"] = out
    return made


def meta(*size, dtype=torch.float32, device="meta"):
    return torch.empty(size, dtype=dtype, device=device)


def mm(n, dtype=torch.float32):
    return node(aten.mm.default, torch.rand(n, n).to(dtype), torch.rand(n, n).to(dtype), out=meta(n, n, dtype=dtype))


def on_function(function, *tensors):
    """A call of a Python function."""
    return node(function, *(tensors or (torch.rand(4),)), out=meta(4))


def crash(x):
    os.abort()


def refuse(x):
    raise RuntimeError("not today")


def different_calls():
    """Calls that cost differently, each from every other."""
    x = torch.rand(4, 8)
    return [
        call(aten.add.Tensor, x, x),
        call(aten.add.Tensor, x, torch.rand(4, 8)),
        call(aten.add.Tensor, x, torch.rand(4, 1)),
        call(aten.add.Tensor, x, torch.rand(4, 1).expand(4, 8)),
        call(aten.add.Tensor, x, torch.rand(8, 4).t()),
        call(aten.add.Tensor, x, torch.rand(4, 8, dtype=torch.float64)),
        call(aten.add.Tensor, x, torch.rand(4, 8), alpha=2),
        call(aten.add.Tensor, x, torch.rand(4, 8), alpha=2.0),
        call(aten.add.Tensor, x, 1.5),
        call(aten.mul.Tensor, x, torch.rand(4, 8)),
        call(aten.add.Tensor, x, torch.rand(36)[1:33].view(4, 8)),
        call(aten.cat.default, [x, torch.rand(4, 8)]),
        call(aten.cat.default, [x, x]),
        call(aten.cat.default, [x, torch.rand(4, 8)], 1),
        call(different_calls, x),
    ]
