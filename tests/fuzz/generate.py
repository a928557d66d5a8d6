"""A seed makes a case: a model of random units, and a training loop with random changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.fuzz.units import BEHAVIOURS, KINDS, LAYERS, MEAN, Unit, setting, uses_of
from tests.support.source import Program, Step

CHANGES = {
    "submodule replaced": "part.b = nn.Linear(8, 8)",
    "forward replaced": "part.b.forward = lambda x: x * 2",
    "class replaced": "part.b.__class__ = type('Other', (nn.Linear,), {'forward': lambda s, x: F.linear(x, s.weight) * 2})",
    "weight replaced": "part.c.weight = nn.Parameter(torch.ones(8, 8).tril() / 8)",
    "weight transposed": "if 'weight' in part.b._parameters:\n    part.b.weight = nn.Parameter(part.b.weight.detach().t())",
    "weight's data": "part.b.weight.data = part.b.weight.data.t()",
    "bias emptied": "part.b.bias = None",
    "bias frozen": "part.b.bias is None or part.b.bias.requires_grad_(False)",
    "weight frozen": "part.c.weight.requires_grad_(False)",
    "forward hook": "part.b.register_forward_hook(lambda m, a, o: o * 2)",
    "pre-hook": "part.b.register_forward_pre_hook(lambda m, a: (a[0] * 2,))",
    "backward hook": "part.b.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))",
    "weight's hook": "part.b.weight.register_hook(lambda g: g * 2)",
    "hook of the model": "m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))",
    "submodule in evaluation": "part.b.eval()",
    "all in evaluation but one": "m.eval()\nm.training = True",
    "state loaded": "m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()})",
    "weights filled": "for p in m.parameters():\n    p.data.mul_(0.5)",
    "parametrized": "nn.utils.parametrizations.weight_norm(part.b)",
    "attribute nobody reads": "part.nobody = 3",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "default dtype": "torch.set_default_dtype(torch.float64)\ntorch.set_default_dtype(torch.float32)",
    "flash attention off": "torch.backends.cuda.enable_flash_sdp(False)",
    "flash attention on": "torch.backends.cuda.enable_flash_sdp(True)",
    "generators moved": "random.random(), np.random.rand(), torch.rand(3)",
    "grad kept": "part.b.weight.grad = torch.ones(8, 8)",
}
HARMLESS = ("state loaded", "weights filled", "attribute nobody reads", "generators moved", "grad kept", "default dtype")
CONTEXTS = (
    "torch.autocast('cpu', torch.bfloat16)",
    "torch.autocast('cpu', torch.bfloat16, cache_enabled=False)",
    "torch.autograd.graph.save_on_cpu()",
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "torch.random.fork_rng([])",
    "torch.no_grad()",
)
SIMPLE = (
    *("train", "accumulate", "in_flight", "in_flight_in_order", "twice", "transposed", "expanded", "broadcast", "sliced"),
    *("transposed_loss", "frozen_update", "dropped"),
)
OTHERS = (
    *("joint", "partial", "last_output", "one_at_a_time", "written", "written_by_autograd", "evaluated", "no_grad", "smaller"),
    *("bad_shape", "interrupted", "non_contiguous", "input_gradients", "copied", "penalized", "used_again"),
)
OTHER_LAYOUTS = ("transposed", "expanded", "broadcast", "sliced", "transposed_loss", "frozen_update")
"""The gradient of these outputs may come in another layout than planned; a tight budget may have no room for its copy."""
OUTS = {
    "one": "self.c(torch.tanh(self.b(torch.sigmoid(h) * 2)))",
    "two": "(self.c(torch.tanh(self.b(torch.sigmoid(h) * 2))), torch.tanh(h) * 2)",
    "hidden": "(self.c(torch.tanh(self.b(torch.sigmoid(h) * 2))), h)",
    "dict": "{'y': self.c(torch.tanh(self.b(torch.sigmoid(h) * 2))), 'n': 3, 'h': h.mean()}",
    "loss": "(self.c(torch.tanh(self.b(torch.sigmoid(h)))), h.square().mean())",
    "transposed": "self.c(torch.tanh(self.b(torch.sigmoid(h) * 2))).transpose(1, 2)",
}


@dataclass(frozen=True, slots=True)
class Happening:
    """A step: its kind, the context of its forward, and what changes before it (name, text)."""

    kind: str = "train"
    under: str = ""
    changes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """A random program in pieces that can be taken out one by one.

    Attributes:
        out: name in OUTS.
        budget: fraction of the plain peak.
        measured: its peak is measured as well.
    """

    seed: int
    units: tuple[Unit, ...]
    steps: tuple[Happening, ...]
    out: str = "one"
    inside: bool = False
    warm: int = 0
    plan_under: str = ""
    budget: float = 0.75
    measured: bool = False

    @property
    def benign(self) -> bool:
        """Made of what a plan must hold: it may not be refused, and every step must run planned."""
        harmless = all(name in HARMLESS for step in self.steps for name, _ in step.changes)
        simple = all(step.kind in SIMPLE and not step.under for step in self.steps) and not self.plan_under
        return harmless and simple and self.out in ("one", "transposed") and all(unit.benign for unit in self.units)

    @property
    def features(self) -> list[str]:
        """Names of everything in it, for summaries."""
        changes = [f"change: {name}" for step in self.steps for name, _ in step.changes]
        kinds = [f"step: {step.kind}" for step in self.steps] + [f"under: {step.under}" for step in self.steps if step.under]
        rest = [f"out: {self.out}"] + [f"planned under: {self.plan_under}"] * bool(self.plan_under) + ["inside"] * self.inside
        return [*(f"{unit.group}: {unit.name}" for unit in self.units), *changes, *kinds, *rest]

    def program(self) -> Program:
        """The case as a program."""
        losses = ", ".join(unit.losses for unit in self.units if unit.losses)
        return Program(
            f"seed {self.seed}",
            forward="\n".join(unit.forward for unit in self.units) or "pass",
            init="\n".join(unit.init for unit in self.units),
            head=MEAN + "\n".join(unit.head for unit in self.units),
            out=OUTS[self.out],
            inside=self.inside,
            losses=f"[{losses}]",
            given="(torch.randn(4, 5, 8),)",
            steps=tuple(Step(step.kind, "\n".join(text for _, text in step.changes), step.under) for step in self.steps),
            plan_under=self.plan_under,
            warm=self.warm,
        )

    def smaller(self) -> Iterator[Case]:
        """The case with one piece less, for each piece."""
        for i in range(len(self.units)):
            yield self._without_unit(i)
        for i, step in enumerate(self.steps):
            if len(self.steps) > 1:
                yield replace(self, steps=(*self.steps[:i], *self.steps[i + 1 :]), warm=min(self.warm, len(self.steps) - 2))
            for j in range(len(step.changes)):
                yield self._with_step(i, replace(step, changes=(*step.changes[:j], *step.changes[j + 1 :])))
            if step.under:
                yield self._with_step(i, replace(step, under=""))
            if step.kind != "train":
                yield self._with_step(i, replace(step, kind="train"))
        simplest = {"out": "one", "inside": False, "warm": 0, "plan_under": "", "budget": 1.0}
        yield from (replace(self, **{key: value}) for key, value in simplest.items() if getattr(self, key) != value)

    def _with_step(self, i: int, step: Happening) -> Case:
        return replace(self, steps=(*self.steps[:i], step, *self.steps[i + 1 :]))

    def _without_unit(self, i: int) -> Case:
        texts = {*self.units[i].changes.values()}
        steps = [
            replace(step, changes=tuple(change for change in step.changes if change[1] not in texts)) for step in self.steps
        ]
        return replace(self, units=(*self.units[:i], *self.units[i + 1 :]), steps=tuple(steps))


def case_of(seed: int) -> Case:
    """The case of a seed, always the same."""
    rng = random.Random(seed)
    benign = rng.random() < 0.3
    layers = rng.choices([unit for unit in LAYERS if unit.benign or not benign], k=rng.randint(1, 3))
    behaviours = [_behaviour(rng, benign) for _ in range(rng.choice((1, 1, 2, 3)))]
    pieces = [*layers, *behaviours]
    rng.shuffle(pieces)
    units = tuple(unit.called(f"v{i}") for i, unit in enumerate(pieces))
    out = rng.choice(("one", "one", "transposed") if benign else ("one", "one", *OUTS))
    under = rng.choice(CONTEXTS[:2]) if not benign and rng.random() < 0.1 else ""
    steps = [Happening()]
    for _ in range(rng.randint(1, 3)):
        steps.append(_happening(rng, units, benign, under))
    inside = rng.random() < 0.35 and out != "transposed"
    budget = rng.choice((0.7, 0.8, 0.9, 1.0))
    if benign and (out == "transposed" or any(step.kind in OTHER_LAYOUTS for step in steps)):
        budget = 1.0
    case = Case(seed, units, tuple(steps), out, inside, plan_under=under, budget=budget)
    warm = rng.randint(1, 2) if rng.random() < 0.15 else 0
    return replace(case, warm=min(warm, len(steps) - 1), measured=rng.random() < 0.1)


def _behaviour(rng: random.Random, benign: bool) -> Unit:
    while True:
        name = rng.choice(("setting", "setting", "setting", *BEHAVIOURS))
        if name == "setting":
            kind = rng.choice(KINDS)
            unit = setting(kind, rng.choice(uses_of(kind)))
        else:
            unit = rng.choice(BEHAVIOURS[name])
        if unit.benign or not benign:
            return unit


def _happening(rng: random.Random, units: tuple[Unit, ...], benign: bool, under: str) -> Happening:
    kinds = SIMPLE if benign else (*SIMPLE, *OTHERS)
    kind = "train" if rng.random() < 0.4 else rng.choice(kinds)
    changes: list[tuple[str, str]] = []
    own = [(f"{unit.name}: {name}", text) for unit in units for name, text in unit.changes.items()]
    if own and not benign and rng.random() < 0.6:
        changes.append(rng.choice(own))
    if rng.random() < 0.3:
        name = rng.choice(HARMLESS if benign else tuple(CHANGES))
        changes.append((name, CHANGES[name]))
    context = under if under and rng.random() < 0.7 else rng.choice(CONTEXTS) if not benign and rng.random() < 0.08 else ""
    return Happening(kind, context, tuple(changes))
