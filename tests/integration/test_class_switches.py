"""Switches of the process and contexts that eager's kernels depend on: one that was not planned for is noticed."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from planner import BackwardError, InputError, MismatchWarning, plan
from tests.support import world
from tests.support.harness import planned_near
from tests.support.itself import check_against_itself
from tests.support.members import ANY, GUARDED, check, ids, inside, member
from tests.support.source import Program, Step

ATTENTION = "q = h[None, None]\nh = F.scaled_dot_product_attention(q, q, q)[0, 0]"
HEAD = """
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
def double(gradients):
    return tuple(g if g is None else g * 2 for g in gradients)
class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.tanh else out
class DoublesKernels(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.tanh.default else out
class Linked(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self):
        super().__init__(lambda t: t, lambda t: t)
"""
FLAGS = {
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "deterministic, warnings only": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "flash attention off": "torch.backends.cuda.enable_flash_sdp(False)",
    "plain attention off": "torch.backends.cuda.enable_math_sdp(False)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
    "mkldnn off": "torch.backends.mkldnn.set_flags(False)",
    "anomaly mode": "torch.set_anomaly_enabled(True)",
    "fill of uninitialized memory": "torch.utils.deterministic.fill_uninitialized_memory = False",
    "a hook of every module": "nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 2)",
    "a pre-hook of every module": "nn.modules.module.register_module_forward_pre_hook(lambda m, a: (a[0] * 2,))",
    "a backward hook of every module": "nn.modules.module.register_module_full_backward_hook(lambda m, i, o: double(i))",
    "autocast, without a context": "torch.set_autocast_enabled('cpu', True)",
    "grad mode, without a context": "torch.set_grad_enabled(False)",
}
CONTEXTS = {
    "no_grad": "torch.no_grad()",
    "inference mode": "torch.inference_mode()",
    "bf16 autocast": "torch.autocast('cpu', torch.bfloat16)",
    "fp16 autocast": "torch.autocast('cpu', torch.float16)",
    "bf16 autocast without a cache": "torch.autocast('cpu', torch.bfloat16, cache_enabled=False)",
    "autocast of another device": "torch.autocast('cuda', torch.float16, enabled=False)",
    "autocast that is off": "torch.autocast('cpu', enabled=False)",
    "attention kernel": "sdpa_kernel(SDPBackend.MATH)",
    "function mode": "Doubles()",
    "dispatch mode": "DoublesKernels()",
    "default device": "torch.device('cpu')",
    "saved tensors on the CPU": "torch.autograd.graph.save_on_cpu()",
    "hooks of saved tensors": "Linked()",
    "detection of anomalies": "torch.autograd.detect_anomaly(check_nan=True)",
    "one thread in the backward": "torch.autograd.set_multithreading_enabled(False)",
    "mkldnn": "torch.backends.mkldnn.flags(enabled=False)",
    "a fork of the generator": "torch.random.fork_rng(devices=[])",
}


def switched():
    """A planned step, one under another switch, one as planned."""
    base = "h = torch.tanh(self.b(torch.relu(h))) + 0.5"
    made = []
    for name, text in FLAGS.items():
        kind = "dropped" if "grad mode" in name else "train"
        steps = (Step(), Step(kind, before=text), Step(kind))
        flow = f"{ATTENTION}\n{base}" if "default dtype" not in name else f"{base}\nh = h * len(str(torch.ones(1).dtype))"
        made.append(member(name, flow, head=HEAD, steps=steps, allowed=GUARDED, planned_to=1))
    for name, text in CONTEXTS.items():
        kind = "no_grad" if name in ("no_grad", "inference mode") else "train"
        steps = (Step(), Step(kind, under=text), Step())
        made.append(member(f"under {name}", f"{ATTENTION}\n{base}", head=HEAD, steps=steps, allowed=GUARDED, planned_to=1))
    return made


def planned_under():
    """Planned under a context, called within it, outside of it, and within it."""
    kept = [name for name in CONTEXTS if name not in ("no_grad", "inference mode", "a fork of the generator")]
    return [
        member(
            f"planned under {name}",
            f"{ATTENTION}\nh = self.a(torch.tanh(self.b(torch.sigmoid(self.a(h))) + self.a(h * 2)))",
            head=HEAD,
            steps=(Step(under=CONTEXTS[name]), Step(), Step(under=CONTEXTS[name])),
            plan_under=CONTEXTS[name],
            allowed=ANY if "mode" in name or "hooks" in name or "saved" in name or "anomal" in name else GUARDED,
            planned_from=None,
        )
        for name in kept
    ]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", switched(), ids=ids(switched()))
def test_another_switch_is_noticed(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", planned_under(), ids=ids(planned_under()))
def test_a_switch_that_was_planned_for(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", switched()[::4], ids=ids(switched()[::4]))
def test_another_switch_around_a_submodule(of):
    check(inside(of))


def test_planned_under_autocast_runs_planned_there():
    flow = "h = torch.tanh(self.b(torch.relu(h)))"
    bf16 = CONTEXTS["bf16 autocast"]
    check(member("autocast", flow, steps=(Step(under=bf16),) * 3, plan_under=bf16, measured=True))


LIBRARY = {
    "variable": ("h = h * colorsys.ONE_THIRD", "colorsys.ONE_THIRD = 2.0", "colorsys.ONE_THIRD = 0.5"),
    "function": ("h = colorsys.mine(h)", "colorsys.mine = torch.cos", "colorsys.mine = torch.sin"),
    "what a function returns": (
        "h = h * colorsys.get_mine()",
        "HELD[0] = 3",
        "HELD = [2]\ncolorsys.get_mine = lambda: HELD[0]",
    ),
    "asked for": ("h = h * getattr(colorsys, 'other', 2)", "colorsys.other = 3", "vars(colorsys).pop('other', None)"),
}


def of_libraries():
    """A planned step, a change of a library of Python's, two more steps."""
    return [
        member(
            name,
            text,
            head=f"import colorsys\n{start}",
            steps=(Step(), Step(before=change), Step()),
            allowed=GUARDED,
            planned_to=1,
        )
        for name, (text, change, start) in LIBRARY.items()
    ]


@pytest.mark.parametrize("of", of_libraries(), ids=ids(of_libraries()))
def test_what_was_read_of_a_library_is_compared(of):
    check(of, audit=False)


def test_precisions_of_single_backends_are_compared():
    """Torch raises where the older names are asked for what these cannot say."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        _, planned, x = loaded()
        assert planned.mismatch((x,), {}) is None
        conv.fp32_precision = before
        assert "cudnn" in planned.mismatch((x,), {}).where
    finally:
        conv.fp32_precision = before


def loaded(text="h = torch.tanh(h)"):
    home = Program("transforms", text).load()
    world.seed(1)
    model, args = home.build(), home.inputs()
    return model, planned_near(model, 0.8, args, {"effort": 0.3}), args[0]


def jvp(module, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def func_grad(module, x):
    weights = {name: value.detach() for name, value in module.named_parameters()}
    return torch.func.grad(lambda w: functional_call(module, w, (x,)).sum())(weights)["a.weight"]


def jacobian(module, x):
    return torch.func.jacrev(lambda row: module(row[None])[0])(x[0])


def per_sample(module, x):
    return torch.vmap(lambda row: module(row[None])[0])(x)


def second_derivative(module, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [p for p in module.parameters() if p.dim() == 2])[0]


def hessian(module, x):
    return torch.func.hessian(lambda row: module(row[None]).sum())(x[0])


def functional(module, x):
    weights = {name: value.detach() * 2 for name, value in module.named_parameters()}
    return functional_call(module, weights, (x,))


def checkpointed(module, x):
    return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


def traced(module, x):
    return torch.jit.trace(module, x, check_trace=False)(x)


def exported(module, x):
    return torch.export.export(module, (x,), strict=False).module()(x)


def made_fx(module, x):
    return torch.fx.experimental.proxy_tensor.make_fx(module)(x)(x)


TRANSFORMS = (
    jvp,
    func_grad,
    jacobian,
    per_sample,
    second_derivative,
    hessian,
    functional,
    checkpointed,
    traced,
    made_fx,
)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_see_what_eager_shows(transform):
    with world.kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, planned, x = loaded()
        expected, found = transform(model, x), transform(planned, x)
        assert (found is None) == (expected is None)
        assert expected is None or torch.equal(found, expected)


def test_torch_export_of_a_planned_module_is_refused():
    with world.kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, planned, x = loaded()
        exported(model, x)
        with pytest.raises(InputError, match="export"):
            exported(planned, x)


def test_strict_makes_a_switch_an_error():
    program = Program("strict", "h = torch.tanh(h)", steps=(Step(), Step(under=CONTEXTS["bf16 autocast"])))
    found = check(member("strict", program.forward, steps=program.steps, allowed=ANY, planned_from=None), strict=True)
    assert found.verdict == "refused" and found.at == "1" and "autocast" in found.messages[0]


def test_evaluation_is_not_worth_a_warning():
    model, planned, x = loaded()
    planned.eval()
    with torch.no_grad():
        assert torch.equal(planned(x), model(x))  # a warning would be an error here
    assert issubclass(MismatchWarning, UserWarning)


def test_eager_shows_nothing_against_itself():
    check_against_itself([*switched(), *planned_under()])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.q(x).reshape(-1, 8, 2, 3, 8).permute(3, 0, 2, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Parts(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first, self.parts, self.last = nn.Linear(16, 16), nn.ModuleList(part() for _ in range(3)), nn.Linear(16, 16)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for part in self.parts:
            h = torch.tanh(part(h))
        return self.last(h).float().square().mean()


def runs_parts_again(made):
    schedule, ops = made.solution.schedule, made.graph.ops
    return any(ops[schedule.steps[t]].name.startswith("opaque_forward") for t in schedule.recomputes())


@contextlib.contextmanager
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


AROUND = {
    "attention by its formula": (Attending, lambda: sdpa_kernel(SDPBackend.MATH)),
    "casts that are not kept": (Recurrent, lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)),
    "casts": (Recurrent, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("part", "around"), AROUND.values(), ids=AROUND.keys())
def test_a_part_that_runs_again_in_the_backward_does_so_as_in_the_forward(part, around):
    torch.manual_seed(0)
    model, x = Parts(part), torch.randn(256, 8, 16)
    twin = copy.deepcopy(model)
    with around():
        options = {"effort": 0.3, "opaque": [f"parts.{i}" for i in range(3)]}
        plans = (planned_near(model, budget, (x,), options) for budget in (0.95, 0.85, 0.75, 0.65))
        planned = next(made for made in plans if runs_parts_again(made.plan))
    for each in (planned, twin):
        with around():
            loss = each(x)
        loss.backward()
    assert planned.num_planned_calls == 1
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_kernels_run_again_under_the_forwards_switches_or_not_at_all(budget):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Tanh()) for _ in range(4)))
    twin, x = copy.deepcopy(model), torch.randn(256, 16)
    with medium_precision():
        planned = plan(model, budget, (x,), costs="estimate", progress=False)
    recomputes = bool(planned.plan.solution.schedule.recomputes())
    assert recomputes == (budget < 1)
    for each in (planned, twin):
        with medium_precision():
            loss = each(x).square().mean()
        if each is planned and recomputes:
            with pytest.raises(
                BackwardError, match="the switch float32 matmul precision is highest, and was medium in the forward"
            ):
                loss.backward()
            return
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
