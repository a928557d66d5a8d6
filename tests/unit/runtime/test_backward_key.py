"""Gradients of outputs in every layout, and through some of the outputs: bit-equal to eager, within the budget."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import BackwardError, plan
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from planner.rewriter.reschedule import reschedule
from planner.runtime import other_backwards
from tests.support.training import assert_same


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, ids):
        return self.head(F.gelu(self.inner(self.embed(ids))))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


class Normalized(Convolution):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(super().forward(x))


class Broadcast(nn.Module):
    """Additions and products whose gradients are sums over broadcast dimensions."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.bias, self.scale = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.randn(5, 1, 12))

    def forward(self, x):
        return torch.tanh(self.inner(x)) * self.scale + self.bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


class Dropped(nn.Module):
    """Deep enough to be recomputed, with random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(F.gelu(layer(x))), 0.3, self.training)
        return x


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(F.gelu(layer(x)))
        return x


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 10)), lambda: torch.randn(9, 16)),
    "language model": (LanguageModel, lambda: torch.randint(0, 50, (4, 6))),
    "convolution": (Convolution, lambda: torch.randn(2, 3, 8, 10)),
    "batch norm": (Normalized, lambda: torch.randn(3, 3, 6, 8)),
    "broadcast": (Broadcast, lambda: torch.randn(5, 7, 12)),
    "attention": (Attention, lambda: torch.randn(2, 6, 16)),
    "dropout": (Dropped, lambda: torch.randn(4, 8, 16)),
    "mlp": (Mlp, lambda: torch.randn(6, 8, 16)),
}
RECOMPUTED = {"dropout": 0.7, "mlp": 0.7}


def permuted(weights, order):
    """`weights` in another order of dimensions in memory."""
    back = [order.index(i) for i in range(len(order))]
    return weights.permute(order).contiguous().permute(back)


def dense(out, memory_format=torch.contiguous_format):
    return torch.linspace(-1, 1, out.numel()).reshape(out.shape).contiguous(memory_format=memory_format)


LAYOUTS = {
    "contiguous": dense,
    "expanded by sum": lambda out: torch.tensor(0.5).expand(out.shape),
    "mean over one dimension": lambda out: (dense(out).select(1, 0) / out.shape[1]).unsqueeze(1).expand(out.shape),
    "broadcast along the first": lambda out: dense(out)[:1].expand(out.shape),
    "broadcast along the last": lambda out: dense(out)[..., :1].expand(out.shape),
    "transposed": lambda out: permuted(dense(out), [*range(out.dim() - 2), out.dim() - 1, out.dim() - 2]),
    "permuted": lambda out: permuted(dense(out), [*range(1, out.dim()), 0]),
    "channels last": lambda out: permuted(dense(out), [0, *range(2, out.dim()), 1]),
    "sliced": lambda out: dense(torch.cat([out, out], -1))[..., : out.shape[-1]],
    "strided": lambda out: dense(torch.cat([out, out], -1))[..., ::2],
}


def planned_and_twin(name, **options):
    torch.manual_seed(0)
    build, make = MODELS[name]
    model, x = build(), make()
    twin = copy.deepcopy(model)
    module = plan(model, RECOMPUTED.get(name, 1.0), (x,), costs="estimate", progress=False, effort=2.0, **options)
    return module, twin, x


def step(module, args, backward, seed=3):
    """Everything that a step leaves behind."""
    module.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = module(*args)
        backward(out)
        state = torch.get_rng_state()
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [*(o.detach().clone() for o in outs), *grads, *(b.clone() for b in module.buffers()), state]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_of_a_gradient_trains_as_eager_does(name):
    module, twin, x = planned_and_twin(name)
    for layout, make in LAYOUTS.items():
        backward = lambda out, make=make: out.backward(make(out))
        for _ in range(2):  # captured, then remembered
            try:
                assert_same(step(twin, (x,), backward), step(module, (x,), backward))
            except AssertionError as error:
                raise AssertionError(f"{layout}: {error}") from error


def test_the_plans_that_should_recompute_do():
    for name in RECOMPUTED:
        assert planned_and_twin(name)[0].plan.solution.schedule.recomputes()


def resident(module, *tensors):
    return sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers(), *tensors))


class Wide(nn.Module):
    """An MLP whose activations outweigh its parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(F.gelu(layer(x)))
        return x


class WideConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(F.gelu(layer(x)))
        return x


MEASURED = {
    "mlp": (Wide, lambda: torch.randn(16, 64, 64), 0.6),
    "convolution": (WideConvolution, lambda: torch.randn(4, 8, 32, 32), 0.7),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MEASURED)
def test_the_measured_peak_is_within_the_budget_in_every_layout(name, layout):
    torch.manual_seed(0)
    build, make, fraction = MEASURED[name]
    model, x = build(), make()
    least = plan(model, fraction, (x,), progress=False, effort=2.0)
    module = plan(model, int(least.plan.budget_bytes * 1.15), (x,), progress=False, effort=2.0)  # bytes: no other step's
    assert module.plan.solution.schedule.recomputes()
    gradient = LAYOUTS[layout](module(x).detach())
    for _ in range(2):
        module.zero_grad()
        peak = logical_peak(lambda: module(x).backward(gradient), module.device)
        assert resident(module, x) + gradient.untyped_storage().nbytes() + peak <= module.plan.budget_bytes


class Tasks(nn.Module):
    """Two heads on one trunk; the second has dropout of its own."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2)) for _ in range(4)])
        self.a, self.b = nn.Linear(16, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x):
        h = self.trunk(x)
        return self.a(h), self.b(h), h


def tasks(budget=0.8, **options):
    torch.manual_seed(0)
    model, x = Tasks(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    return plan(model, budget, (x,), costs="estimate", progress=False, effort=2.0, **options), twin, x


PARTS = {
    "first": lambda a, b, h: a.square().sum(),
    "second": lambda a, b, h: b.sum(),
    "trunk": lambda a, b, h: h.mean(),
    "both heads": lambda a, b, h: a.sum() + b.square().mean(),
    "all": lambda a, b, h: a.square().sum() + b.square().sum() + (h * h).sum(),
}


@pytest.mark.parametrize("part", PARTS)
def test_backward_through_some_outputs_equals_eager(part):
    module, twin, x = tasks()
    for _ in range(2):
        assert_same(*(step(each, (x,), lambda out: PARTS[part](*out).backward()) for each in (twin, module)))


def test_bytes_that_are_set_aside_count_in_every_backward(monkeypatch):
    seen = []
    monkeypatch.setattr(other_backwards, "reschedule", lambda graph, *rest: seen.append(graph) or reschedule(graph, *rest))
    module, _, x = tasks(reserve=12345)
    module(x)[0].sum().backward()
    aside = [value for value in module.plan.graph.values if value.kind is Kind.RESERVED]
    (graph,) = seen
    assert [value.nbytes for value in aside] == [12345]
    assert [value for value in graph.values if value.kind is Kind.RESERVED] == aside and aside[0].name in graph.inputs


def test_what_is_not_reached_gets_no_gradient():
    module, _, x = tasks()
    module(x)[0].sum().backward()
    assert all(p.grad is None for p in module.b.parameters())
    assert all(p.grad is not None for p in (*module.a.parameters(), *module.trunk.parameters()))


@pytest.mark.parametrize("num_stages", [1, 4])
def test_gradients_of_each_task_from_one_forward(num_stages):
    module, twin, x = tasks(num_stages=num_stages)
    found = []
    for each in (twin, module):
        torch.manual_seed(1)
        shared = list(each.trunk.parameters())
        for _ in range(2):
            a, b, h = each(x)
            losses = (a.square().sum(), b.square().sum(), h.sum())
            for loss in losses:
                found += torch.autograd.grad(loss, shared, retain_graph=True)
            found += torch.autograd.grad(sum(losses), shared, retain_graph=True)
            found += torch.autograd.grad(losses[0], [*each.a.parameters(), shared[0]])
    assert_same(found[: len(found) // 2], found[len(found) // 2 :])


def test_a_part_that_is_not_reached_is_none_for_autograd_too():
    module, _, x = tasks()
    a, _, _ = module(x)
    assert torch.autograd.grad(a.sum(), list(module.b.parameters()), allow_unused=True, retain_graph=True) == (None, None)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(a.sum(), list(module.b.parameters()))


def test_a_hook_that_eager_would_not_call_is_refused_by_name():
    module, _, x = tasks()
    handle = module.b[1].weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(BackwardError, match=r"b\.1\.weight.*hook"):
        module(x)[0].sum().backward()
    handle.remove()
    module(x)[0].sum().backward()


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU()), nn.Linear(16, 9)

    def forward(self, x, y):
        logits = self.head(self.body(x))
        return logits, F.cross_entropy(logits, y)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("loss", [None, 1])
@pytest.mark.parametrize(
    "backward",
    [
        lambda out: out[1].backward(),
        lambda out: out[0].square().sum().backward(),
        lambda out: (out[1] + out[0].logsumexp(-1).square().mean()).backward(),
        lambda out: out[0].sum().backward(),
    ],
    ids=["loss", "logits", "both", "sum of logits"],
)
def test_logits_and_loss(backward, loss):
    torch.manual_seed(0)
    model, x, y = Losses(), torch.randn(40, 16), torch.randint(0, 9, (40,))
    twin = copy.deepcopy(model)
    module = plan(model, 1.0, (x, y), loss=loss, costs="estimate", progress=False, effort=2.0)
    assert_same(*(step(each, (x, y), backward) for each in (twin, module)))


def test_an_output_that_the_plan_saved_nothing_for_is_refused_with_the_cure():
    module, _, x = tasks(loss=0)
    with pytest.raises(BackwardError, match=r"(?s)loss="):
        module(x)[1].sum().backward()
    module(x)[0].sum().backward()  # the plan itself still works


def test_bytes_that_no_schedule_can_do_with_are_refused_with_numbers():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 512)), torch.randn(8, 16, 64)
    module = plan(model, int(plan(model, 1.0, (x,), progress=False).plan.peak_bytes * 1.05), (x,), progress=False)
    transposed = LAYOUTS["transposed"](module(x).detach())
    with pytest.raises(BackwardError, match=r"more than the budget of .* budget=(\d+) would do") as caught:
        module(x).backward(transposed)
    enough = int(str(caught.value).split("budget=")[1].split()[0])
    assert all(p.grad is None for p in model.parameters())
    plan(model, enough, (x,), progress=False)(x).backward(transposed)


def test_first_use_is_logged_once(caplog):
    module, _, x = planned_and_twin("linear")
    with caplog.at_level(logging.INFO, "planner"):
        for _ in range(3):
            module(x).sum().backward()
    assert [record.levelname for record in caplog.records if record.name == "planner.runtime"] == ["INFO"]


def test_strides_that_no_kernel_reads_are_not_another_key(caplog):
    model, x = nn.Linear(4, 3), torch.randn(1, 4)
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    with caplog.at_level(logging.INFO, "planner"):
        module(x).backward(torch.ones(1, 3).as_strided((1, 3), (77, 1)))
    assert not [record for record in caplog.records if record.name == "planner.runtime"]


def test_many_keys_come_and_go():
    module, twin, x = planned_and_twin("linear")
    for stride in [*range(1, 11), 1]:
        make = lambda out, stride=stride: torch.ones(*out.shape[:-1], out.shape[-1] * stride)[..., ::stride]
        assert_same(*(step(each, (x,), lambda out, make=make: out.backward(make(out))) for each in (twin, module)))


def test_a_plan_that_was_pickled_and_a_copy_capture_again_too():
    module, twin, x = planned_and_twin("dropout")
    for each in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert_same(*(step(m, (x,), lambda out: out.sum().backward()) for m in (twin, each)))


def test_the_model_and_the_random_state_stay_as_they_are():
    module, _, x = planned_and_twin("batch norm")
    out = module(x)
    before = [*(b.clone() for b in module.buffers()), torch.get_rng_state()]
    out.sum().backward()
    assert_same(before, [*module.buffers(), torch.get_rng_state()])


class Recurrent(nn.Module):
    """Has a part that runs as it is, with dropout in front of it."""

    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.first(x)), 0.3, self.training)
        h, _ = self.lstm(h)
        return self.last(torch.tanh(h)), h


@pytest.mark.parametrize("part", ["sum", "transposed", "opaque"])
def test_opaque_modules_take_part(part):
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(4, 6, 8)
    twin = copy.deepcopy(model)
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    backward = {
        "sum": lambda out: (out[0].sum() + out[1].square().sum()).backward(),
        "transposed": lambda out: torch.autograd.backward(out, [LAYOUTS["transposed"](o) for o in out]),
        "opaque": lambda out: out[1].sum().backward(),
    }[part]
    for _ in range(2):
        assert_same(*(step(each, (x,), backward) for each in (twin, module)))


def test_a_model_changed_between_forward_and_backward_is_refused():
    class Scaled(Mlp):
        scale = 2.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model, x = Scaled(), torch.randn(6, 8, 16)
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    out = module(x)
    model.scale = 3.0
    with pytest.raises(BackwardError, match="changed between"):
        out.sum().backward()
    del out
    model.scale = 2.0
    module(x).sum().backward()  # this one is as planned


def test_a_second_derivative_is_still_refused():
    module, _, x = tasks()
    with pytest.raises(BackwardError, match="create_graph"):
        torch.autograd.grad(module(x)[0].sum(), list(module.a.parameters()), create_graph=True)


def test_autocast_is_captured_again():
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(6, 8, 16)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        module = plan(model, 1.0, (x,), costs="estimate", progress=False)

    def under_autocast(each):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return each(x)

        call.zero_grad, call.parameters, call.buffers = each.zero_grad, each.parameters, each.buffers
        return call

    for make in LAYOUTS.values():
        backward = lambda out, make=make: out.backward(make(out.float()).to(out.dtype))
        assert_same(*(step(under_autocast(each), (x,), backward) for each in (twin, module)))


class Reads(Mlp):
    """Branches on a tensor's value."""

    def forward(self, x):
        h = super().forward(x)
        return h * 2 if (x.sum() > -1e9).item() else h


def test_host_reads_are_answered_without_running_the_model():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(6, 8, 16)
    twin = copy.deepcopy(model)
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert_same(*(step(each, (x,), lambda out: out.sum().backward()) for each in (twin, module)))


class _Transposed(nn.Module):
    """Batch norm of transposed activations, which come out as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.b(torch.sigmoid(h) * 2), torch.tanh(h) * 2


@pytest.mark.parametrize("costs", ["estimate", "measure"])
def test_another_backward_follows_real_strides_in_mixed_precision(costs):
    def gradients(is_planned: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), _Transposed()), torch.randn(4, 5, 8)
        with torch.autocast("cpu", torch.bfloat16):
            module = plan(model, 1 << 20, (x,), progress=False, costs=costs) if is_planned else model
            out = module(x)
        sum(leaf.abs().square().mean().float() for leaf in out).backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


@pytest.mark.parametrize("laid_out_alike", [True, False])
def test_a_view_that_was_written_into(laid_out_alike):
    """Eager makes the view's node anew: a gradient in the view's layout arrives as before, another one otherwise."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)
            return self.b(torch.sigmoid(h) * 2), h

    def gradients(is_planned: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, x = Net(), torch.randn(4, 5, 8)
        module = plan(model, 1 << 20, (x,), progress=False, costs="estimate") if is_planned else model
        out = module(x)
        given = [torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape) for leaf in out]
        if laid_out_alike:
            given = [torch.empty_like(leaf).copy_(gradient) for leaf, gradient in zip(out, given, strict=True)]
        with torch.no_grad():
            out[1].mul_(3)
        torch.autograd.backward(out, given)
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(False)
    if laid_out_alike:
        assert all(map(torch.equal, expected, gradients(True)))
    else:
        with pytest.raises(BackwardError, match="Write into a copy"):
            gradients(True)


class TwoHalves(nn.Module):
    """Runs as it is; a backward of one of its outputs does not reach the weights of the other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.left(x), self.right(x)


def test_a_hook_never_gets_none_where_an_opaque_module_finds_no_gradient():
    model = nn.Sequential(TwoHalves())
    planned = plan(
        model, 1.0, (torch.randn(3, 4),), opaque=("0",), loss=lambda out: list(out), costs="estimate", progress=False
    )
    seen = []
    model[0].right.weight.register_hook(seen.append)
    left, _ = planned(torch.randn(3, 4))
    with pytest.raises(BackwardError, match=r"does not reach 0\.right\.weight, which has a tensor hook"):
        left.sum().backward()
    assert not seen
    sum(out.sum() for out in planned(torch.randn(3, 4))).backward()
    assert len(seen) == 1


class TwoLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, tokens, targets):
        logits = self.head(torch.tanh(self.embed(tokens)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits.square().mean()


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("pick", [lambda out: out[1], lambda out: out[1] + out[2]], ids=["one", "both"])
def test_other_backwards_of_a_call_whose_inputs_are_views_of_one_tensor(pick, pickled):
    model, data = TwoLosses(), torch.randint(16, (4, 9))
    call = data[:, :-1], data[:, 1:]
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, call, progress=False, costs="estimate")
    if pickled:
        planned = pickle.loads(pickle.dumps(planned))
    for module in (planned, twin):
        pick(module(*call)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(planned.parameters(), twin.parameters(), strict=True))


class EqualConstants(nn.Module):
    """Makes equal constants several times, each of which the graph has for itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        h = self.inner(x)
        for _ in range(3):
            h = h * torch.tensor([0.5], requires_grad=True) + torch.tensor([0.5])
        return h.relu(), h.exp()


def test_equal_constants_are_told_apart_when_the_forward_is_traced_again():
    model, x = EqualConstants(), torch.randn(4, 6)
    eager = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), loss=lambda out: out[:1], progress=False)
    for module in (planned, eager):
        first, second = module(x)
        (first.sum() + second.sum()).backward()
    assert torch.equal(planned.inner.weight.grad, eager.inner.weight.grad)
