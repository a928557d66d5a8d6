"""Writes into tensors that are not laid out plainly: the trace keeps the layout, as kernels and their bits depend on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from planner import CaptureError, plan
from tests.support.training import assert_same, trajectory

N = 16
MASK = torch.eye(N, dtype=torch.bool)
ROWS = torch.tensor([2, 5])
ZEROS = torch.zeros(N, N, dtype=torch.long)
WRITES = {
    "masked_fill_": lambda x: x.masked_fill_(MASK, 0.5),
    "masked_scatter_": lambda x: x.masked_scatter_(MASK, torch.ones(N)),
    "tril_": lambda x: x.tril_(),
    "cumsum_": lambda x: x.cumsum_(0),
    "index_add_": lambda x: x.index_add_(0, ROWS, torch.ones(2, N)),
    "scatter_add_": lambda x: x.scatter_add_(0, ZEROS, torch.ones(N, N)),
    "renorm_": lambda x: x.renorm_(2, 0, 1.0),
    "addmm_": lambda x: x.addmm_(torch.ones(N, 3), torch.ones(3, N)),
    "addr_": lambda x: x.addr_(torch.ones(N), torch.ones(N)),
    "baddbmm_": lambda x: x.unsqueeze(0).baddbmm_(torch.ones(1, N, 3), torch.ones(1, 3, N)),
    "bernoulli_": lambda x: x.mul_(1.0 + torch.empty_like(x).bernoulli_(0.5)),
    "dropout": lambda x: nn.functional.dropout(x, 0.3, inplace=True),
    "rrelu_": lambda x: nn.functional.rrelu_(x, training=True),
    "fill_diagonal_": lambda x: x.fill_diagonal_(0.5),
    "add_": lambda x: x.add_(0.5),
    "copy_": lambda x: x.copy_(torch.ones(N, N)),
    "an item": lambda x: x.__setitem__(0, 0.5),
    "items of a mask": lambda x: x.__setitem__(MASK, 0.5),
    "items of indices": lambda x: x.__setitem__(ROWS, 0.5),
    "a column of it": lambda x: x[:, 1:3].cumsum_(0),
    "a transpose of it": lambda x: x.t().tril_(),
    "its diagonal": lambda x: x.diagonal().cumsum_(0),
    "a view of it": lambda x: x.t().view(-1).masked_fill_(MASK.view(-1), 0.5),
    "a half of it": lambda x: x.chunk(2)[1].masked_fill_(MASK[: N // 2], 0.5),
    "out": lambda x: torch.mul(x.detach(), 2.0, out=torch.empty(N, N).t()),
    "transposed in place": lambda x: x.t_().tril_(),
    "twice": lambda x: x.tril_().cumsum_(1),
}
LAYOUTS = {
    "transposed": lambda x, w: x.mT * w,
    "a view": lambda x, w: (x * w).mT,
    "with gaps": lambda x, w: (x * w).repeat(1, 2)[:, ::2],
}


VIEWS = ("a view", "with gaps")
REFUSED = {
    "fill_diagonal_": r"test_in_place_layouts\.py:\d+ writes into a tensor by way of as_strided .*clone\(\)",
    "transposed in place": r"test_in_place_layouts\.py:\d+ writes into memory that a view shares .* use t\(\)",
}


class Written(nn.Module):
    """Writes into an activation, and reads it by kernels whose bits depend on the layout."""

    def __init__(self, layout: str, write: str) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(4, N), nn.Parameter(torch.tensor(0.3))
        self.layout, self.write = layout, write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distances = LAYOUTS[self.layout](torch.cdist(*[torch.tanh(self.a(x))] * 2), self.scale)
        made = WRITES[self.write](distances)
        kernel = torch.exp(-distances) + 4 * torch.eye(N)
        lower = torch.linalg.cholesky(kernel @ kernel.mT)
        total = lower.sum() + kernel.sum(0).square().sum() + (kernel @ kernel).std()
        return total + (made @ made).mean() if self.write == "out" else total


@pytest.mark.one_in(6)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_tensor_of_any_layout(write: str, layout: str) -> None:
    torch.manual_seed(0)
    model, x = Written(layout, write), torch.randn(N, 4)
    try:
        expected = trajectory(copy.deepcopy(model), (x,), {})
    except RuntimeError as error:
        pytest.skip(f"eager does not train: {error}")
    if write in REFUSED and layout in VIEWS:
        with pytest.raises(CaptureError, match=REFUSED[write]):
            plan(model, 1.0, (x,), costs="estimate", progress=False)
        return
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert planned.mismatch((x,), {}) is None
    assert_same(expected, trajectory(planned, (x,), {}))
