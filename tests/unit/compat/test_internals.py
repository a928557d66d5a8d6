"""Private torch names: when a release moves one, these say which, with the version."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from planner._compat import internals
from planner._compat.internals import kernels_kept, selfcheck
from planner.tracer.capture import capture


def test_selfcheck_passes_on_this_torch():
    assert selfcheck() == [], f"torch {torch.__version__} moved something planner/_compat/internals.py relies on"


def test_every_private_import_exists():
    tree = ast.parse(inspect.getsource(internals))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            for alias in node.names:
                assert hasattr(module, alias.name), f"torch {torch.__version__} no longer has {node.module}.{alias.name}"


def test_kept_kernels_are_put_back():
    op = torch.ops.aten.upsample_bilinear2d.vec
    before = dict(op.py_kernels)
    with pytest.raises(ZeroDivisionError), kernels_kept():
        assert dict(op.py_kernels) != before, "torch registers no decomposition of upsample_bilinear2d any more"
        raise ZeroDivisionError
    assert dict(op.py_kernels) == before


def test_sources_name_module_and_line_on_forward_and_backward_nodes():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x)).sum()

    joint = capture(Named(), (torch.randn(2, 4),))
    kernels = [node for node in joint.graph.nodes if "mm" in node.name]
    assert len(kernels) == 5
    for node in kernels:
        source = joint.sources[node.name]
        assert source.module in ("first", "second") and source.file == Path(__file__).name and source.line


def test_calls_of_modules_are_intercepted_outermost_first_and_only_while_asked():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    seen = []

    def handle(module, name, args, kwargs, run):
        seen.append(name)
        return run()

    x = torch.randn(3, 2)
    expected = model(x)
    names = {module: name for name, module in model.named_modules() if name in ("0", "0.0")}
    with internals.calls_intercepted(names, handle):
        assert torch.equal(model(x), expected)
    model(x)
    assert seen == ["0"], f"torch {torch.__version__}: nn.Module.__call__ is no longer where calls of modules go through"
