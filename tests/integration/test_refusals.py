"""What used to be refused and need not be, and what a refusal says: the user's line, the cure, nothing of torch's insides."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner import CaptureError, PlannerError, max_batch, plan, plan_units, verify
from planner.graph.source import Source
from tests.support.text import unwrapped

QUICK = {"costs": "estimate", "progress": False, "effort": 1.0}
INTERNALS = re.compile(r"eval_frame|AOT|FakeTensor|FunctionalTensor|_ops\.py|functools|importlib|object at 0x|Traceback|torch/")


class Of(nn.Module):
    """A body, then `compute(self, hidden)`."""

    def __init__(self, compute, width=6):
        super().__init__()
        self.body, self.compute = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4)]), compute

    def forward(self, x):
        return self.compute(self, self.body(x))


def positive(h):
    """Symmetric and well conditioned."""
    return h @ h.mT + 4 * torch.eye(h.shape[-1])


def trained(module, steps):
    """Losses and gradients of some steps."""
    seen = []
    for x in steps:
        module.zero_grad()
        loss = module(x)
        loss.backward()
        seen += [loss.detach().clone(), *(p.grad.clone() for p in module.parameters())]
    return seen


LINALG = {
    "inv": lambda s, h: torch.linalg.inv(positive(h)),
    "inverse": lambda s, h: torch.inverse(positive(h)),
    "inv_ex": lambda s, h: torch.linalg.inv_ex(positive(h))[0],
    "inv_ex checked": lambda s, h: torch.linalg.inv_ex(positive(h), check_errors=True)[0],
    "cholesky": lambda s, h: torch.linalg.cholesky(positive(h)),
    "cholesky upper": lambda s, h: torch.linalg.cholesky(positive(h), upper=True),
    "cholesky_solve": lambda s, h: torch.cholesky_solve(h, torch.linalg.cholesky(positive(h))),
    "cholesky_inverse": lambda s, h: torch.cholesky_inverse(torch.linalg.cholesky(positive(h))),
    "solve": lambda s, h: torch.linalg.solve(positive(h), h),
    "solve a vector": lambda s, h: torch.linalg.solve(positive(h), h[:, 0]),
    "solve_triangular": lambda s, h: torch.linalg.solve_triangular(torch.linalg.cholesky(positive(h)), h, upper=False),
    "lu": lambda s, h: torch.linalg.lu_factor(positive(h))[0],
    "lu_solve": lambda s, h: torch.linalg.lu_solve(*torch.linalg.lu_factor(positive(h)), h),
    "matrix_power": lambda s, h: torch.linalg.matrix_power(positive(h), -2),
    "tensorsolve": lambda s, h: torch.linalg.tensorsolve(positive(h), h[:, 0]),
    "eigh": lambda s, h: torch.linalg.eigh(positive(h))[0],
    "eigvals": lambda s, h: torch.linalg.eigvals(h).abs(),
    "svd": lambda s, h: torch.linalg.svdvals(h),
    "det": lambda s, h: torch.linalg.det(positive(h)),
    "slogdet": lambda s, h: torch.linalg.slogdet(positive(h))[1],
    "batched": lambda s, h: torch.linalg.inv(torch.stack([positive(h), positive(2 * h)])),
    "twice": lambda s, h: torch.linalg.inv(torch.linalg.inv(positive(h))),
    "last of the forward": lambda s, h: (torch.linalg.cholesky(positive(h)), h.mean())[1],
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", LINALG)
def test_linear_algebra_that_checks_for_errors(name):
    torch.manual_seed(0)
    compute = LINALG[name]
    net, x = Of(lambda s, h: compute(s, h).sum()), torch.randn(6, 6)
    net(x).backward()  # eager can
    net.zero_grad()
    assert verify(plan(net, 1.0, (x,), **QUICK), (x,), rounds=1).exact


class Process(nn.Module):
    """A Gaussian process: marginal likelihood with a learned kernel on learned features."""

    def __init__(self):
        super().__init__()
        self.features, self.noise = (
            nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3)),
            nn.Parameter(torch.tensor(0.1)),
        )

    def forward(self, x, y):
        z = self.features(x)
        distance = (z[:, None] - z).square().sum(-1)
        covariance = (-distance).exp() + (0.1 + self.noise.exp()) * torch.eye(len(x))
        factor = torch.linalg.cholesky(covariance)
        weights = torch.cholesky_solve(y[:, None], factor)
        return (y @ weights).squeeze() / 2 + factor.diagonal().log().sum()


def test_a_gaussian_process_recomputes_and_stays_exact():
    torch.manual_seed(0)
    net, call = Process(), (torch.randn(48, 4), torch.randn(48))
    module = plan(net, 0.8, call, **QUICK)
    assert module.plan.solution.schedule.recomputes()
    report = verify(module, call, rounds=1)
    assert report.exact and report.within_budget


FAILS = {
    "inv": (lambda h: torch.linalg.inv(h), torch.zeros(6, 6)),
    "cholesky": (lambda h: torch.linalg.cholesky(h), -torch.eye(6)),
    "solve": (lambda h: torch.linalg.solve(h, h), torch.zeros(6, 6)),
    "inv_ex checked": (lambda h: torch.linalg.inv_ex(h, check_errors=True)[0], torch.zeros(6, 6)),
    "the check is the last kernel": (lambda h: torch.linalg.cholesky(h), torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1]))),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_singular_input_raises_what_eager_raises(name):
    compute, bad = FAILS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.norm = nn.Parameter(torch.tensor(1.0)), nn.BatchNorm1d(6)

        def forward(self, a):
            return compute(a * self.scale) + self.norm(a)

    net, good = Net(), 2 * torch.eye(6) + 0.1
    module = plan(net, 1.0, (good,), **QUICK)
    with pytest.raises(torch.linalg.LinAlgError) as eager:
        net(bad)
    norm = {name: tensor.clone() for name, tensor in net.norm.state_dict().items()}
    with pytest.raises(torch.linalg.LinAlgError) as planned:
        module(bad)
    assert str(planned.value) == str(eager.value)
    assert all(torch.equal(norm[name], tensor) for name, tensor in net.norm.state_dict().items())
    assert all(torch.isfinite(seen).all() for seen in trained(Summed(module), [good]))  # and the next call trains


class Summed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).sum()


def test_the_error_comes_in_the_forward_even_where_nothing_follows_the_check():
    """Of a factor that is returned as it is, the check is the forward's last kernel."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, a):
            return torch.linalg.cholesky_ex(a * self.scale)[0], torch.linalg.cholesky(a * self.scale)

    module = plan(Net(), 1.0, (torch.eye(6),), **QUICK)
    with pytest.raises(torch.linalg.LinAlgError):
        module(-torch.eye(6))


def test_a_check_runs_once_for_each_time_that_eager_runs_it(monkeypatch):
    torch.manual_seed(0)
    net, call = Process(), (torch.randn(48, 4), torch.randn(48))
    module = plan(net, 0.8, call, **QUICK)
    kernel = torch.ops.aten._linalg_check_errors.default
    written = [*module.graph.nodes, *module.backward_graph.nodes]
    assert sum(node.target is kernel for node in written) == 1
    assert any(node.target is kernel for node in module.graph.nodes)


def test_assertions_on_the_device_are_kept():
    class Net(nn.Linear):
        def forward(self, x):
            torch._assert_async((x < 5).all(), "too large")
            return super().forward(x).sum()

    net, x = Net(6, 2), torch.ones(3, 6)
    module = plan(net, 1.0, (x,), **QUICK)
    assert verify(module, (x,), rounds=1).exact
    for run in (net, module):
        with pytest.raises(RuntimeError, match="too large"):
            run(9 * x)


def test_tracing_leaves_torchs_operators_as_they_were():
    operators = [torch.ops.aten._linalg_check_errors.default, torch.ops.aten._assert_async.msg]
    before = [dict(op.py_kernels) for op in operators]
    plan(Of(lambda s, h: torch.linalg.inv(positive(h)).sum()), 1.0, (torch.randn(6, 6),), **QUICK)
    assert [dict(op.py_kernels) for op in operators] == before


@dataclass
class Keyless:
    """Registered without key functions, as diffusers does with every output class."""

    sample: torch.Tensor
    extra: torch.Tensor | None = None


pytree.register_pytree_node(Keyless, lambda k: ([k.sample, k.extra], None), lambda values, _: Keyless(*values))


@pytest.mark.parametrize("nest", [lambda k: k, lambda k: {"out": k}, lambda k: [k, k.sample * 2]], ids=["bare", "dict", "list"])
def test_containers_without_key_functions_as_outputs(nest):
    net, x = Of(lambda s, h: nest(Keyless(h))), torch.randn(8, 6)
    module = plan(net, 1.0, (x,), **QUICK)
    assert type(module(x)) is type(net(x))
    assert verify(module, (x,), rounds=1).exact


def test_containers_without_key_functions_as_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, given):
            return Keyless(self.body(given.sample), given.extra)

    net, x = Net(), torch.randn(8, 6)
    module = plan(net, 1.0, (Keyless(x, torch.ones(2)),), **QUICK)
    assert verify(module, (Keyless(x, torch.ones(2)),), rounds=1).exact
    module(Keyless(x, torch.ones(2))).sample.sum().backward()
    assert net.body.weight.grad is not None


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.body(x)


def test_the_largest_batch_with_batch_norm_begins_where_eager_can_run():
    found = max_batch(lambda n: ((torch.randn(n, 4),), {}), Normed(), "20kB", **QUICK)
    assert found.tried[0].batch == 2 and found.batch > 2
    assert "Expected more than 1 value per channel" in found.smaller and found.summary()["smallest"] == 2
    assert re.search(r"smallest +2; below it: .*body\.1.*Expected more than 1 value per channel", unwrapped(found))
    assert found.verify(1).largest.measured.peak_bytes > 0
    with pytest.raises(PlannerError, match=r"the smallest batch that the model can run, 2, does not fit: Raise .* budget 1kB"):
        max_batch(lambda n: ((torch.randn(n, 4),), {}), Normed(), "1kB", **QUICK)


class Pairs(nn.Module):
    """Contrasts each sample with at least two others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)

    def forward(self, x):
        if len(x) < 3:
            raise ValueError(f"{len(x)} samples have no negatives")
        h = self.body(x)
        return (h @ h.T).square().mean()


def test_the_largest_batch_where_three_are_the_least():
    found = max_batch(lambda n: ((torch.randn(n, 4),), {}), Pairs(), "20kB", **QUICK)
    assert found.tried[0].batch == 3 and "2 samples have no negatives" in found.smaller


def test_a_model_that_runs_at_no_batch_says_why_one_does_not():
    net = Of(lambda s, h: h[h > 0].sum())
    with pytest.raises(CaptureError, match="shape depends on the data"):
        max_batch(lambda n: ((torch.randn(n, 6),), {}), net, "1GiB", **QUICK)


class FakeCache:
    """What transformers' caches look like from outside: no pytree container."""


FakeCache.__module__ = "transformers.cache_utils"
FakeCache.__name__ = FakeCache.__qualname__ = "DynamicCache"


@pytest.mark.parametrize(
    "nest", [lambda h, c: {"loss": h.sum(), "past": c}, lambda h, c: (h.sum(), (c, h))], ids=["dict", "tuple"]
)
def test_caches_are_left_out_and_said_once(nest):
    net, x = Of(lambda s, h: nest(h, FakeCache())), torch.randn(8, 6)
    with pytest.warns(UserWarning, match=r"^set model\.config\.use_cache=False: a planned Of returns None as") as said:
        module = plan(net, 1.0, (x,), **QUICK)
    assert len(said) == 1 and said[0].filename == __file__
    out = module(x)
    assert (out["past"] if isinstance(out, dict) else out[1][0]) is None
    del out
    assert verify(module, (x,), rounds=1).exact
    _trains_on(module, x)
    plan(net, 1.0, (x,), **QUICK)  # a second warning would be an error


def _trains_on(module, *args, **kwargs):
    """Audits at the 2nd and 10th call compare what both forwards return, and not the cache that a plan leaves out."""
    for _ in range(11):
        module(*args, **kwargs)
    assert module.num_unplanned_calls == 0


def test_caches_of_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, use_cache=True)
    net = transformers.GPT2LMHeadModel(config).train()
    call = {"input_ids": torch.randint(0, 64, (2, 8)), "labels": torch.randint(0, 64, (2, 8))}
    with pytest.warns(UserWarning, match="use_cache=False"):
        module = plan(net, 1.0, (), call, **QUICK)
    assert verify(module, (), call, rounds=1).exact
    _trains_on(module, **call)
    assert module(**call).past_key_values is None and net(**call).past_key_values is not None


class Unknown:
    def __repr__(self):
        return "B" * 5000


def numpy_inside(s, h):
    return h.sum() * float(h.detach().numpy().sum())


def raises(error):
    raise error


REFUSED = {
    "numpy": (numpy_inside, "compute it with torch"),
    "data_ptr": (lambda s, h: h.sum() * (h.data_ptr() % 2), "memory"),
    "a shape of the data": (lambda s, h: h[h > 0].sum(), "into a submodule of its own, which then runs as it is"),
    "an unknown class": (lambda s, h: (h.sum(), Unknown()), "register_pytree_node(Unknown"),
    "a sparse tensor": (lambda s, h: (h.to_sparse() @ h).sum(), "sparse=False"),
    "a write into a sparse tensor": (lambda s, h: (torch.eye(len(h)).to_sparse().mul_(2.0) @ h).sum(), "sparse=False"),
    "torch.compile": (lambda s, h: torch.compile(torch.sin, backend="eager")(h).sum(), "plan the module that was given"),
    "torch.cond": (lambda s, h: torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,)).sum(), "torch.cond"),
    "its own error": (lambda s, h: raises(KeyError("nothing")), "raises KeyError: 'nothing'"),
    "a long error of its own": (lambda s, h: raises(ValueError("x" * 5000)), "raises ValueError: xxx"),
    "an error without words": (lambda s, h: raises(AssertionError()), "raises AssertionError"),
    "its own words": (lambda s, h: raises(RuntimeError("a FAKE word")), "a FAKE word"),
    "shapes": (lambda s, h: s.body(h[:, :2]).sum(), "raises RuntimeError: "),
    "lstsq": (lambda s, h: torch.linalg.lstsq(positive(h), h).solution.sum(), "into a submodule of its own"),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_users_line_and_the_cure(name, caplog, capfd):
    compute, cure = REFUSED[name]
    net, x = Of(compute), torch.randn(6, 6)
    with pytest.raises(CaptureError) as caught:
        plan(net, 1.0, (x,), **QUICK)
    message = str(caught.value)
    assert cure in message and len(message) < 800
    assert not INTERNALS.search(message), message
    streams = capfd.readouterr()
    assert "Traceback" not in streams.out + streams.err + caplog.text
    if name != "an unknown class":
        assert re.search(r"test_refusals\.py:\d+", message), message


def test_a_module_of_torch_alone_is_named_by_its_class():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(CaptureError, match=r"at 1 \(BatchNorm1d\) raises ValueError: Expected more than 1 value per channel"):
        plan(net, 1.0, (torch.randn(1, 4),), **QUICK)
    sources = [str(op.source) for op in plan(net, 1.0, (torch.randn(5, 4),), **QUICK).plan.graph.ops]
    assert "0 (Linear)" in sources and not INTERNALS.search(" ".join(sources)) and ".py" not in " ".join(sources)


class Encoder(nn.Module):
    def __init__(self, validate):
        super().__init__()
        self.body, self.drop, self.validate = nn.Linear(6, 12), nn.Dropout(0.5), validate

    def forward(self, x):
        mean, scale = self.drop(self.body(x)).chunk(2, -1)
        return torch.distributions.Normal(mean, scale.exp(), validate_args=self.validate).rsample().sum()


def test_checks_of_distributions_are_named_with_their_cure():
    x = torch.randn(8, 6)
    with pytest.raises(CaptureError, match=r"^set validate_args=False in torch\.distributions there: .*test_refusals\.py:\d+"):
        plan(Encoder(True), 1.0, (x,), **QUICK)
    assert verify(plan(Encoder(False), 1.0, (x,), **QUICK), (x,), rounds=1).exact


class Lstsq(nn.Module):
    def forward(self, h):
        return torch.linalg.lstsq(positive(h), h).solution


def test_a_submodule_of_its_own_is_the_cure_it_is_said_to_be():
    net, x = Of(lambda s, h: s.solver(h).sum()), torch.randn(6, 6)
    net.solver = Lstsq()
    module = plan(net, 1.0, (x,), progress=False, effort=1.0)
    assert [spec.module for spec in module.step.joint.opaque_calls.values()] == ["solver"]
    torch.testing.assert_close(module(x), net(x))  # lstsq of LAPACK depends on alignment, so that eager differs from itself


def test_children_of_what_is_refused_are_still_planned():
    net, x = Of(numpy_inside), torch.randn(64, 6)
    assert [*plan_units(net, 1.0, (x,), **QUICK).planned] == ["body"]


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return x * torch.rand(x.shape, generator=self.generator)


@pytest.mark.parametrize("name", ["noise", "the model"])
def test_a_submodule_may_be_called_what_messages_call_the_model(name):
    """It runs as it is, as a submodule of any other name does; the model itself cannot."""
    net = nn.Sequential()
    net.add_module("layer", nn.Linear(4, 4))
    net.add_module(name, OwnGenerator())
    parts = {op.source for op in plan(net, 1.0, (torch.randn(3, 4),), **QUICK).plan.graph.ops if op.name == "opaque_forward"}
    assert parts == {Source(name, note="runs as it is")}


class CountsGlobally(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        STEPS["number"] += 1
        return self.layer(x) * STEPS["number"]


STEPS = {"number": 0}


def test_a_global_variable_that_counts_is_named_once():
    with pytest.raises(CaptureError, match=r"^the model's forward changes its global variable STEPS\['number'\] \("):
        plan(CountsGlobally(), 1.0, (torch.randn(3, 4),), **QUICK)
