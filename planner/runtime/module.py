"""CheckpointedModule: the model with its training step replaced by a planned one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import fx, nn

from planner._compat.internals import pytree
from planner.errors import InputError, PlanAuditError, PlannerError
from planner.graph.graph import Kind
from planner.log import RUNTIME
from planner.results.plan import Plan
from planner.runtime.audit import Digest, audit_fits, can_audit, difference, digest, is_due, rewound, run_original
from planner.runtime.autocast_regions import enter_planned, note_unplanned
from planner.runtime.autograd import Program, run
from planner.runtime.copies import with_left_tensors
from planner.runtime.criterion import WithCriterion, planned_model
from planner.runtime.executable import boxed, compiled_backward, compiled_program, picker, positions
from planner.runtime.guards import call
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.guards.model_state import Watched
from planner.runtime.other_backwards import Backwards
from planner.runtime.other_sizes import MOST_SHAPES, call_shapes, step_of_other_shape
from planner.runtime.ranks import communicates, compare_plans
from planner.runtime.reporting import report_miss
from planner.runtime.step import Step
from planner.tracer.faults import is_fault
from planner.tracer.host.state import written

runs_as_planned: Callable[[Any], Any] = torch.compiler.disable(
    reason="a planned step runs as it was planned; to have it compiled, plan(..., compile=True)"
)
"""Decorator: torch.compile does not trace into a planned call."""


def unplanned_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, also while plans are installed in its place."""
    return getattr(model.forward, "unplanned", model.forward)  # type: ignore[no-any-return]


class CheckpointedModule(fx.GraphModule):
    """A drop-in for the model it was made from: same signature, parameters, buffers and state_dict.

    In training, on calls it was planned for, it runs the planned step. Otherwise (eval, no_grad, other
    shapes, ...) it runs the original forward and warns once per reason. `graph` is the planned forward,
    `backward_graph` the planned backward; recomputed nodes end in `_recomputed`, kept activations enter
    the backward as `saved_...`. Submodules, parameters and hooks are shared with the original model.

    Attributes:
        plan: the Plan.
        backward_graph: fx graph of the backward, before it is cut into stages.
        strict: a training call that was not planned for is a PlanMissError instead of a warning.
        audits: now and then the original forward runs beside the planned one, and both are compared.
        alternatives: planned modules of the same model for other calls, which are asked in turn.
        num_planned_calls, num_unplanned_calls: how many calls ran planned, and how many were not the planned one.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        plan: Plan,
        strict: bool = False,
        *,
        program: Program | None = None,
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
        self.__dict__.update(plan=plan, backward_graph=step.halves.backward, _step=step, _warned=set(), strict=strict)
        self.__dict__.update(_others={}, _given=program, num_planned_calls=0, num_unplanned_calls=0)
        self.__dict__.update(_refused=None, _num_runs=0, alternatives=[], audits=audits, _to_compare=communicates(step.joint))
        self.graph = step.halves.forward

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
            InputError: torch.export asks, which would run it as the model itself.
        """
        if torch.compiler.is_exporting():
            raise InputError("torch.export takes the original model, not the planned one: export module.original")
        return self._graph  # type: ignore[no-any-return]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Where the planned step runs."""
        return self._step.joint.device

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions of the output leaves that backward starts from."""
        return tuple(i for i, out in enumerate(self._step.joint.outputs) if out.differentiated)

    def starts(self, leaves: Sequence[Any], model: nn.Module | None = None) -> list[torch.Tensor]:
        """The tensors that backward starts from, as the plan assumes, after a forward.

        Args:
            leaves: the leaves of what the forward returned.
            model: whose forward it was; this module's own model where it is not given.
        """
        joint = self._step.joint
        found = {joint.outputs[i].result: leaves[i] for i in self.differentiated}
        wanted = {out.result for out in joint.left if out.differentiated}
        for effect in joint.host.effects if wanted else ():
            for ref, tensor in written(effect, model or self._original):
                if ref.source == "result" and ref.key in wanted and isinstance(tensor, torch.Tensor):
                    found.setdefault(ref.key, tensor)
        return list(found.values())

    @property
    def step(self) -> Step:
        """The rewritten step, without the model."""
        return self._step  # type: ignore[no-any-return]

    @property
    def program(self) -> Program | None:
        """The compiled step, which copies of the model can share; None where it holds the model's opaque parts."""
        return None if self._step.joint.parts else self._program

    @property
    def original(self) -> nn.Module:
        """The model this was made from."""
        return self._original  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_original", "__deepcopy__"):
                raise
            return getattr(self._original, name)

    def recompile(self) -> Any:
        """Compile the graphs again, after an edit of `graph` or `backward_graph`."""
        code = self._graph.python_code("self")
        self._code = code.src
        if "_step" in self.__dict__:
            names = [name for name, _ in self._step.key.weights]
            self.__dict__["_watched"] = Watched(self._original, names, self._step.joint.host.key)
            given = self.__dict__.pop("_given", None)
            self.__dict__["_program"] = given or compiled_program(self._step, self._original, self._graph, self.backward_graph)
            compiled = compiled_backward(self._step, self._original)
            self.__dict__["_backwards"] = Backwards(self._original, self._step, self.plan, compiled)
            self.__dict__["_inputs"] = picker(positions(self._step))
            self.__dict__["_guards"] = None if self._step.joint.guards is None else boxed(self._step.joint.guards)
        return code

    @runs_as_planned
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the model; planned if this is the call that was planned for."""
        out, miss = self.attempt(args, kwargs)
        if miss is not None:
            report_miss(self._original, miss, self._warned, self.strict)
            note_unplanned([*self._original.parameters()], self.device)
            return unplanned_forward(self._original)(*args, **kwargs)
        return out

    def attempt(self, args: Any, kwargs: Any, *, unplanned: Callable[..., Any] | None = None) -> tuple[Any, Mismatch | None]:
        """The planned step's output, or None and what keeps this call from running planned.

        `unplanned`: the plan is installed, the model's `forward` led to it, and this is what the plan was installed over.
        """
        out, miss = self._attempt(args, kwargs, unplanned)
        self.__dict__["num_unplanned_calls" if miss else "num_planned_calls"] += 1
        return out, miss

    def _attempt(self, args: Any, kwargs: Any, unplanned: Callable[..., Any] | None) -> tuple[Any, Mismatch | None]:
        step = self._step
        if self._refused is not None:
            return None, self._refused
        tensors, inputs, miss = self._match(args, kwargs, unplanned is not None)
        if miss is not None:
            for alternative in self.alternatives:
                out, other_miss = alternative.attempt(args, kwargs, unplanned=unplanned)
                if other_miss is None:
                    return out, None
            other = self._of_other_shape(args, kwargs) if step.recapture is not None and miss.kind == "input" else miss
            return other.attempt(args, kwargs, unplanned=unplanned) if isinstance(other, CheckpointedModule) else (None, other)
        if (used := enter_planned([inputs[i] for i in self._program.cast], self.device)) is not None:
            return None, used
        if self._to_compare:
            self.__dict__["_to_compare"] = False
            compare_plans(step, self.plan)
        self.__dict__["_num_runs"] += 1
        if self.audits and is_due(self._num_runs):
            plain = [given for given in step.joint.inputs if given.kind is not Kind.TANGENT]
            written = [tensor for given, tensor in zip(plain, inputs, strict=True) if given.mutated]
            if audit_fits(self.plan, sum(tensor.nbytes for tensor in written)):
                original = unplanned or unplanned_forward(self._original)
                accused = self._audit(original, args, kwargs, tensors, inputs, written)
                if accused is not None:
                    return None, accused
        return self._run(tensors, inputs), None

    def _run(self, tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
        """The planned forward."""
        with torch.autocast(self.device.type, enabled=False):  # every cast is a node of the graph
            found = run(self._program, inputs, self._backwards)
        return self._returned(found, tensors)

    def _returned(self, found: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
        """What the forward returns, made of the graph's results, with Python state as the forward leaves it."""
        joint = self._step.joint
        leaves = [
            found[out.result] if out.result is not None else tensors[out.input] if out.input is not None else out.constant
            for out in joint.outputs
        ]
        self._write_state(found, tensors)
        return pytree.tree_unflatten(leaves, joint.call.out_spec)

    def _audit(
        self,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        tensors: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        changed: Sequence[torch.Tensor],
    ) -> Mismatch | None:
        """Compare the planned forward with the model's own; unplanned from now on where they differ, twice alike.

        Args:
            forward: the model's own.
            args, kwargs, tensors, inputs: the call, and what the graph takes of it.
            changed: the tensors among the inputs that the forward writes into.

        Raises:
            PlanAuditError: they differ, and `strict`.
        """
        model = self._original
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

        def original() -> Digest:
            return digest(model, run_original(forward, args, kwargs), given, self.device)

        def planned() -> Digest:
            return digest(model, self._forward_alone(tensors, inputs), given, self.device)

        def rewinding(run: Callable[[], Digest]) -> Digest:
            with rewound(model, self._step.joint.host.key, changed, self.device):
                return copy_context().run(run)  # the model's forward may set context variables

        expected, found = rewinding(original), rewinding(planned)
        different = difference(expected, found)
        if different and not difference(expected, rewinding(original)) and not difference(found, rewinding(planned)):
            return self._accuse(different)
        return None

    def _forward_alone(self, tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
        """The planned forward without what it saves for the backward: an audit adds nothing to the memory of a step."""
        program = self._program
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = list(program.forward([tensor.detach() for tensor in inputs])[: program.num_outputs])
        for i, can in enumerate(program.differentiable):
            found[i] = found[i].detach().requires_grad_(can)
        return self._returned(found, tensors)

    def _accuse(self, different: Sequence[str]) -> Mismatch:
        names = ", ".join(different[:5])
        what = f"the planned forward gave another {names} than the model's own, at planned call {self._num_runs}"
        if self.strict:
            raise PlanAuditError(f"{type(self._original).__name__}: {what}. Train unplanned, and please report the model")
        self.__dict__["_refused"] = Mismatch("audit", f"the audit: {what}; please report it with the model")
        return self._refused  # type: ignore[no-any-return]

    def _write_state(self, results: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """Leave in Python state what the model's own forward leaves there."""
        if self._step.joint.host.effects:
            weights = dict((*self._original.named_parameters(), *self._original.named_buffers()))
            sources: dict[str, Any] = {"result": results, "input": tensors, "weight": weights}
            for effect in self._step.joint.host.effects:
                effect.write(self._original, lambda ref: sources[ref.source][ref.key])

    def _of_other_shape(self, args: Any, kwargs: Any) -> CheckpointedModule | Mismatch:
        """The plan carried over to a call of smaller inputs, made when that shape is first met; or why there is none."""
        key = call_shapes(self._step, args, kwargs)
        if key not in self._others:
            if len(self._others) >= MOST_SHAPES:
                del self._others[next(iter(self._others))]
            try:
                step = step_of_other_shape(self._step, self.plan, self._original, args, kwargs)
                self._others[key] = CheckpointedModule(self._original, step, self.plan, self.strict, audits=self.audits)
                self._others[key].__dict__["_to_compare"] = False  # it is the plan that was compared
            except PlannerError as error:
                if is_fault(error):
                    raise
                RUNTIME.warning("inputs of other shapes, which run unplanned: %s", error)
                self._others[key] = Mismatch("input", "the inputs' shape", str(error))
        return self._others[key]  # type: ignore[no-any-return]

    def difference(self, args: Any, kwargs: Any) -> Mismatch | None:
        """What keeps this call from running planned."""
        return self._match(args, kwargs, False)[2]

    def _match(
        self, args: Any, kwargs: Any, through: bool
    ) -> tuple[list[torch.Tensor], Sequence[torch.Tensor], Mismatch | None]:
        """The tensors of the call and of Python state, the graph's inputs, and what differs from the call planned for.

        An error while comparing says that something is not as planned, too.
        """
        try:
            return self._compare(args, kwargs, through)
        except Exception as error:
            RUNTIME.debug("a call cannot be compared with the planned one", exc_info=True)
            return [], [], Mismatch("host", "what the call was compared with", f"{type(error).__name__}: {error}"[:80])

    def _compare(
        self, args: Any, kwargs: Any, through: bool
    ) -> tuple[list[torch.Tensor], Sequence[torch.Tensor], Mismatch | None]:
        step = self._step
        joint = step.joint
        if joint.elsewhere:
            cure = f"planned for {joint.elsewhere}, which is not here: save the plan, and apply it there"
            return [], [], Mismatch("device", "the device", cure)
        tensors, miss = call.flatten_call(joint.call, args, kwargs, step.key.arguments)
        if miss is not None:
            return [], [], miss
        held = self._watched.held()
        if held is None:
            return tensors, [], self._watched.missing()
        miss = call.difference(step.key, self._watched, held, tensors, self.device, through_forward=through)
        if miss is not None:
            return tensors, [], miss
        state = [path.get(self._original) for path in joint.host.state]
        for path, found in zip(joint.host.state, state, strict=True):
            if not isinstance(found, torch.Tensor):
                return tensors, [], Mismatch("host", str(path), type(found).__name__, "a tensor")
        inputs = self._inputs((*held, *tensors, *state, *joint.constants.values()))
        return [*tensors, *state], inputs, call.reads_difference(joint, self._guards, inputs)

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
        made = CheckpointedModule(model, self._step, self.plan, self.strict, program=self.program, audits=self.audits)
        made.alternatives.extend(alternative._with_model(model) for alternative in self.alternatives)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        others = [(other.step, other.plan) for other in self.alternatives]
        return _restored, (self._original, self._step, self.plan, self.strict, self.audits, others)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _restored(
    model: nn.Module, step: Step, plan: Plan, strict: bool, audits: bool, others: Sequence[tuple[Step, Plan]]
) -> CheckpointedModule:
    made = CheckpointedModule(model, step, plan, strict, audits=audits)
    made.alternatives.extend(CheckpointedModule(model, *other, strict, audits=audits) for other in others)
    return made
