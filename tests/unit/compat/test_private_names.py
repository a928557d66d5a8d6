"""Private names of torch and inductor: one list has them all, and what is missing is said in one sentence."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from planner._compat.fake_tensors import FakeTensor, fake_inputs
from planner._compat.fx_graphs import results
from planner._compat.joint_export import export_joint
from planner._compat.kernels import kernels_kept
from planner._compat.module_calls import calls_intercepted
from planner._compat.private_names import INDUCTOR, OPTIONAL, REQUIRED, SUPPORTED_TORCH, Names, check
from planner._compat.tensors import tensors_alike
from planner.errors import UnsupportedTorchError
from planner.tracer.capture import capture

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
FILES = sorted((ROOT / "planner").rglob("*.py"))
LISTED = {f"{names.home}.{name}" for names in (*REQUIRED, *INDUCTOR, *OPTIONAL) for name in names.names}
OF_PYTHON = {"_exit", "_fields", "_getframe", "_lru_cache_wrapper"}


class Example:
    _here = 1


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (Names("torch._ops", ("OpOverload",)), []),
        (Names("torch._ops", ("OpOverload", "_gone", "_gone_too")), ["torch._ops._gone", "torch._ops._gone_too"]),
        (Names("torch._gone_module", ("one", "other")), ["torch._gone_module"]),
        (Names("torch._ops._gone", ("one",)), ["torch._ops._gone"]),
        (Names("Example", ("_here", "_gone"), Example), ["Example._gone"]),
        (Names("Example", ("_here",), lambda: Example()._gone), ["Example._here"]),
    ],
)
def test_what_is_missing_is_named(names, missing):
    assert names.missing() == missing


def test_the_error_names_what_is_missing_the_release_and_the_range():
    with pytest.raises(UnsupportedTorchError) as caught:
        check([Names("torch._ops", ("OpOverload", "_gone")), Names("torch._absent", ())])
    error = caught.value
    assert (error.missing, error.found, error.supported) == (
        ("torch._ops._gone", "torch._absent"),
        torch.__version__,
        SUPPORTED_TORCH,
    )
    assert (
        str(error) == f"install torch{SUPPORTED_TORCH}: torch {torch.__version__} does not have torch._ops._gone, torch._absent"
    )


PROGRAM = """
import os, sys, torch
for removed in sys.argv[1:]:  # torch takes long to import: each is taken away in a fork of one process
    if os.fork():
        os.wait()
        continue
    exec(removed)
    import planner
    try:
        planner.plan
    except planner.UnsupportedTorchError as error:
        print(error, flush=True)
    os._exit(0)
"""
REMOVED = {
    "torch.fx.graph._BoxedCodeGen": "del torch.fx.graph._BoxedCodeGen",
    "torch._C._current_graph_task_id": "del torch._C._current_graph_task_id",
    "torch._functorch.aot_autograd": "sys.modules['torch._functorch.aot_autograd'] = None",
    "torch.library.Library._destroy": "del torch.library.Library._destroy",
    "torch.fx.GraphModule._graph": "torch.fx.GraphModule.graph = property(None, lambda self, graph: None)",
}


def test_importing_the_package_on_another_torch_says_what_is_missing():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *REMOVED.values()]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = run.stdout.splitlines()
    assert len(said) == len(REMOVED), run.stdout + run.stderr
    for name, line in zip(REMOVED, said, strict=True):
        assert line.startswith(f"install torch{SUPPORTED_TORCH}: ") and name in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's about torch's own code
def test_the_names_of_inductor_are_there():
    check(INDUCTOR)


def test_the_range_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"torch{SUPPORTED_TORCH}" in project["dependencies"]


def dotted_private_names(tree: ast.AST) -> Iterator[str]:
    """Names taken from private modules of torch, private names taken from public ones, and private parts written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and "(" not in ast.unparse(node):
            yield ast.unparse(node)


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    return parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts[1:])


@pytest.mark.parametrize("path", sorted((ROOT / "planner" / "_compat").glob("*.py")), ids=lambda path: path.stem)
def test_every_dotted_private_name_is_listed(path):
    modules = {names.home for names in (*REQUIRED, *INDUCTOR, *OPTIONAL)}
    above = {module.rsplit(".", i)[0] for module in modules for i in range(module.count(".") + 1)}
    found = {name for name in dotted_private_names(ast.parse(path.read_text(encoding="utf-8"))) if is_private(name)}
    unlisted = [name for name in found if name not in LISTED | above and not any(name.startswith(f"{one}.") for one in LISTED)]
    assert unlisted == []


def test_every_private_attribute_is_listed():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    attributes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    private = [(path, node) for path, node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")]
    own = {node.attr for _, node in private if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")}
    for tree in trees.values():
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {
            node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    listed = {part for name in LISTED for part in name.split(".")}
    aten = ("torch.ops.", "aten.")
    unlisted = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, node in private
        if node.attr not in own | listed | OF_PYTHON
        and not ast.unparse(node).startswith(aten)
        and ast.unparse(node.value) not in ("self", "cls")
    }
    assert unlisted == set()


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x):
        return (self.model(x).sum(),)


def test_a_joint_graph_tells_its_inputs_and_results_apart():
    joint = export_joint(Loss(), fake_inputs([torch.zeros(2, 3)]))
    nodes = results(joint.graph_module.graph)
    assert {role[0] for role in joint.inputs} == {"param", "buffer", "input", "tangent"}
    assert sum(role[0] == "mutation" for role in joint.outputs) == 3, "batch norm updates three buffers"
    gradients = [node for role, node in zip(joint.outputs, nodes, strict=True) if role[0] == "gradient"]
    assert sum(node is not None for node in gradients) == 4, "one of each parameter"
    assert all(isinstance(node.meta["val"], FakeTensor) for node in nodes if node is not None)


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (torch.ones(2), True),
        (torch.zeros(3), False),
        (torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(4)[::2], False),
        (torch.zeros(2, requires_grad=True), False),
    ],
)
def test_tensors_are_compared_by_their_metadata(other, alike):
    assert tensors_alike([torch.zeros(2)])([other]) is alike


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


def test_calls_of_modules_are_intercepted_outermost_first_and_only_while_entered():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    seen = []

    def handle(module, name, args, kwargs, run):
        seen.append(name)
        return run()

    x = torch.randn(3, 2)
    expected = model(x)
    names = {module: name for name, module in model.named_modules() if name in ("0", "0.0")}
    with calls_intercepted(names, handle):
        assert torch.equal(model(x), expected)
    model(x)
    assert seen == ["0"], f"torch {torch.__version__}: nn.Module.__call__ is no longer where calls of modules go through"
