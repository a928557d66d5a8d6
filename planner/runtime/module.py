"""CheckpointedModule: the model with its training step replaced by a planned one.

`forward` is what happens in one training call; the methods below it are in the order in which it calls them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from planner.errors import CaptureError, InputError
from planner.results.call_stats import CallStats
from planner.results.plan import Plan
from planner.runtime.audit import can_audit, compare_forwards, is_due
from planner.runtime.autocast_regions import enter_planned, note_unplanned
from planner.runtime.autograd import StepRun, run
from planner.runtime.codegen import backward_compiler, make_executable
from planner.runtime.criterion import WithCriterion, planned_model
from planner.runtime.executable import Executable
from planner.runtime.former_names import FormerNames
from planner.runtime.found_gradients import FoundGradients
from planner.runtime.guards.call import CallGuard, MatchedCall
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.in_flight import InFlight
from planner.runtime.other_backwards import OtherBackwards
from planner.runtime.other_sizes import OtherSizes, larger_than_all, sizes_texts
from planner.runtime.outputs import backward_starts, rebuild_output
from planner.runtime.planned_call import HooksOfModel, resemble, runs_as_planned, unplanned_forward
from planner.runtime.ranks import communicates, compare_plans
from planner.runtime.reporting import EVALUATION, failed_audit, report_mismatch, summary, trains
from planner.runtime.step import RewrittenStep
from planner.tracer.copies import with_left_tensors


class CheckpointedModule(HooksOfModel, FormerNames, fx.GraphModule):
    """A drop-in for the model it was made from: same signature, parameters, buffers and state_dict.

    In training, on calls it was planned for, it runs the planned step. Otherwise (eval, no_grad, other shapes, ...) it runs
    the original forward and warns once per reason. `graph` is the planned forward, `backward_graph` the planned backward;
    recomputed nodes end in `_recomputed`, kept activations enter the backward as `saved_...`. Submodules, parameters and hooks
    are shared with the original model.

    Attributes:
        plan: the Plan.
        backward_graph: fx graph of the backward, before it is cut into stages.
        strict: a training call that was not planned for is a MismatchError instead of a warning.
        audits: at some calls the original forward runs beside the planned one, and both are compared.
        alternatives: planned modules of the same model for other calls, tried in order.
        num_planned_calls, num_unplanned_calls: how many calls ran planned, and how many were not the planned one.
    """

    def __init__(
        self,
        model: nn.Module,
        step: RewrittenStep,
        plan: Plan,
        strict: bool = False,
        *,
        executable: Executable | None = None,
        audits: bool = True,
    ) -> None:
        audits = audits and can_audit(step)
        object.__setattr__(self, "_original", model)
        super().__init__({}, fx.Graph(), class_name=f"Checkpointed{type(model).__name__}")
        fresh = vars(nn.Module())
        if isinstance(model, WithCriterion):  # the model's hooks run within the call
            fresh = {name: fresh[name] for name in ("_parameters", "_buffers", "_modules")}
        for name, held in vars(planned_model(model)).items():
            if name in fresh and isinstance(held, (dict, set)):
                self.__dict__[name] = held  # shared, so that both modules always hold the same tensors and hooks
        self.__dict__.update(plan=plan, backward_graph=step.partitioned.backward, strict=strict, audits=audits)
        self.__dict__.update(alternatives=[], num_planned_calls=0, num_unplanned_calls=0)
        self.__dict__.update(_step=step, _given_executable=executable, _warned=set(), _reasons=Counter())
        self.__dict__.update(_other_sizes=OtherSizes(self._of_other_size), _compares_ranks=communicates(step.joint))
        self.__dict__.update(_found_gradients=FoundGradients(plan, type(model).__name__), _in_flight=InFlight(model))
        self.__dict__.update(_refused=None, num_runs=0, num_audits=0, num_skipped_audits=0)
        resemble(type(self), model)
        self.graph = step.partitioned.forward  # compiles the code: see `recompile`

    @runs_as_planned
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the model; planned if this is the call that was planned for."""
        out, mismatch = self.attempt(args, kwargs)
        if mismatch is None:
            return out
        self._report(mismatch, args, kwargs)
        return unplanned_forward(self._original)(*args, **kwargs)

    def call_original(self, args: Any, kwargs: Any) -> Any:
        """Call the model itself, with all its hooks, where there are hooks of all modules: they are to see the model."""
        mismatch = self.mismatch(args, kwargs)
        if mismatch is not None:
            self._report(mismatch, args, kwargs)
        return self._original(*args, **kwargs)

    def _report(self, mismatch: Mismatch, args: Any, kwargs: Any) -> None:
        """Say that this call runs unplanned, and why.

        Raises:
            MismatchError: it is a training call, and `strict`.
        """
        self.count_unplanned(mismatch)
        larger = larger_than_all([module.step for module in (self, *self.alternatives)], args, kwargs)
        report_mismatch(self._original, mismatch, self._warned, self.strict, larger=larger, is_unit=bool(self.plan.num_calls))
        note_unplanned([*self._original.parameters()], self.device)

    def attempt(
        self, args: Any, kwargs: Any, *, unplanned: Callable[..., Any] | None = None, captures: bool = True
    ) -> tuple[Any, Mismatch | None]:
        """Run the planned step: (its output, None), or (None, why this call does not run planned).

        Args:
            unplanned: the forward that the plan was installed over, where the call came through `model.forward`.
            captures: a call of another size may be captured and planned (`dynamic=True`).
        """
        out, mismatch = self._attempt(args, kwargs, unplanned, captures)
        if mismatch is None:
            self.__dict__["num_planned_calls"] += 1
        return out, mismatch

    def count_unplanned(self, mismatch: Mismatch) -> None:
        """Count a call that no planned module ran, with the reason why this one did not."""
        self.__dict__["num_unplanned_calls"] += 1
        self._reasons[(mismatch.kind, mismatch.where) if trains(self._original) else EVALUATION] += 1

    def _attempt(
        self, args: Any, kwargs: Any, unplanned: Callable[..., Any] | None, captures: bool
    ) -> tuple[Any, Mismatch | None]:
        if self._refused is not None:  # an earlier audit found other results
            return None, self._refused
        call = self._guard.match(args, kwargs, through_forward=unplanned is not None)
        if isinstance(call, Mismatch):
            return self._attempt_others(call, args, kwargs, unplanned, captures)
        mismatch = enter_planned([call.inputs[i] for i in self._executable.cast], self.device)
        if mismatch is not None:
            return None, mismatch
        self._let_go(self)
        if self._compares_ranks:
            self.__dict__["_compares_ranks"] = False
            compare_plans(self._step, self.plan)
        for value in call.lazy:
            value.set(self._original)
        self.__dict__["num_runs"] += 1
        if self.audits and is_due(self.num_runs):
            refused = self._audit(unplanned or unplanned_forward(self._original), call)
            if refused is not None:
                return None, refused
        return self._run(call), None

    def _attempt_others(
        self, mismatch: Mismatch, args: Any, kwargs: Any, unplanned: Callable[..., Any] | None, captures: bool
    ) -> tuple[Any, Mismatch | None]:
        """Run the first alternative that was planned for this call, or plan for its size."""
        is_other_size = self._step.recapture is not None and mismatch.kind in ("input", "value")
        others = self._other_sizes.of_size(self, args, kwargs) if is_other_size else []
        mismatches = []
        for other in (*self.alternatives, *others):
            other.__dict__["_in_flight"] = self._in_flight  # their forwards wait beside this one's
            out, other_mismatch = other.attempt(args, kwargs, unplanned=unplanned, captures=False)
            if other_mismatch is None:
                self._let_go(other)
                return out, None
            mismatches.append(other_mismatch)
        refused = [each for each in mismatches[len(self.alternatives) :] if each.kind == "audit"]
        if refused:  # a plan of this size gave other results: none is made again
            return None, refused[0]
        if not (is_other_size and captures):
            return None, mismatch
        found = self._other_sizes.find(self, args, kwargs)
        if isinstance(found, Mismatch):
            return None, found
        return found.attempt(args, kwargs, unplanned=unplanned, captures=False)

    def _let_go(self, ran: CheckpointedModule) -> None:
        """Let the guards of the other plans hold no state that an earlier call carried: nothing counts its memory."""
        for other in (self, *self.alternatives) if self.alternatives else ():
            if other is not ran:
                other.forget()

    def forget(self) -> None:
        """See `CallGuard.forget`."""
        self._guard.forget()

    def _of_other_size(self, step: RewrittenStep, plan: Plan) -> CheckpointedModule:
        made = CheckpointedModule(self._original, step, plan, self.strict, audits=self.audits)
        # the ranks have compared this plan; what speaks once speaks once for all sizes
        made.__dict__.update(_compares_ranks=False, _found_gradients=self._found_gradients, _in_flight=self._in_flight)
        return made

    def prepare(self, args: Any, kwargs: Any) -> None:
        """Capture a call of another size, and plan it if need be, before it comes.

        Raises:
            CaptureError: it cannot be planned; says why.
        """
        found = self.mismatch(args, kwargs)
        if found is not None and self._step.recapture is not None and found.kind in ("input", "value"):
            others = [other.mismatch(args, kwargs) for other in self._other_sizes.of_size(self, args, kwargs)]
            made = None if None in others else self._other_sizes.find(self, args, kwargs)
            found = made if isinstance(made, Mismatch) else None
        if found is not None:
            raise CaptureError(f"a call of sizes= cannot be planned: {found.explained}")

    def stats(self) -> CallStats:
        """How many calls ran planned, and why the others did not."""
        modules = [self, *self.alternatives, *self._other_sizes.all()]
        return CallStats(
            planned=self.num_planned_calls,
            unplanned=self.num_unplanned_calls - self._reasons[EVALUATION],
            evaluations=self._reasons[EVALUATION],
            reasons=tuple((*reason, count) for reason, count in self._reasons.most_common() if reason != EVALUATION),
            sizes=tuple(zip(sizes_texts(modules), (module.num_runs for module in modules), strict=True)),
            audits=sum(module.num_audits for module in modules),
            skipped_audits=sum(module.num_skipped_audits for module in modules),
            pauses=self.pauses,
        )

    @property
    def pauses(self) -> tuple[tuple[str, float], ...]:
        """What was captured or planned for calls of other sizes, and the seconds of wall clock that it took."""
        return tuple(self._other_sizes.pauses)

    def _audit(self, original: Callable[..., Any], call: MatchedCall) -> Mismatch | None:
        """Compare the planned forward with the model's own; where they differ, all later calls run unplanned.

        Does nothing where the budget has no place for it.

        Raises:
            PlanAuditError: they differ, and `strict`.
        """
        model = self._original
        different = compare_forwards(original, model, self._step, self.plan, self._executable, call)
        if different is None:
            self.__dict__["num_skipped_audits"] += 1
            return None
        if not different:
            self.__dict__["num_audits"] += 1
            return None
        self.__dict__["_refused"] = failed_audit(model, different, self.num_runs, self.strict)
        return self._refused  # type: ignore[no-any-return]

    def _run(self, call: MatchedCall) -> Any:
        """The planned forward, with the planned backward attached to its output."""
        self._found_gradients.look(self._executable, call.inputs)
        with torch.autocast(self.device.type, enabled=False):  # every cast is a node of the graph
            this = StepRun(self._executable, list(call.inputs), self._other_backwards, call.state)
            results = run(self._in_flight.begun(this, self.plan))
        return rebuild_output(self._step.joint, self._original, results, call)

    def recompile(self) -> Any:
        """Compile the graphs again, after an edit of `graph` or `backward_graph`."""
        code = self._graph.python_code("self")
        self._code = code.src
        if "_step" in self.__dict__:
            step, model = self._step, self._original
            executable = self.__dict__.pop("_given_executable", None)
            self.__dict__.update(
                _guard=CallGuard(model, step),
                _executable=executable or make_executable(step, model, self._graph, self.backward_graph),
                _other_backwards=OtherBackwards(model, step, self.plan, backward_compiler(step, model)),
            )
        return code

    def mismatch(self, args: Any, kwargs: Any) -> Mismatch | None:
        """Why this call would not run planned; None if it would."""
        found = self._guard.match(args, kwargs)
        return found if isinstance(found, Mismatch) else None

    def starts(self, leaves: Sequence[Any], model: nn.Module | None = None) -> list[torch.Tensor]:
        """The tensors that the planned backward starts from, after a forward.

        Args:
            leaves: the leaves of what the forward returned.
            model: whose forward it was; by default this module's own model.
        """
        return backward_starts(self._step.joint, model or self._original, leaves)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Training mode, shared with the original model."""
        return self._original.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_step" in self.__dict__:  # nn.Module.__init__ sets it, too
            self._original.training = mode

    @property
    def graph(self) -> fx.Graph:
        """The forward graph, whose inputs are the call's tensors and the model's.

        Raises:
            InputError: torch.export traces this module, and would export the forward graph without its backward.
        """
        if torch.compiler.is_exporting():
            raise InputError("torch.export takes the original model, not the planned one: export module.original")
        return self._graph  # type: ignore[no-any-return]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]

    @property
    def original(self) -> nn.Module:
        """The model this was made from."""
        return self._original  # type: ignore[no-any-return]

    @property
    def step(self) -> RewrittenStep:
        """The rewritten step, without the model."""
        return self._step  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the planned step runs."""
        return self._step.joint.device

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions of the output leaves that backward starts from."""
        return tuple(i for i, out in enumerate(self._step.joint.outputs) if out.differentiated)

    @property
    def executable(self) -> Executable | None:
        """The step's code, which copies of the model can share; None where it is bound to the model's opaque modules."""
        return None if self._step.joint.opaque_calls else self._executable

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_original", "__deepcopy__"):
                raise
            return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the model there: hooks and loops hold this module in the model's place."""
        if "_step" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            super().__delattr__(name)
        else:
            delattr(self._original, name)

    def __repr__(self) -> str:
        """One line: inside of a larger model, print(model) shows this in place of the generated code and all submodules."""
        return f"{type(self).__name__}({summary(self.plan, len(self.alternatives))})"

    def __str__(self) -> str:
        """The plan's table, and those of the alternatives; `code` holds the planned forward as Python."""
        plans = (self.plan, *(alternative.plan for alternative in self.alternatives))
        return "\n\n".join((repr(self), *map(str, plans)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original model's state_dict."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original model, whose tensors these are."""
        return self._original.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedModule:
        return self._with_model(copy.deepcopy(self._original, with_left_tensors(self._original, memo)))

    def __copy__(self) -> CheckpointedModule:
        return self._with_model(self._original)

    def _with_model(self, model: nn.Module) -> CheckpointedModule:
        made = CheckpointedModule(model, self._step, self.plan, self.strict, executable=self.executable, audits=self.audits)
        made.alternatives.extend(alternative._with_model(model) for alternative in self.alternatives)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        others = [(other.step, other.plan) for other in self.alternatives]
        return _restored, (self._original, self._step, self.plan, self.strict, self.audits, others)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _restored(
    model: nn.Module,
    step: RewrittenStep,
    plan: Plan,
    strict: bool,
    audits: bool,
    others: Sequence[tuple[RewrittenStep, Plan]],
) -> CheckpointedModule:
    made = CheckpointedModule(model, step, plan, strict, audits=audits)
    made.alternatives.extend(CheckpointedModule(model, *other, strict, audits=audits) for other in others)
    return made
