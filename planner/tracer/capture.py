"""nn.Module + example inputs -> Joint: trace forward and backward of the module itself, under fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner import _torch
from planner._torch import pytree
from planner.errors import CaptureError, InputError, PlannerError
from planner.tracer import fidelity, parts
from planner.tracer.casts import Casts
from planner.tracer.checks import check_elsewhere, check_trainable, one_device
from planner.tracer.collectives import Refusing
from planner.tracer.constants import Constants
from planner.tracer.elsewhere import Elsewhere
from planner.tracer.joint import CallSpec, Joint, Output
from planner.tracer.normalize import normalize
from planner.tracer.part import PartCall
from planner.tracer.record import record

Loss = str | int | Callable[[Any], torch.Tensor | Sequence[torch.Tensor]] | None


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    opaque: Collection[str] = (),
    elsewhere: Elsewhere | None = None,
) -> Joint:
    """Capture one training step of `model(*args, **kwargs)` as a joint graph.

    Nothing is allocated and the model is left as it was. If the model reads tensor values (`.item()`,
    `if mask.all()`), one real forward is run without keeping activations, to learn them. A submodule that cannot be
    captured becomes an opaque part, which runs as it is: for these, too, a real forward is run, and theirs a few times more.

    Args:
        model: in training mode, on the device it will train on.
        args, kwargs: an example call; tensors in any pytree, other leaves are held fixed.
        loss: which output backward starts from: attribute or key ("loss"), position, or a function of
            the output. Default: the output if it is one scalar; its `.loss` or ["loss"]; else every
            output that requires grad.
        opaque: qualified names of submodules to run as they are.
        elsewhere: a device that is not here, to capture for. The model and its inputs may then be on the meta device.

    Raises:
        InputError: the model or the inputs cannot be planned as they are.
        CaptureError: the model cannot be traced; names the operation and the user's line.
    """
    opaque, first = parts.parts_from_start(model, opaque), None
    if elsewhere is not None and opaque:
        raise CaptureError(
            f"{', '.join(opaque)} cannot be captured and would run as it is, and what that takes is measured on the device: "
            f"plan where {elsewhere.name} is"
        )
    while True:
        try:
            return _capture(model, tuple(args), dict(kwargs or {}), loss, opaque, elsewhere)
        except CaptureError as error:
            if elsewhere is not None:
                raise
            first = first or error
            opaque = parts.widened(model, tuple(opaque), error.module)
            if not opaque:
                raise first from None


def _capture(
    model: nn.Module, args: Any, kwargs: Any, loss: Loss, opaque: Collection[str], elsewhere: Elsewhere | None
) -> Joint:
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    check_trainable(model, len(tensors))
    if elsewhere is None:
        device = one_device(model, [leaves[i] for i in tensors])
    else:
        check_elsewhere(elsewhere)
        device = elsewhere.device
    template = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    step = Step(model, template, tensors, in_spec, loss, elsewhere)
    step.parts, step.device = tuple(opaque), device
    given = [leaves[i] if leaves[i].is_leaf else leaves[i].detach().requires_grad_() for i in tensors]
    with fidelity.untouched(model):
        installed = getattr(vars(model).get("forward"), "unplanned", None)
        if installed is not None:  # a plan is made of the model's own forward, not of a plan
            vars(model)["forward"] = installed
        exported = _export(step, given)
        _refuse_counting(step, given, exported)
    joint = normalize(
        exported,
        names=step.names,
        outputs=step.outputs,
        num_results=step.num_results,
        reads=step.reads,
        call=CallSpec(in_spec, template, tensors, step.out_spec),
        device=device,
        parts=step.calls,
    )
    return replace(
        joint,
        volatile=frozenset((change.module, change.name) for change in step.changes),
        elsewhere="" if elsewhere is None else elsewhere.name,
    )


def _refuse_counting(step: Step, tensors: Sequence[torch.Tensor], exported: _torch.ExportedJoint) -> None:
    """Raise CaptureError where the forward steers by something that Python changes from call to call.

    What it changes among plain attributes is left changed, and the next call is traced too: both must be the same.
    """
    modules = dict(enumerate(step.model.named_modules()))
    counted = [change for change in step.changes if change.steers]
    for change in counted:
        if change.module < 0:
            raise CaptureError(
                "the model's forward draws from Python's random module; a plan would repeat one draw for ever. Draw with torch",
                module=step.drew,
            )
        vars(modules[change.module][1])[change.name] = change.after
    if counted and not _same_trace(exported, _export(step, tensors)):
        change = counted[0]
        module = modules[change.module][0]
        where = f"{module}.{change.name}".strip(".")
        raise CaptureError(
            f"the model's forward changes its attribute {where} ({change.before!r} before, {change.after!r} after), and the "
            "next call is another one; a plan would repeat one for ever. Run the model once before planning if only the first "
            "call differs; else make it a buffer, or change it outside of forward",
            module=module,
        )


def _same_trace(one: _torch.ExportedJoint, other: _torch.ExportedJoint) -> bool:
    constants = [{name: tensor for name, tensor in vars(e.graph_module).items() if _is_constant(tensor)} for e in (one, other)]
    if one.graph_module.code != other.graph_module.code or constants[0].keys() != constants[1].keys():
        return False
    return all(torch.equal(tensor, constants[1][name]) for name, tensor in constants[0].items())


_IN_PLACE = (
    "{} at {}: torch.distributed's collectives write in place, which no graph can hold. Use the functional ones "
    "(torch.distributed._functional_collectives.all_reduce(x, 'sum', group) and its like), communicate outside of forward, or "
    "plan submodules that do not communicate"
)


def _is_constant(held: Any) -> bool:
    return isinstance(held, torch.Tensor) and not isinstance(held, _torch.FakeTensor)


def _export(step: Step, tensors: Sequence[torch.Tensor]) -> _torch.ExportedJoint:
    """Trace; if the model reads tensor values, or has opaque parts, learn about these in a real forward before."""
    try:
        if step.parts:
            step.record(tensors)
        try:
            return step.export(tensors)
        except _torch.DataDependentOutputException:
            step.record(tensors)
            return step.export(tensors)
    except PlannerError:
        raise
    except _torch.DynamicOutputShapeException as error:
        raise CaptureError(
            f"{error.func} at {step.where} makes a tensor whose shape depends on the data; "
            "a plan needs fixed shapes. Rewrite it with a mask, or leave this part out of the planned module.",
            module=step.where_module,
        ) from error
    except (_torch.DataDependentOutputException, _torch.UnsupportedOperatorException) as error:
        raise CaptureError(
            f"{error.func} at {step.where} depends on tensor values in a way that cannot be captured", module=step.where_module
        ) from error
    except _torch.InPlaceCollectiveError as error:
        raise InputError(_IN_PLACE.format(error, step.where)) from error
    except Exception as error:
        where = f" (last kernel at {step.where})" if step.where else ""
        message = (str(error).splitlines() or [""])[0]
        raise CaptureError(
            f"the model cannot be captured{where}: {type(error).__name__}: {message}", module=step.where_module
        ) from error


class _Handed(torch.autograd.Function):
    """Identity that makes an output a tensor of its own to the tracer, so that it gets its own tangent."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Step(nn.Module):
    """The traced module: flat tensors in, flat tensors out, every parameter exactly once (tied ones too).

    Attributes:
        names: unique parameters' and buffers' names in the model, by their names here.
        outputs: one Output per output leaf.
        num_results: how many results of the traced function stand for outputs.
        reads: host reads of the last trace; their tensors follow the outputs.
        recorded: values to answer host reads with, once a real forward has been run.
        changes: what the forward changes on Python's side.
        parts: names of the submodules that run as they are.
        calls: their calls, as recorded, by key.
    """

    def __init__(
        self,
        model: nn.Module,
        template: tuple[Any, ...],
        tensors: tuple[int, ...],
        in_spec: Any,
        loss: Loss,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        super().__init__()
        self._elsewhere = elsewhere
        self._hidden = (model,)  # in a tuple, so that it is no submodule and its parameters are not listed twice
        self._template, self._tensors, self._in_spec, self._loss = template, tensors, in_spec, loss
        self._modules_running = fidelity.ModuleStack(model)
        self.names: dict[str, str] = {}
        for i, (name, parameter) in enumerate(model.named_parameters()):
            self.register_parameter(f"p{i}", parameter)
            self.names[f"p{i}"] = name
        for i, (name, buffer) in enumerate(model.named_buffers()):
            self.register_buffer(f"b{i}", buffer)
            self.names[f"b{i}"] = name
        self.recorded: list[tuple[str, Any]] | None = None
        self.out_spec: Any = None
        self.outputs: list[Output] = []
        self.num_results = 0
        self.reads: list[tuple[Any, str]] = []
        self.where = ""
        self.changes: list[fidelity.Change] = []
        self.parts: Sequence[str] = ()
        self.calls: dict[str, PartCall] = {}
        self.device = torch.device("cpu")

    @property
    def where_module(self) -> str:
        """The submodule that ran the kernel called last."""
        return self.where.rpartition(" ")[0]

    @property
    def drew(self) -> str:
        """The submodule that drew from Python's random module."""
        return self._modules_running.drew

    def export(self, tensors: Sequence[torch.Tensor]) -> _torch.ExportedJoint:
        """Trace forward and backward."""
        with parts.known(self.calls):
            if self._elsewhere is None:
                return _torch.export_joint(self, _torch.fake_inputs(tensors))
            return self._elsewhere.as_there(_torch.export_joint(self, self._stand_ins(tensors), self._elsewhere.choices))

    def _stand_ins(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hold tensors without data from now on, and return the inputs as such."""
        held = (*self.named_parameters(), *self.named_buffers())
        made = _torch.stand_ins([*(tensor for _, tensor in held), *tensors])
        for (name, _), stand_in in zip(held, made, strict=False):
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(stand_in, stand_in.requires_grad)
            else:
                self._buffers[name] = stand_in
        return made[len(held) :]

    def record(self, tensors: Sequence[torch.Tensor]) -> None:
        """Run a real forward, to learn what Python reads and what the parts do."""
        held = (*self.model.parameters(), *self.model.buffers(), *tensors)
        if self._elsewhere is not None and any(t.is_meta or isinstance(t, _torch.FakeTensor) for t in held):
            raise CaptureError(
                f"the model reads tensor values in its forward ({self.where}), which a model or an input without storage does "
                "not have: build both on the CPU",
                module=self.where_module,
            )

        def run() -> Any:
            with Refusing(self.parts):
                return self.call(tensors)

        self.recorded, self.calls = record(self.model, run, tensors, self.parts, self.device)

    @property
    def model(self) -> nn.Module:
        """The model being traced."""
        return self._hidden[0]

    def call(self, tensors: Sequence[torch.Tensor], weights: dict[str, torch.Tensor] | None = None) -> Any:
        """The model on the call's leaves with `tensors` in place; tied parameters follow their one name in `weights`."""
        leaves = list(self._template)
        for position, tensor in zip(self._tensors, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        if weights is None:
            return self.model(*args, **kwargs)
        return torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=True)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The traced function: results, then tensors that Python read."""
        given = {name: getattr(self, here) for here, name in self.names.items()}
        weights = dict(given)
        casts = Casts()
        constants = Constants() if self._elsewhere is not None else None
        tracing = fidelity.Tracing(self._modules_running, self.recorded, casts, constants)
        try:
            with (
                fidelity.restored(self.model) as self.changes,
                parts.tracing(self.model, self.calls),
                self._modules_running.following(),
                casts.counting(),
                tracing,
            ):
                out = self.call(tensors, weights)
                _write_reassigned(given, weights)
        finally:
            self.where = tracing.where
        paths, self.out_spec = pytree.tree_flatten_with_path(out)
        handed = self._hand_out(out, paths, tensors)
        self.reads = [(value, where) for _, value, where in tracing.read]
        read = [tensor.detach() for tensor, _, _ in tracing.read]
        return (*handed, *read)

    def _hand_out(self, out: Any, paths: list[Any], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sort the output's leaves into results, handed through and constant; cut off what is not differentiated."""
        leaves = [leaf for _, leaf in paths]
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                _check_constant(leaf)
        starts = {id(leaf) for leaf in loss_leaves(out, leaves, self._loss)}
        names = [pytree.keystr(path).strip(".").removeprefix("['").removesuffix("']") or "the output" for path, _ in paths]
        self.outputs = []
        results: dict[int, torch.Tensor] = {}  # by identity: a tensor returned twice is one result
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, torch.Tensor):
                self.outputs.append(Output(name, None, constant=leaf))
            elif any(leaf is tensor for tensor in tensors):
                position = next(j for j, tensor in enumerate(tensors) if leaf is tensor)
                self.outputs.append(Output(name, None, input=position))
            else:
                differentiated = id(leaf) in starts
                results.setdefault(id(leaf), _Handed.apply(leaf) if differentiated else leaf.detach())
                self.outputs.append(Output(name, list(results).index(id(leaf)), differentiated, leaf.requires_grad))
        self.num_results = len(results)
        return list(results.values())


def _write_reassigned(given: dict[str, torch.Tensor], left: dict[str, torch.Tensor]) -> None:
    """Turn `self.buffer = new` in the model's forward into a write, which the graph can hold.

    functional_call leaves in its dictionary what the module held at the end of the forward.
    """
    for name, tensor in given.items():
        new = left[name]
        if new is tensor:
            continue
        if isinstance(tensor, nn.Parameter) or new.shape != tensor.shape or new.dtype != tensor.dtype:
            raise CaptureError(f"the model's forward replaces {name} by another tensor; only in-place updates can be planned")
        tensor.copy_(new.detach())


def _check_constant(leaf: Any) -> None:
    if not isinstance(leaf, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))):
        kind = type(leaf)
        raise CaptureError(
            f"the model returns a {kind.__module__}.{kind.__qualname__}, which is not a known container. Register it: "
            f"torch.utils._pytree.register_pytree_node({kind.__qualname__}, flatten, unflatten) "
            "(torch.export.register_dataclass for a dataclass), or switch it off (transformers: use_cache=False)"
        )


def loss_leaves(out: Any, leaves: list[Any], loss: Loss) -> list[torch.Tensor]:
    """The output leaves that backward starts from; `loss` as for `capture`."""
    candidates = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if loss is None:
        named = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        chosen = [named] if isinstance(named, torch.Tensor) else candidates
    elif callable(loss):
        picked = loss(out)
        chosen = [picked] if isinstance(picked, torch.Tensor) else list(picked)
    else:
        chosen = [_member(out, loss)]
    for leaf in chosen:
        if not isinstance(leaf, torch.Tensor) or not any(leaf is other for other in leaves):
            raise InputError(f"loss={loss!r} does not name a tensor of the model's output (found {type(leaf).__name__})")
        if not leaf.requires_grad:
            raise InputError(f"the output named by loss={loss!r} does not require grad: nothing to differentiate")
    if not chosen:
        raise InputError("no output of the model requires grad: nothing to differentiate")
    return chosen


def _member(out: Any, loss: str | int) -> Any:
    try:
        if isinstance(loss, str) and hasattr(out, loss):
            return getattr(out, loss)
        if isinstance(out, torch.Tensor):
            raise TypeError("it is a single tensor")
        return out[loss]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"the model's output has no {loss!r}: {type(error).__name__}: {error}") from error
