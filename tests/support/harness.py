"""One program, trained by eager and by a plan: same bits, a named mismatch, a named refusal, or a failure of the test."""

from __future__ import annotations

import contextlib
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner import BackwardError, InfeasibleBudgetError, MismatchWarning, NoScheduleFoundError, PlannerError, profile
from planner.graph.floor import floor
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from planner.verification.step_copy import autocast_of, cut_history
from tests.support import loops, observe, world
from tests.support.source import Program, forget

_INTERNALS = re.compile(
    r"FakeTensor|fake tensor|FunctionalTensor|eval_frame|AOTInput|AOTOutput|[Pp]roxy\b|INTERNAL ASSERT|_functorch|dynamo"
    r"|allow_non_fake|ShapeEnv|SymInt|meta kernel|aot_|higher.order op"
)
_MARGIN = 1 / 64
_MOST_PLANS = 5


class Different(AssertionError):
    """What must never happen.

    Attributes:
        kind: "silent" (other bits, no word), "warned" (other bits after a mismatch), "planning" (planning left a trace),
            "crash" (an error that is not the planner's), "no error" (eager raises, the plan does not), "budget" (the measured
            peak exceeds it), "words" (a message shows torch's internals), "audit" (the planner's own net found it).
        detail: the first line of the description.
    """

    def __init__(self, kind: str, detail: str, program: Program) -> None:
        self.kind, self.detail = kind, detail
        steps = "\n".join(f"  {i}. {s.kind}{f' under {s.under}' if s.under else ''}" for i, s in enumerate(program.steps))
        super().__init__(f"{kind}: {program.name}: {detail}\nsteps:\n{steps}\nprogram:\n{program.source}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program; every one of these is allowed.

    Attributes:
        verdict: "same" (eager's bits, no word), "mismatch" (eager's bits, with a MismatchWarning), "refused" (a PlannerError).
        messages: of the mismatches, or the refusal.
        at: where it was refused: "plan", or the number of the step.
        planned: per step, a call of it ran planned.
        told: per step, it was said that a call ran unplanned.
        opaque: submodules that run as they are.
        raised: per step before planning and after, the error that eager raised; "" for none.
    """

    verdict: str
    messages: tuple[str, ...] = ()
    at: str = ""
    planned: tuple[bool, ...] = ()
    told: tuple[bool, ...] = ()
    opaque: str = ""
    raised: tuple[str, ...] = ()


@dataclass(slots=True)
class _Log:
    """What a step showed, in order, and how it ended."""

    seen: dict[str, str] = field(default_factory=dict)
    error: BaseException | None = None
    planned: bool = False
    misses: list[str] = field(default_factory=list)


class Run:
    """A module in training, as the functions of `loops` use it.

    Attributes:
        module: what is called.
        model: what holds the parameters.
        is_over_budget_said: a step warned that it may need more than the budget.
    """

    def __init__(self, module: nn.Module, model: nn.Module, home: types.ModuleType) -> None:
        self.module, self.model, self._home = module, model, home
        self._log, self._step = _Log(), 0
        self._held: dict[str, torch.Tensor] = {}
        self.is_over_budget_said = False

    def inputs(self) -> Any:
        """The arguments of a call, new ones."""
        return self._home.inputs()

    def noise(self, *shape: int) -> torch.Tensor:
        """Numbers for gradients, of no generator."""
        count = torch.Size(shape).numel()
        return torch.linspace(-1, 1, max(count, 1))[:count].reshape(shape) + 0.1

    def call(self, *args: Any, module: nn.Module | None = None) -> Any:
        """Call the module, or the one given, and look at what it returns."""
        under = getattr(self._home, f"under_{self._step}", contextlib.nullcontext)
        with under():
            out = (module or self.module)(*args)
        self._log.planned |= any(map(_is_planned, self.differentiable(out)))
        self.see("output", out)
        self.see("arguments", args)
        return out

    def differentiable(self, out: Any) -> list[torch.Tensor]:
        """The tensors of an output that require grad."""
        return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def loss(self, out: Any) -> torch.Tensor:
        """A scalar of everything differentiable in an output, and of what the program leaves on its module for the loop."""
        left = self._home.losses(self._home.part_of(self.model))
        terms = [leaf.abs().square().mean().float() for leaf in (*self.differentiable(out), *left)]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward, and a look at the gradients."""
        loss.backward()
        self.see("gradients", {name: p.grad for name, p in sorted(self.model.named_parameters())})

    def between(self) -> None:
        """What the program changes between a forward and its backward."""
        getattr(self._home, f"between_{self._step}")(self.model, self._home.part_of(self.model))

    def update(self, *, set_to_none: bool = True) -> None:
        """A step of plain gradient descent."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None and parameter.requires_grad:
                    parameter.sub_(parameter.grad, alpha=0.05)
        self.model.zero_grad(set_to_none=set_to_none)

    def see(self, name: str, value: Any) -> None:
        """Note a value, to be compared."""
        number = sum(key.startswith(f"{name} ") for key in self._log.seen)
        seen = observe.state_of(value, f"{name} {number}", self._home.__name__)
        self._log.seen |= seen

    def hold(self) -> None:
        """Keep the tensors that the model holds now, to see later whether they were written into or replaced."""
        self._held = observe.tensors_of(self.model, "held", self._home.__name__)

    def step(self, i: int, kind: str) -> _Log:
        """Run a step; returns what it showed."""
        self._log, self._step = log, _ = _Log(), i
        world.seed(100 + i)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            getattr(self._home, f"before_{i}")(self.model, self._home.part_of(self.model))
            try:
                getattr(loops, kind)(self)
            except Exception as error:
                log.error = error
                self.model.zero_grad(set_to_none=True)  # how far a backward came before it raised is not looked at
        self.is_over_budget_said |= any("more than its budget" in str(item.message) for item in said)
        log.misses = [str(item.message) for item in said if issubclass(item.category, MismatchWarning)]
        if any("audit" in item.category.__name__.lower() for item in said):
            log.misses.append("AUDIT")
        log.seen |= observe.state_of(self.model, "model", self._home.__name__)
        log.seen |= observe.namespace_of(self._home) | world.generators()
        log.seen |= {name: observe.tensor_text(tensor) for name, tensor in self._held.items()}
        return log


def outcome(
    program: Program,
    *,
    budget: float = 0.75,
    measure: bool = False,
    effort: float = 0.3,
    make: Callable[..., Any] | None = None,
    **options: Any,
) -> Outcome:
    """Train a program by eager and by its plan, from the same state, and compare everything after every step.

    Args:
        program: what to train.
        budget: fraction of the plain step's peak; raised where there is no schedule.
        measure: also measure kernels, and a planned step's peak at the end.
        effort, options: for `planner.plan`.
        make: called instead of `planned_near`.

    Raises:
        Different: the outcome is none of the allowed ones.
    """
    with world.kept():
        home, model = _built(program)
        eager = Run(model, model, home)
        expected = [*_steps(eager, program, 0, program.warm)]
        eager.hold()
        expected += _steps(eager, program, program.warm, len(program.steps))
        forget(home)
    given = {"effort": effort, "costs": "measure" if measure else "estimate", **options}
    with world.kept():
        home, model = _built(program)
        try:
            found = _planned(
                program, home, model, expected, partial(make or planned_near, budget=budget, options=given), measure
            )
            return replace(found, raised=tuple("" if log.error is None else repr(log.error) for log in expected))
        finally:
            forget(home)


def _built(program: Program) -> tuple[types.ModuleType, nn.Module]:
    home = program.load()
    world.seed(1)
    return home, home.build()


def _steps(run: Run, program: Program, first: int, last: int) -> Iterator[_Log]:
    for i in range(first, last):
        yield run.step(i, program.steps[i].kind)


def _planned(
    program: Program, home: Any, model: nn.Module, expected: Sequence[_Log], make: Callable[..., Any], measure: bool
) -> Outcome:
    plain = Run(model, model, home)
    for i, log in enumerate(_steps(plain, program, 0, program.warm)):
        _compare(program, i, expected[i], log, [])
    world.seed(2)
    args = home.inputs()
    try:
        with _unchanged(program, home, model), _quiet(), home.plan_under():
            planned = make(model, args=args)
    except PlannerError as error:
        _check_words(program, [str(error)])
        plain.hold()
        for i, log in enumerate(_steps(plain, program, program.warm, len(program.steps)), program.warm):
            _compare(program, i, expected[i], log, ["(refused, the model itself trains)"])
        return Outcome("refused", (f"{type(error).__name__}: {error}",), "plan")
    except (Different, KeyboardInterrupt):
        raise
    except Exception as error:
        raise Different("crash", f"plan() raised {type(error).__name__}: {str(error)[:300]}", program) from error
    followed = Run(planned, model, home)
    found = _followed(program, followed, expected)
    has_hooks = bool(model._forward_pre_hooks or model._forward_hooks)  # what these allocate is not counted: docs/limits.md
    if measure and found.verdict == "same" and not followed.is_over_budget_said and not has_hooks:
        try:
            _check_peak(program, planned, args)
        except BackwardError as error:  # of gradients in a layout that no step of the program had
            return replace(found, verdict="refused", messages=(f"BackwardError: {error}",), at="one more step")
    return found


def planned_near(model: nn.Module, budget: float, args: Any, options: Mapping[str, Any]) -> Any:
    """A plan for this fraction of the plain peak; where there is no schedule, for the middle between floor and peak, or all."""
    options = {"progress": False, "costs": "estimate", **options}
    options.setdefault("check", options["costs"] == "measure")  # what kernels need for themselves is not estimated
    step = profile(model, args, **options)  # captured once for all budgets; `plan` is this and `step.plan`
    floor_bytes = floor(step.graph)[0]
    middle = int((floor_bytes + step.plain_bytes) // 2 * (1 + _MARGIN))
    for wanted in (budget, middle):
        if step.budget_bytes(wanted) >= floor_bytes:  # else a whole search would look for the lowest peak, to name it
            with contextlib.suppress(InfeasibleBudgetError, NoScheduleFoundError):
                return step.plan(wanted)
    return step.plan(1.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _unchanged(program: Program, home: types.ModuleType, model: nn.Module) -> Iterator[None]:
    """Planning leaves the model, its program's globals and the process as they were, whether it succeeds or not."""

    def now() -> tuple[dict[str, str], dict[str, str]]:
        return observe.state_of(model, "model", home.__name__, ids=True) | world.generators(), observe.namespace_of(home)

    before, switches = now(), world.switches()
    try:
        yield
    finally:
        after = now()
    changed = [*_differences(before[0], after[0]), *_differences(switches, world.switches())]
    kept = {name for name, text in before[1].items() if not name.endswith(" keys") and " of " not in text}
    found = {name: text for name, text in after[1].items() if name in kept or "TRACED" in text}  # but caches may fill
    changed += _differences({name: text for name, text in before[1].items() if name in kept}, found)
    if changed:
        raise Different("planning", "; ".join(changed[:4]), program)


def _followed(program: Program, run: Run, expected: Sequence[_Log]) -> Outcome:
    opaque = ", ".join(getattr(run.module.plan.provenance, "opaque", ()))
    planned, told, messages = [], [], []
    run.hold()
    for i, log in enumerate(_steps(run, program, program.warm, len(program.steps)), program.warm):
        _check_words(program, log.misses)
        messages += log.misses
        if isinstance(log.error, PlannerError) and not isinstance(expected[i].error, PlannerError):
            _check_words(program, [str(log.error)])
            return Outcome("refused", (f"{type(log.error).__name__}: {log.error}",), str(i), (*planned,), (*told,), opaque)
        uncopied = "deepcopy protocol"
        if uncopied in str(expected[i].error) and uncopied not in str(log.error):
            break  # a planned module is copied where eager refuses to: without the graphs of tensors that were left on it
        if "AUDIT" in log.misses:
            raise Different("audit", f"step {i}: the audit accuses the plan", program)
        _compare(program, i, expected[i], log, messages)
        planned.append(log.planned)
        told.append(bool(log.misses))
    return Outcome("mismatch" if messages else "same", (*messages,), "", (*planned,), (*told,), opaque)


def _compare(program: Program, i: int, expected: _Log, found: _Log, messages: Sequence[str]) -> None:
    """Raise Different where a step showed something else than eager's."""
    where = f"step {i} ({program.steps[i].kind})"
    if found.error is not None and type(found.error) is not type(expected.error):
        eager = "runs" if expected.error is None else f"raises {type(expected.error).__name__}"
        text = f"{type(found.error).__name__}: {str(found.error)[:300]}"
        raise Different("crash", f"{where}: {text}; eager {eager}; said: {messages[:2]}", program) from found.error
    seen = expected.seen, found.seen
    if found.error is not None:  # its inputs have gradients, too, of a part of the backward
        seen = tuple({name: text.partition(" .grad ")[0] for name, text in part.items()} for part in seen)
    different = [d for d in _differences(*seen) if not (program.ignored and re.search(program.ignored, d))]
    if found.error is None and expected.error is not None:
        text = f"{type(expected.error).__name__}: {str(expected.error)[:120]}"
        raise Different("no error", f"{where}: eager raises {text}; differs: {different[:2]}", program)
    if different:
        said = f"; said: {[m[:120] for m in messages[:2]]}" if messages else ""
        raise Different("warned" if messages else "silent", f"{where}: {'; '.join(different[:4])}{said}", program)


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    return [
        f"{name}: {expected.get(name, 'absent')[-90:]} -> {found.get(name, 'absent')[-90:]}"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def _check_words(program: Program, messages: Sequence[str]) -> None:
    for message in messages:
        if _INTERNALS.search(message) or not message.strip():
            raise Different("words", message[:300], program)


def _check_peak(program: Program, planned: Any, args: Any) -> None:
    """The measured peak of one more step is at most the budget, if it runs planned as things are now."""
    spare = torch.ones(())

    def step() -> None:
        cut_history(planned.step.joint, planned.original)
        given, _ = pytree.tree_map(lambda leaf: leaf, (args, None))  # the forward may write into lists and dictionaries
        with autocast_of(planned):
            out = planned(*given)
        outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        torch.autograd.backward(outs, [spare.expand(out.shape) for out in outs])

    for module in (planned, *planned.alternatives):
        module.audits = False  # whose generators' states are more than these models
    before = planned.num_unplanned_calls
    step()  # what a first call allocates for good is no part of a step
    if planned.num_unplanned_calls > before:
        return
    above = 0
    for _ in range(_MOST_PLANS):
        planned.zero_grad(set_to_none=True)
        with world.captures() as captured:
            above = logical_peak(step, planned.device)
        if not captured:  # else that was measured, too: the model counts its calls, and came to a plan that is first used here
            break
    graph = planned.plan.graph
    resident = sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)
    if above + resident > planned.plan.budget_bytes:
        text = f"measured {above + resident} bytes, budget {planned.plan.budget_bytes}, predicted {planned.plan.peak_bytes}"
        raise Different("budget", text, program)


def _is_planned(tensor: torch.Tensor) -> bool:
    """The graph behind a tensor has a node of the planner's."""
    frontier, seen = [tensor.grad_fn], set()
    while frontier and len(seen) < 400:
        node = frontier.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if str(getattr(getattr(type(node), "_forward_cls", None), "__module__", "")).startswith("planner."):
            return True
        frontier += [following for following, _ in node.next_functions]
    return False
