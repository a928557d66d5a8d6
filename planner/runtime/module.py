"""CheckpointedModule: the model with its training step replaced by a planned one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import fx, nn

from planner._torch import box, keeps_graph, pytree
from planner.errors import PlanMissError, PlannerError
from planner.graph.graph import Kind
from planner.graph.plan import Plan
from planner.rewriter.compiled import Compiled
from planner.rewriter.stages import cut_stages
from planner.runtime import guard
from planner.runtime.functions import Boxed, Program, run
from planner.runtime.ranks import communicates, compare_plans
from planner.runtime.shapes import MOST_SHAPES, call_shapes, step_of_other_shape
from planner.runtime.step import Step
from planner.runtime.watch import Watched
from planner.tracer import kernels
from planner.tracer.part import Part


class PlanMissWarning(UserWarning):
    """A call was not the one planned for; the original forward ran instead."""


runs_as_planned: Callable[[Any], Any] = torch.compiler.disable(
    reason="a planned step runs as it was planned; to have it compiled, plan(..., compile=True)"
)
"""Where the user's torch.compile meets a plan, it lets the plan run as it is."""


def report_miss(model: nn.Module, miss: str, warned: set[str], strict: bool, num_plans: int = 1) -> None:
    """Warn, once per reason, that a call runs unplanned. Where that is not allowed, it is an error in training.

    Raises:
        PlanMissError: `strict`, and the call was to train.
    """
    which = "the planned step" if num_plans == 1 else f"one of the {num_plans} planned steps"
    if strict and model.training and torch.is_grad_enabled():
        raise PlanMissError(
            f"{type(model).__name__}: not {which}, {miss} differs. Plan for this call too, or let it run unplanned"
        )
    reason = miss.split(" (")[0]
    if reason not in warned:
        warned.add(reason)
        message = f"{type(model).__name__}: not {which}, {miss} differs; the original forward runs, unplanned"
        warnings.warn(message, PlanMissWarning, stacklevel=5)


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
    """

    def __init__(
        self, model: nn.Module, step: Step, plan: Plan, strict: bool = False, *, program: Program | None = None
    ) -> None:
        object.__setattr__(self, "_original", model)
        super().__init__({}, fx.Graph(), class_name=f"Checkpointed{type(model).__name__}")
        fresh = vars(nn.Module())
        for name, held in vars(model).items():
            if name in fresh and isinstance(held, (dict, set)):
                self.__dict__[name] = held  # shared, so that both modules always hold the same tensors and hooks
        self.__dict__.update(plan=plan, backward_graph=step.halves.backward, _step=step, _warned=set(), strict=strict)
        self.__dict__.update(_others={}, _given=program, _to_compare=communicates(step.joint))
        self.graph = step.halves.forward

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Training mode, shared with the original model."""
        return self._original.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._original.training = mode

    @property
    def device(self) -> torch.device:
        """Where the planned step runs."""
        return self._step.joint.device

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions of the output leaves that backward starts from."""
        return tuple(i for i, out in enumerate(self._step.joint.outputs) if out.differentiated)

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
            self.__dict__["_watched"] = Watched(self._original, names, self._step.key.attributes)
            given = self.__dict__.pop("_given", None)
            self.__dict__["_program"] = given or _compile(self._step, self._original, self._graph, self.backward_graph)
            self.__dict__["_inputs"] = _picker(_positions(self._step))
            self.__dict__["_guards"] = None if self._step.joint.guards is None else _boxed(self._step.joint.guards)
        return code

    @runs_as_planned
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the model; planned if this is the call that was planned for."""
        out, miss = self.attempt(args, kwargs)
        if miss:
            report_miss(self._original, miss, self._warned, self.strict)
            return unplanned_forward(self._original)(*args, **kwargs)
        return out

    def attempt(self, args: Any, kwargs: Any) -> tuple[Any, str]:
        """The planned step's output, or None and what keeps this call from running planned."""
        step = self._step
        tensors, inputs, miss = self._match(args, kwargs)
        if miss:
            other = self._of_other_shape(args, kwargs) if step.recapture is not None and guard.is_about_inputs(miss) else miss
            return other.attempt(args, kwargs) if isinstance(other, CheckpointedModule) else (None, other)
        if self._to_compare:
            self.__dict__["_to_compare"] = False
            compare_plans(step, self.plan)
        with torch.autocast(self.device.type, enabled=False):  # every cast is a node of the graph
            found = run(self._program, inputs)
        leaves = [
            found[out.result] if out.result is not None else tensors[out.input] if out.input is not None else out.constant
            for out in step.joint.outputs
        ]
        return pytree.tree_unflatten(leaves, step.joint.call.out_spec), ""

    def _of_other_shape(self, args: Any, kwargs: Any) -> CheckpointedModule | str:
        """The plan carried over to a call of smaller inputs, made when that shape is first met; or why there is none."""
        key = call_shapes(self._step, args, kwargs)
        if key not in self._others:
            if len(self._others) >= MOST_SHAPES:
                del self._others[next(iter(self._others))]
            try:
                step = step_of_other_shape(self._step, self.plan, self._original, args, kwargs)
                self._others[key] = CheckpointedModule(self._original, step, self.plan, self.strict)
                self._others[key].__dict__["_to_compare"] = False  # it is the plan that was compared
            except PlannerError as error:
                self._others[key] = f"the inputs' shape ({error})"
        return self._others[key]  # type: ignore[no-any-return]

    def difference(self, args: Any, kwargs: Any) -> str:
        """What keeps this call from running planned; '' if nothing does."""
        return self._match(args, kwargs)[2]

    def _match(self, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], Sequence[torch.Tensor], str]:
        """The call's tensors, the graph's inputs, and what differs from the call planned for."""
        step = self._step
        if step.joint.elsewhere:
            return [], [], f"the device (planned from afar for {step.joint.elsewhere}: save the plan, and apply it there)"
        tensors, miss = guard.flatten_call(step.joint.call, args, kwargs)
        if tensors is None:
            return [], [], miss
        held = self._watched.now()
        miss = guard.difference(step.key, self._watched, held, tensors, self.device)
        if miss:
            return tensors, [], miss
        inputs = self._inputs((*held, *tensors, *step.joint.constants.values()))
        return tensors, inputs, self._host_reads_differ(inputs)

    def _host_reads_differ(self, inputs: Sequence[torch.Tensor]) -> str:
        """Name of a tensor value that Python read during capture and that is another now; '' if none is."""
        if self._guards is None:
            return ""
        joint = self._step.joint
        given = dict(zip((i.node for i in joint.inputs if i.kind is not Kind.TANGENT), inputs, strict=True))
        with torch.no_grad(), torch.autocast(joint.device.type, enabled=False):
            read = self._guards([given[node.name] for node in joint.guards.find_nodes(op="placeholder")])
        for tensor, expected in zip(read, joint.host_reads, strict=True):
            value = tensor.item()
            if value != expected.value and not (value != value and expected.value != expected.value):
                return f"the value read at {expected.source} ({value}, planned for {expected.value})"
        return ""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original model's state_dict."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original model, whose tensors these are."""
        return self._original.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedModule:
        return self._twin(copy.deepcopy(self._original, memo))

    def __copy__(self) -> CheckpointedModule:
        return self._twin(self._original)

    def _twin(self, model: nn.Module) -> CheckpointedModule:
        return CheckpointedModule(model, self._step, self.plan, self.strict, program=self.program)

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointedModule, (self._original, self._step, self.plan, self.strict)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _boxed(graph: fx.Graph, parts: Mapping[str, Part] | None = None, compiled_for: torch.device | None = None) -> Boxed:
    twin = fx.Graph()  # a copy: the one people print keeps its readable signature
    twin.output(twin.graph_copy(graph, {}))
    for node in twin.nodes:
        if node.target in (kernels.part, kernels.part_backward):
            key, *given = node.args
            node.target, node.args = _bound((parts or {})[str(key)], node.target is kernels.part), tuple(given)
    if compiled_for is not None:
        with torch.autocast(compiled_for.type, enabled=False):
            return Compiled(twin)
    box(twin)
    return fx.GraphModule({}, twin).forward  # type: ignore[no-any-return]


def _bound(called: Part, is_forward: bool) -> Callable[..., Any]:
    """A kernel of this one part, as fx's code can call it."""

    def part_forward(tensors: Any) -> Any:
        return called.forward(tensors)

    def part_backward(grads: Any, ticket: Any, read: Any, arrived: Any) -> Any:
        return called.backward(grads, ticket, read, arrived, keeps_graph())

    return part_forward if is_forward else part_backward


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Picks these out of a sequence; itemgetter is several times faster than a loop, but takes no tuple of one."""
    return itemgetter(*positions) if len(positions) > 1 else lambda given: [given[i] for i in positions]


def _positions(step: Step) -> list[int]:
    """Per graph input, its position among the model's tensors, the call's, and the constants, one after the other."""
    names = {name: i for i, (name, _) in enumerate(step.key.weights)}
    constants = {node: i for i, node in enumerate(step.joint.constants)}
    num_tensors = len(step.joint.call.tensors)
    sources = []
    for given in step.joint.inputs:
        if given.kind is Kind.TANGENT:
            continue
        if given.node in constants:
            sources.append(len(names) + num_tensors + constants[given.node])
        elif given.kind is Kind.INPUT:
            sources.append(len(names) + int(given.key))
        else:
            sources.append(names[str(given.key)])
    return sources


def _compile(step: Step, model: nn.Module, forward: fx.Graph, backward: fx.Graph) -> Program:
    """Positions and code for the runtime."""
    parts = {key: Part(model.get_submodule(spec.module), spec) for key, spec in step.joint.parts.items()}
    joint, halves = step.joint, step.halves
    compiled_for = joint.device if step.is_compiled else None
    inputs = [given for given in joint.inputs if given.kind is not Kind.TANGENT]
    position = {given.node: i for i, given in enumerate(inputs)}
    owners = [given.node.replace(".", "_") for given, _ in joint.gradients]
    stages = cut_stages(backward, step.num_stages, owners)
    checked = [name for name in halves.saved_inputs if not inputs[position[name]].mutated]
    unchecked = [name for name in halves.saved_inputs if inputs[position[name]].mutated]
    owned = [position[given.node] for given, _ in joint.gradients]
    leaf = {out.result: out for out in reversed(joint.outputs) if out.result is not None}
    return Program(
        forward=_boxed(forward, parts, compiled_for),
        stages=tuple(_boxed(stage.graph, parts, compiled_for) for stage in stages),
        num_outputs=len(joint.results),
        aliased=halves.aliased,
        differentiable=tuple(leaf[i].requires_grad for i in range(len(joint.results))),
        tangents=halves.tangents,
        checked_inputs=tuple(position[name] for name in checked),
        unchecked_inputs=tuple(position[name] for name in unchecked),
        saved_inputs=tuple(
            (name in checked, (checked if name in checked else unchecked).index(name)) for name in halves.saved_inputs
        ),
        owners=tuple(tuple(owned[i] for i in stage.gradients) for stage in stages),
        describe=tuple(leaf[i].name for i in range(len(joint.results))),
        swaps=tuple(any(node.target is kernels.swap_rng_state for node in stage.graph.nodes) for stage in stages),
        device=joint.device,
        tickets=tuple(i for i, name in enumerate(halves.saved) if name in joint.tickets),
    )
