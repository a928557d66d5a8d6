"""CheckpointedModule as users meet it: drop-in, guarded, copied, pickled, misused."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import BackwardError, CheckpointedModule, InfeasibleBudgetError, MismatchWarning, plan, profile, verify
from planner.kernels import custom
from planner.runtime.module import CheckpointedModule as Module
from planner.tracer.passes.draw_as_eager import draw_as_eager
from planner.tracer.passes.graph import TracedGraph
from tests.support import models
from tests.support.training import assert_same, trajectory


def planned(name, budget=0.9, **options):
    model, args, kwargs = models.build(name)
    return plan(model, budget, args, kwargs, costs="estimate", progress=False, **options), model, args, kwargs


@pytest.fixture(params=["attention", "convolution", "tied"])
def made(request):
    return planned(request.param, 1.0 if request.param == "tied" else 0.9)


def test_is_a_graph_module_with_the_models_own_tensors(made):
    module, model, _, _ = made
    assert isinstance(module, torch.fx.GraphModule) and isinstance(module, CheckpointedModule)
    assert list(module.state_dict()) == list(model.state_dict())
    assert [(n, id(p)) for n, p in module.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in module.named_buffers()] == [(n, id(b)) for n, b in model.named_buffers()]


def test_graphs_show_what_is_kept_and_what_is_recomputed():
    module, _, _, _ = planned("convolution", 0.8)
    assert module.plan.solution.schedule.recomputes()
    backward = module.backward_graph.python_code("self").src
    assert "_recomputed" in backward and "saved_" in backward
    assert "_recomputed" not in module.code


def test_training_is_exact_and_leaves_the_original_in_step(made):
    module, model, args, kwargs = made
    expected = trajectory(copy.deepcopy(model), args, kwargs)
    assert_same(expected, trajectory(module, args, kwargs))
    assert all(p is q for p, q in zip(module.parameters(), model.parameters(), strict=True))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("mode", ["eval", "no_grad", "shape", "argument", "unfrozen", "autocast"])
def test_other_calls_run_the_original_and_warn_once(mode):
    module, model, args, _ = planned("attention")
    expected_model = copy.deepcopy(model)
    x, context, key = args[0], torch.enable_grad(), mode
    if mode == "eval":
        module.eval(), expected_model.eval()
        key = "training mode"
    elif mode == "no_grad":
        context, key = torch.no_grad(), "grad mode"
    elif mode == "shape":
        x, key = torch.randn(3, 5, 8), "input 0"
    elif mode == "argument":
        key = "structure"
    elif mode == "unfrozen":
        module.body[0].out.weight.requires_grad_(False), expected_model.body[0].out.weight.requires_grad_(False)
        key = "body.0.out.weight"
    else:
        context = torch.autocast("cpu", torch.bfloat16)
    call = {"labels": torch.zeros_like(x)} if mode == "argument" else {}
    with context:
        is_evaluating = mode in ("eval", "no_grad")  # which is not worth a warning
        with nullcontext() if is_evaluating else pytest.warns(MismatchWarning, match=key):
            torch.manual_seed(1)
            found = module(x, **call)
        torch.manual_seed(1)
        expected = expected_model(x, **call)
        assert torch.equal(found["out"], expected["out"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(x, **call)  # no second warning


def test_returns_to_the_plan_after_eval(made):
    module, model, args, kwargs = made
    twin = copy.deepcopy(model)
    module.eval(), twin.eval()
    with torch.no_grad():
        module(*args, **kwargs), twin(*args, **kwargs)
    module.train(), twin.train()
    assert model.training and not module.mismatch(args, kwargs)
    assert_same(trajectory(twin, args, kwargs), trajectory(module, args, kwargs))


def test_deepcopy_owns_its_parameters(made):
    module, model, args, kwargs = made
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(module)
    assert isinstance(twin, Module) and not twin.mismatch(args, kwargs)
    expected = trajectory(copy.deepcopy(model), args, kwargs)
    assert_same(expected, trajectory(twin, args, kwargs))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_pickle_round_trip_trains_the_same(made):
    module, model, args, kwargs = made
    twin = pickle.loads(pickle.dumps(module))
    assert not twin.mismatch(args, kwargs) and twin.plan == module.plan
    assert twin.code == module.code
    assert_same(trajectory(copy.deepcopy(model), args, kwargs), trajectory(twin, args, kwargs))


def test_weights_are_looked_up_at_call_time(made):
    module, model, args, kwargs = made
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    twin = copy.deepcopy(model)
    replaced = {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **replaced}, assign=True)
    if model.__class__ is models.Tied:  # assign=True has torn the tied tensors apart
        with pytest.warns(MismatchWarning, match="head.weight"):
            assert_same(trajectory(twin, args, kwargs)[:1], trajectory(module, args, kwargs)[:1])
    else:
        assert_same(trajectory(twin, args, kwargs), trajectory(module, args, kwargs))


def test_retain_graph_twice_equals_eager_and_a_third_backward_is_an_error(made):
    module, model, args, kwargs = made
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, module):
        torch.manual_seed(3)
        loss = each(*args, **kwargs)["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad.clone() for p in each.parameters() if p.grad is not None])
    assert_same(*grads)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*forwards wait")
def test_two_forwards_before_their_backwards():
    module, model, args, kwargs = planned("attention", 0.8)
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, module):
        torch.manual_seed(3)
        first, second = each(*args, **kwargs)["loss"], each(*args, **kwargs)["loss"]
        second.backward()
        first.backward()
        grads.append([p.grad.clone() for p in each.parameters()])
    assert_same(*grads)


def test_second_derivative_is_refused_before_anything_happens():
    module, _, args, kwargs = planned("mlp", 1.0)
    loss = module(*args, **kwargs)["loss"]
    with pytest.raises(BackwardError, match="create_graph"):
        torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    assert all(p.grad is None for p in module.parameters())


def test_backward_through_an_unplanned_output_equals_eager():
    module, model, args, kwargs = planned("mlp", 1.0)
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, module):
        torch.manual_seed(5)
        each(*args, **kwargs)["out"].sum().backward()
        grads.append([p.grad.clone() for p in each.parameters()])
    assert_same(*grads)


def test_loss_names_the_outputs_that_are_differentiated():
    model, args, kwargs = models.build("mlp")
    both = plan(model, 1.0, args, kwargs, loss=lambda out: [out["loss"], out["out"]], costs="estimate", progress=False)
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, both):
        torch.manual_seed(5)
        out = each(*args, **kwargs)
        (out["loss"] + out["out"].square().sum()).backward()
        grads.append([p.grad.clone() for p in each.parameters()])
    assert_same(*grads)


def test_writing_to_a_saved_parameter_before_backward_is_eagers_error(made):
    module, model, args, kwargs = made
    loss = module(*args, **kwargs)["loss"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_stream_in_stages():
    module, _, args, kwargs = planned("attention", 1.0, num_stages=4)
    order = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: order.append((name, sum(q.grad is None for q in module.parameters())))
        )
    module(*args, **kwargs)["loss"].backward()
    assert order[0][0].startswith("body.1") and order[-1][0].startswith("body.0")
    missing_at_first = order[0][1]
    assert missing_at_first >= len(list(module.parameters())) // 2  # the first gradient arrives long before the last


def test_partial_gradients_equal_eager():
    module, model, args, kwargs = planned("attention", 0.8, num_stages=4)
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, module):
        torch.manual_seed(2)
        wanted = [each.body[1].out.weight, each.body[0].norm.bias]
        grads.append(list(torch.autograd.grad(each(*args, **kwargs)["loss"], wanted)))
    assert_same(*grads)


def test_input_gradients_and_upstream_modules():
    model, _, _ = models.build("attention")
    x = torch.randn(2, 5, 8, requires_grad=True)
    module = plan(model, 0.8, (x * 1,), costs="estimate", progress=False)
    twin = copy.deepcopy(model)
    grads = []
    for each in (twin, module):
        torch.manual_seed(2)
        each(x * 1)["loss"].backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in each.parameters())])
        x.grad = None
    assert_same(*grads)


class ReadsValues(nn.Module):
    """Branches on a tensor's value, as transformers does on masks."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask):
        h = self.linear(x)
        return (h if mask.all() else h * mask).square().sum()


def test_host_reads_are_guarded():
    model, x = ReadsValues(), torch.randn(3, 4)
    module = plan(model, 1.0, (x, torch.ones(3, 4, dtype=torch.bool)), costs="estimate", progress=False)
    module(x, torch.ones(3, 4, dtype=torch.bool)).backward()
    mask = torch.tensor([True, False, True, True]).expand(3, 4).contiguous()
    with pytest.warns(MismatchWarning, match="value read at"):
        found = module(x, mask)
    assert torch.equal(found, copy.deepcopy(model)(x, mask))


class UnderAutocast(nn.Module):
    """Runs a module's forward, and no backward, under autocast."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*args, **kwargs)


def test_autocast_is_captured_and_exact():
    model, args, kwargs = models.build("attention")
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        module = plan(model, 0.85, args, kwargs, costs="estimate", progress=False)
    assert module.plan.solution.schedule.recomputes()
    assert_same(trajectory(UnderAutocast(twin), args, kwargs), trajectory(UnderAutocast(module), args, kwargs))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(*args, **kwargs)["loss"]
        with pytest.raises(BackwardError, match="inside autocast"):
            loss.backward()


class Dropped(nn.Module):
    """Dropout of one kind between two layers, of a tensor that need not be contiguous."""

    def __init__(self, drop, *, transposed=False):
        super().__init__()
        self.inner, self.outer, self.drop, self.transposed = nn.Linear(16, 16), nn.Linear(16, 4), drop, transposed

    def forward(self, x):
        x = self.inner(x)
        x = self.drop(x.transpose(1, 2)).transpose(1, 2) if self.transposed else self.drop(x)
        return {"loss": self.outer(x).float().square().sum(), "dropped": x}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.15, 0.5, 1.0])
def test_dropout_keeps_eagers_bits_for_every_p_dtype_and_layout(p, transposed, dtype):
    model, args = Dropped(nn.Dropout(p), transposed=transposed).to(dtype), (torch.randn(4, 6, 16, dtype=dtype),)
    module = plan(copy.deepcopy(model), 1.0, args, costs="estimate", progress=False)
    assert_same(trajectory(model, args, {}), trajectory(module, args, {}))


@pytest.mark.parametrize(
    "drop", [nn.Dropout1d(0.3), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.Dropout(0.3, inplace=True)], ids=str
)
def test_other_kinds_of_dropout_keep_eagers_bits(drop):
    model, args = Dropped(drop), (torch.randn(4, 6, 16),)
    module = plan(copy.deepcopy(model), 1.0, args, costs="estimate", progress=False)
    assert_same(trajectory(model, args, {}), trajectory(module, args, {}))


def test_a_plan_keeps_the_draws_of_dropout_and_makes_the_noise_again():
    """Drawing is dear and its result small; the noise is large and cheap."""
    model = models.Wrapped(nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Dropout(0.1)))))
    args = (torch.randn(512, 64),)
    module = plan(copy.deepcopy(model), 0.7, args, costs="estimate", progress=False)
    recomputed = [node for node in module.backward_graph.nodes if node.name.endswith("_recomputed")]
    assert any(node.target is custom.noise for node in recomputed)
    assert not any(node.target is custom.bernoulli for node in recomputed)
    assert any(node.meta["val"].dtype == torch.uint8 for node in module.backward_graph.find_nodes(op="placeholder"))
    assert_same(trajectory(model, args, {}), trajectory(module, args, {}))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.uint8), ("meta", torch.float32)])
def test_draws_become_bytes_only_where_every_dtype_draws_alike(device, dtype):
    graph = torch.fx.Graph()
    like = graph.placeholder("like")
    drawn = graph.call_function(torch.ops.aten.bernoulli.p, (like, 0.9))
    graph.output(graph.call_function(torch.ops.aten.div.Scalar, (drawn, 0.9)))
    like.meta["val"] = drawn.meta["val"] = torch.zeros(4, device=device)
    draw_as_eager(TracedGraph(graph, device=torch.device(device)))
    assert drawn.target is custom.bernoulli and drawn.args[3] == dtype
    assert bool(graph.find_nodes(op="call_function", target=custom.noise)) == (dtype == torch.uint8)


def test_functional_dropout_mask_and_inplace_input():
    class Mutating(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, counter):
            counter.add_(1)
            return F.relu(self.linear(x).mul_(2), inplace=True).sum() + counter.sum()

    model, x, counter = Mutating(), torch.randn(2, 4), torch.zeros(3)
    module = plan(model, 1.0, (x, counter), costs="estimate", progress=False)
    assert counter.eq(0).all()
    report = verify(module, (x, counter), rounds=1)
    assert report.exact, report
    assert counter.eq(0).all()
    module(x, counter)
    assert counter.eq(1).all()


@pytest.mark.parametrize("inside", [False, True])
def test_verify_runs_under_the_autocast_of_the_plan(inside):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        module = plan(net, 1.0, (x,), costs="estimate", progress=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        report = verify(module, (x,))
    assert report.exact and report.within_budget


def test_buffers_of_a_planned_model_can_be_swapped():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    for own, step in ((plain, plain), (model, module)):
        step(x).sum().backward()  # its gradient has other strides than planned: another backward is captured
        torch.utils.swap_tensors(own[1].running_mean, torch.full((8,), 2.0))
        step(x).sum().backward()
    assert_same([*plain.state_dict().values()], [*model.state_dict().values()])
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in model.parameters()])
    assert module.num_planned_calls == 2 and module.num_unplanned_calls == 0


def test_weights_can_be_swapped_after_a_refusal_and_beside_a_profiled_step():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
    with pytest.raises(InfeasibleBudgetError):
        plan(model, 1, (x,), costs="estimate", progress=False)
    profiled = profile(model, (x,), costs="estimate", progress=False)
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 2))
    assert profiled.plan(1.0)(x).requires_grad


def test_former_names_warn_and_work():
    module, _, args, kwargs = planned("attention", check=False)
    with pytest.warns(DeprecationWarning, match="CheckpointedModule.program is now called executable") as said:
        assert module.program is module.executable
    assert said[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="CheckpointedModule.difference is now called mismatch"):
        assert module.difference(args, kwargs) is None


def test_each_new_size_is_warned_of_once():
    module = plan(nn.Linear(4, 4), 1.0, (torch.randn(3, 4),), costs="estimate", progress=False, check=False)
    with pytest.warns(MismatchWarning) as said:
        for size in (1, 2, 1, 2):
            module(torch.randn(size, 4))
    assert len(said) == 2


def test_it_prints_its_plan_and_one_line_inside_of_another_model():
    planned = plan(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), 1.0, (torch.randn(4, 8),), costs="estimate")
    line, _, rest = str(planned).partition("\n\n")
    assert line == repr(planned) and line.startswith("CheckpointedSequential(planned for ") and "\n" not in line
    assert rest == str(planned.plan) and "def forward" in planned.code
    outer = repr(nn.Sequential(planned, nn.Linear(1, 1)))
    assert outer == f"Sequential(\n  (0): {line}\n  (1): {nn.Linear(1, 1)}\n)"


def test_attributes_that_hooks_and_loops_set_are_the_models():
    class Counted(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.a, self._own_calls = nn.Linear(4, 4), 0

        def forward(self, x):
            return torch.tanh(self.a(x))

    model = Counted()

    def count(module, *_):
        module.calls += 1
        module._own_calls += 1
        module.last = module._new = "seen"

    model.register_forward_hook(count)
    planned = plan(model, 1.0, (torch.randn(3, 4),), progress=False)
    for _ in range(3):
        planned(torch.randn(3, 4)).sum().backward()
        planned.zero_grad()
    assert (model.calls, model._own_calls, model.last, model._new, planned.calls) == (3, 3, "seen", "seen", 3)
    assert planned.num_planned_calls == 3
    del planned.last
    assert not hasattr(model, "last")
    planned.b = nn.Linear(2, 2)
    assert model.b is planned.b and "b.weight" in model.state_dict()
