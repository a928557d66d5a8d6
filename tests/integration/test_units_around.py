"""Units planned around what no whole plan holds: sparse tensors, backwards in the forward, transforms of torch.func."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from planner import CaptureError, plan, plan_units
from planner.composite.trial import Trial
from tests.support.training import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant)")  # torch's, where it makes the first one
INTERNALS = re.compile(r"TensorImpl|layout_impl|shape_env|Backward0")
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
}


class Mixing(nn.Module):
    """Mixes rows by a sparse matrix that it holds, or gets."""

    def __init__(self, held: torch.Tensor | None, *, is_buffer: bool = False) -> None:
        super().__init__()
        if is_buffer:
            self.register_buffer("matrix", held)
        else:
            self.matrix = held

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        matrix = self.matrix if given is None else given
        return matrix @ x


class Net(nn.Module):
    def __init__(self, mixing: Mixing) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.mixing = mixing
        self.last = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return self.last(self.mixing(self.first(x), *given)).square().sum()


def made(layout: str, where: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model with its matrix in this place, and a call; twice the same (torch copies few sparse tensors)."""
    torch.manual_seed(0)
    matrix = LAYOUTS[layout]((torch.rand(256, 256) > 0.98).float())
    held = None if where == "input" else matrix
    model = Net(Mixing(held, is_buffer=where == "buffer"))
    return model, (torch.randn(256, 16), *([matrix] if where == "input" else []))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("where", "name"), [("buffer", "mixing.matrix"), ("attribute", "mixing.matrix"), ("input", "input 1")])
def test_units_are_planned_around_it(layout: str, where: str, name: str) -> None:
    model, args = made(layout, where)
    with pytest.raises(CaptureError, match=rf"^{name} is a sparse_{layout} tensor: .*planner\.plan_units plans"):
        plan(model, 0.9, args, progress=False)
    units = plan_units(model, 0.85, args, progress=False)
    assert sorted(units.planned) == ["first", "last"]
    assert any(unit.executable.recomputes for unit in units.planned.values())
    model(*args).backward()
    assert not sum(unit.num_unplanned_calls for unit in units.planned.values())
    eager, again = made(layout, where)
    eager(*again).backward()
    assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])
    assert units.verify(args).exact


@pytest.mark.parametrize(
    ("layout", "nbytes"), [("coo", 8 * (2 * 8 + 4)), ("csr", 9 * 8 + 8 * (8 + 4)), ("csc", 9 * 8 + 8 * (8 + 4))]
)
def test_resident_bytes_count_indices_and_values(layout: str, nbytes: int) -> None:
    """Of eight entries: a value, and two indices or one; nine borders of rows or columns."""
    model, args = made("coo", "attribute")
    without = Trial(model, args, {}, None).resident_bytes
    model.register_buffer("more", LAYOUTS[layout](torch.eye(8)))
    assert Trial(model, args, {}, None).resident_bytes - without == nbytes


def test_steps_are_measured_on_other_data_beside_a_sparse_input() -> None:
    model, args = made("csr", "input")
    step = Trial(model, args, {}, None).step
    before = [tensor.clone() for tensor in step.inputs]
    step.draw_inputs(1)
    assert not torch.equal(step.inputs[0], before[0])
    assert torch.equal(step.inputs[1].to_dense(), before[1].to_dense())


class Divergence(nn.Module):
    """Takes a Jacobian of its inner net in the forward, all rows at once, as continuous flows do."""

    def __init__(self, *, is_twice: bool) -> None:
        super().__init__()
        self.is_twice = is_twice
        self.inner = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        self.last = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        y = self.inner(x)
        rows = torch.eye(4).unsqueeze(1).expand(4, *y.shape)
        twice = {"create_graph": True} if self.is_twice else {"retain_graph": True}
        (jacobian,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, **twice)
        return self.last(y).square().sum() + torch.einsum("i...i->", jacobian)


@pytest.mark.parametrize(("is_twice", "reason"), [(True, "create_graph=True"), (False, "is_grads_batched=True")])
def test_units_are_planned_around_backwards_in_the_forward(is_twice: bool, reason: str) -> None:
    torch.manual_seed(0)
    model, eager = Divergence(is_twice=is_twice), Divergence(is_twice=is_twice)
    eager.load_state_dict(model.state_dict())
    x = torch.randn(8, 4)
    units = plan_units(model, 1.0, (x,), progress=False)
    assert list(units.planned) == ["last"]
    assert units.left.keys() >= {"inner.0", "inner.2"}
    assert reason in units.left["inner.0"]
    model(x).backward()
    eager(x.detach().clone()).backward()
    assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])


class Words(nn.Module):
    """Looks words up several times; the gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, sparse=True)
        self.first = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.last = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        words = self.words(ids) + self.words(ids.flip(0)) * self.words(ids.flip(1))
        return self.last(self.first(words)).square().sum()


@pytest.mark.parametrize("how", [plan, plan_units])
def test_gradients_that_are_sparse_sums(how: Callable[..., object]) -> None:
    torch.manual_seed(0)
    model, eager, ids = Words(), Words(), torch.randint(50, (32, 8))
    eager.load_state_dict(model.state_dict())
    planned = how(model, 0.85, (ids,), progress=False)  # what the first block saves is alive in the backward of the last
    run = planned if how is plan else model
    run(ids).backward()
    eager(ids).backward()
    assert model.words.weight.grad.layout is torch.sparse_coo
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    assert_same(*zip(*((a.grad.to_dense(), b.grad.to_dense()) for a, b in pairs), strict=True))


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "vmap": lambda block, x: torch.vmap(block)(x),
    "jvp": lambda block, x: torch.func.jvp(block, (x,), (x,))[1],
    "jacrev": lambda block, x: torch.vmap(torch.func.jacrev(block))(x).sum(1),
    "grad": lambda block, x: torch.vmap(torch.func.grad(lambda row: block(row).sum()))(x),
}


class Transformed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](TRANSFORMS[self.name](self.blocks[0], x) + self.blocks[1](x)).sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of jvp
@pytest.mark.parametrize("name", TRANSFORMS)
def test_units_are_planned_around_transforms_of_torch_func(name: str) -> None:
    torch.manual_seed(0)
    model, eager, x = Transformed(name), Transformed(name), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    units = plan_units(model, 1.0, (x,), progress=False)
    assert sorted(units.planned) == ["blocks.1", "blocks.2"]
    assert "torch.func" in units.left["blocks.0.0"]
    model(x).backward()
    eager(x).backward()
    trained = [name for name, p in eager.named_parameters() if p.grad is not None]
    assert trained == [name for name, p in model.named_parameters() if p.grad is not None]
    assert_same(*([run.get_parameter(name).grad for name in trained] for run in (eager, model)))


def by_a_sparse_matrix(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return (net.first[0].weight.detach().to_sparse() @ y.T).T[:, :16]


def by_compressed_rows(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return (net.first[0].weight.detach().to_sparse_csr() @ y.T).T[:, :16]


def by_sparse_values(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    matrix = torch.sparse_coo_tensor(torch.arange(16).expand(2, 16), net.last[2].bias, (16, 16))
    return (matrix @ y.T).T


def by_nested_rows(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    rows = torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(5, 16)], layout=torch.jagged)
    return y + net.first(rows).values().sum()


def by_nested_rows_with_strides(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return y + net.first[0](torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(5, 16)])).to_padded_tensor(0.0).sum()


class MakesOthers(nn.Module):
    """Makes tensors of another layout in its forward."""

    def __init__(self, way: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.last = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.way(self, x)).square().sum()


WAYS = [by_a_sparse_matrix, by_compressed_rows, by_sparse_values, by_nested_rows, by_nested_rows_with_strides]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_tensors_of_other_layouts_in_the_forward(way: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    model, eager, x = MakesOthers(way), MakesOthers(way), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    with pytest.raises(CaptureError) as refused:
        plan(model, 1.0, (x,), progress=False)
    assert not INTERNALS.search(str(refused.value)), refused.value
    plan_units(model, "1MiB", (x,), progress=False)
    model(x).backward()
    eager(x).backward()
    trained = [name for name, p in eager.named_parameters() if p.grad is not None]
    assert_same(*([run.get_parameter(name).grad for name in trained] for run in (eager, model)))
