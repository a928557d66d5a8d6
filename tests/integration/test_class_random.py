"""Random numbers: those that a plan cannot repeat run as they are or are refused by name; planning moves no generator."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from planner import CaptureError, plan
from tests.support.itself import check_against_itself
from tests.support.members import REFUSABLE, check, ids, inside, member, sampled
from tests.support.source import Step

DRAWS = {
    "dropout": "h = F.dropout(h, 0.3)",
    "alpha dropout": "h = F.alpha_dropout(h, 0.3, training=True)",
    "feature dropout": "h = F.dropout1d(h[None], 0.3)[0]",
    "rand": "h = h + torch.rand(8)",
    "randn_like": "h = h + torch.randn_like(h)",
    "randint": "h = h * torch.randint(1, 4, (8,))",
    "randperm": "h = h[torch.randperm(h.shape[0])]",
    "bernoulli": "h = h * torch.bernoulli(torch.full_like(h, 0.7))",
    "bernoulli in place": "h = h * torch.empty_like(h).bernoulli_(0.7)",
    "normal": "h = h + torch.normal(0.0, 1.0, (8,))",
    "exponential": "h = h + torch.empty(8).exponential_()",
    "uniform in place": "h = h + torch.empty(8).uniform_(-1, 1)",
    "gumbel": "h = F.gumbel_softmax(h)",
    "rrelu": "h = F.rrelu(h, training=True)",
    "multinomial": "h = h[torch.multinomial(torch.ones(16), 16)]",
    "distribution": "h = h + torch.distributions.Normal(torch.zeros(8), 1.0, validate_args=False).rsample()",
    "two dropouts": "h = F.dropout(torch.tanh(F.dropout(h, 0.3)), 0.3)",
    "attention dropout": "q = h[None, None]\nh = F.scaled_dot_product_attention(q, q, q, dropout_p=0.2)[0, 0]",
}
CONTROL = {
    "manual_seed": "torch.manual_seed(7)\nh = F.dropout(h, 0.5)",
    "manual_seed after a draw": "h = F.dropout(h, 0.5)\ntorch.manual_seed(7)",
    "manual_seed by the input": "torch.manual_seed(x.shape[0])\nh = h + torch.rand(8)",
    "fork_rng": "with torch.random.fork_rng([]):\n    torch.manual_seed(3)\n    n = torch.randn(8)\nh = F.dropout(h + n, 0.5)",
    "fork_rng without a seed": "with torch.random.fork_rng(devices=[]):\n    n = torch.randn(8)\nh = h + n - torch.randn(8)",
    "state put back": "s = torch.get_rng_state()\nn = torch.rand(8)\ntorch.set_rng_state(s)\nh = h + n - torch.rand(8)",
    "state kept on the module": "torch.set_rng_state(self.s)\nh = h + torch.rand(8)\nself.s = torch.get_rng_state()",
    "default_generator": "torch.default_generator.manual_seed(5)\nh = h + torch.rand(8)",
    "seed read": "h = h * (torch.initial_seed() % 7 + 1)",
    "explicit generator": "h = h + torch.rand(8, generator=self.g)",
    "explicit generator seeded": "self.g.manual_seed(3)\nh = h + torch.rand(8, generator=self.g)",
    "generator in a dict": "h = h + torch.randn(8, generator=self.gs['a'])",
    "generator in place": "h = h + torch.empty(8).uniform_(generator=self.g)",
    "global generator object": "h = h + torch.rand(8, generator=G)",
}
FOREIGN = {
    "numpy": "h = h * (1.0 if np.random.rand() < 0.5 else 3.0)",
    "numpy array": "h = h * torch.from_numpy(np.random.rand(8).astype('f'))",
    "numpy choice": "h = h[:, torch.as_tensor(np.random.permutation(8))]",
    "numpy seed": "np.random.seed(3)\nh = h * float(np.random.rand())",
    "numpy state": "s = np.random.get_state()\nh = h * float(np.random.rand())\nnp.random.set_state(s)",
    "numpy Generator": "h = h * float(self.rng.random())",
    "numpy Generator in a list": "h = h * float(self.rngs[0].normal())",
    "numpy RandomState": "h = h * float(self.old.rand())",
    "numpy global Generator": "h = h * float(N.random())",
    "Python": "h = h * (1.0 if random.random() < 0.5 else 3.0)",
    "Python choice": "h = random.choice([torch.relu, torch.tanh])(h)",
    "Python shuffle": "order = [self.a, self.b]\nrandom.shuffle(order)\nh = order[0](h)",
    "Python seed": "random.seed(3)\nh = h * random.random()",
    "random.Random": "h = h * self.r.random()",
    "random.Random in an object": "h = h * self.o.r.gauss(0, 1)",
    "global random.Random": "h = h * R.random()",
    "layer drop": "h = h if random.random() < 0.5 else torch.tanh(self.b(h))",
    "mixup": "k = np.random.beta(0.4, 0.4)\nh = h * k + h[torch.randperm(16)] * (1 - k)",
    "drawn and unused": "random.random()\nnp.random.rand()",
    "drawn once": "self.k = self.k if self.k else random.random()\nh = h * self.k",
    "a torch seed from Python": "torch.manual_seed(random.randrange(9))\nh = F.dropout(h, 0.5)",
}
OPERATORS = """
@torch.library.custom_op("{name}::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + {draw}
noisy.register_fake(lambda x: torch.empty_like(x))
noisy.register_autograd(lambda ctx, g: g)
class Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + {draw}
    @staticmethod
    def backward(ctx, g):
        return g * {back}
"""
INIT = """
self.s, self.g, self.k = torch.get_rng_state(), torch.Generator().manual_seed(1), None
self.gs = {'a': torch.Generator().manual_seed(2)}
self.rng, self.old, self.rngs = np.random.default_rng(0), np.random.RandomState(0), [np.random.default_rng(1)]
self.r, self.o = random.Random(0), types.SimpleNamespace(r=random.Random(1))
"""
HEAD = "N, R, G = np.random.default_rng(3), random.Random(4), torch.Generator().manual_seed(5)"
STEPS = (Step(), Step(), Step("in_flight"), Step("accumulate"))


def drawing(texts, allowed, **fields):
    return [member(name, text, init=INIT, head=HEAD, steps=STEPS, allowed=allowed, **fields) for name, text in texts.items()]


TORCH = drawing(DRAWS, frozenset({"same"}))
OTHERS = [*drawing(CONTROL, REFUSABLE), *drawing(FOREIGN, REFUSABLE)]


def custom():
    """Operators and autograd functions that draw without a word of it. A torch library lives as long as the process."""
    draws = {"torch": "torch.randn_like(x)", "numpy": "float(np.random.rand())", "python": "random.random()"}
    made = []
    for name, draw in draws.items():
        for kind, call in {"operator": "noisy", "autograd function": "Noise.apply"}.items():
            head = OPERATORS.replace("{name}", "{unique}").replace("{draw}", draw).replace("{back}", "1.0")
            text = f"for layer in (self.a, self.b):\n    h = torch.tanh({call}(layer(h) * 2) * 3)"
            made.append(member(f"{kind} that draws from {name}", text, head=head, steps=STEPS))
    head = OPERATORS.replace("{name}", "{unique}").replace("{draw}", "1.0").replace("{back}", "(1 + torch.rand_like(g))")
    made.append(member("autograd function whose backward draws", "h = Noise.apply(h)", head=head, steps=STEPS))
    return made


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", TORCH, ids=ids(TORCH))
def test_torchs_numbers_are_repeated(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", TORCH[::3], ids=ids(TORCH[::3]))
def test_torchs_numbers_in_a_submodule(of):
    check(inside(of))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", OTHERS, ids=ids(OTHERS))
def test_other_generators_and_control_of_torchs(of):
    check(of)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", sampled(OTHERS))
def test_other_generators_in_a_submodule(of):
    check(inside(of))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", custom(), ids=ids(custom()))
@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_operators_that_draw(of, budget, request):
    unique = f"draws_{abs(hash(request.node.name))}"
    defined = [0]

    class Named(type(of.program)):  # two loads of one program define two libraries
        def load(self):
            defined[0] += 1
            head = self.head.replace("{unique}", f"{unique}_{defined[0]}")
            return of.program.within(head=head).load()

    program = Named(**{name: getattr(of.program, name) for name in of.program.__dataclass_fields__})
    check(type(of)(program, REFUSABLE, None), budget=budget)


def test_planning_in_a_loop_moves_nothing():
    """Ten plans of a model with dropout leave torch's generator where it was."""
    from planner import plan

    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8)), torch.randn(4, 8)
    before = torch.get_rng_state()
    for _ in range(3):
        plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_eager_shows_nothing_against_itself():
    check_against_itself([*TORCH, *OTHERS])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_users_own_are_refused_by_name(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.body, self.stem(x), use_reentrant=reentrant).sum()

    with pytest.raises(CaptureError, match="own activation checkpointing off"):
        plan(Checkpointed(), 1.0, (torch.randn(4, 8),), costs="estimate", progress=False)
