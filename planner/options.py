"""The options of planning, each once: its default, its help and its check.

`plan`, `profile`, `apply`, `sweep`, `max_batch` and the command line take theirs from here. Which function takes which is said
by the `...Keywords` below, which type checkers and editors read; `with_options` adds them to what `help()` and notebooks show.
Needs no torch.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field)

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from planner import arguments, units
from planner.errors import InputError
from planner.limits import DEFAULT_EFFORT, Limits

if TYPE_CHECKING:
    from planner.profiler.estimate import DeviceModel
    from planner.profiler.optimizer import Optimizer
    from planner.runtime.criterion import Criterion
    from planner.tracer.loss import Loss

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of a call of a model."""
Check = Callable[[Any, str], Any]
"""Returns the value of the option of this name as it is used; raises InputError or BudgetError for one that makes no sense."""


def option(default: Any, help: str, details: str = "", check: Check | None = None) -> Any:
    """A field of the options.

    Args:
        default: its default, in Python and at the shell.
        help: one line, shown by `--help` and by `help()`.
        details: more, shown by `help()` alone.
        check: called with the value and the option's name.
    """
    return field(default=default, metadata={"help": help, "details": details, "check": check})


def _costs(value: Any, name: str) -> Any:
    if value is None or (isinstance(value, str) and value in ("measure", "estimate")):
        return value
    raise InputError(f"{name}={units.shown(value)} is not known; use 'measure' or 'estimate'")


def _remeasure(value: Any, name: str) -> Any:
    return None if value is None else arguments.flag(value, name)


def _time_limit(value: Any, name: str) -> Any:
    return None if value is None else arguments.seconds(value, name)


def _reserve(value: Any, name: str) -> int:
    return units.parse_bytes(value, name, least=0)


@dataclass(frozen=True)
class CaptureOptions:
    """What a training step is: where its backward starts, and what of it is not planned."""

    loss: Loss = option(
        None,
        "which output backward starts from: its name ('loss') or its position",
        "Or a function of the output. Default: the output's `.loss` or ['loss'], else its only scalar that requires grad and "
        "depends on every parameter that an output depends on, else every output that requires grad.",
        arguments.loss_choice,
    )
    criterion: Criterion | None = option(
        None,
        "a loss outside of the model, to be planned with it: a function or an nn.Module",
        "It is called as `criterion(output, *criterion_args)`, the planned module as `loss, output = planned(*args, "
        "criterion_args=(y,), **kwargs)`; without criterion_args that returns the output. Its parameters, buffers and "
        "state_dict are the model's alone.",
    )
    criterion_args: Sequence[Any] | None = option(
        None, "an example of what the criterion takes beside the output, such as (targets,)"
    )
    opaque: Collection[str] = option(
        (),
        "qualified names of submodules to run as they are, unplanned",
        "Submodules that cannot be captured (LSTM kernels, hooks, ...) are found without it. Opaque submodules are measured on "
        "the example call: where their memory depends on the data, the peak does too.",
        arguments.names,
    )


@dataclass(frozen=True)
class AccountingOptions:
    """What counts against the budget beside the step."""

    reserve: int | str = option(0, "bytes of the budget to leave free: '1GiB'", check=_reserve)
    optimizer: Optimizer | None = option(
        None,
        "reserve the bytes of its state: a name of torch.optim, such as 'adamw'",
        "Or the optimizer itself (several in a tuple): state that it holds is counted as it is, the rest as after one step. "
        "Or what makes an optimizer of a list of parameters: functools.partial(torch.optim.SGD, momentum=0.9).",
        arguments.optimizer_choice,
    )
    master_weights: bool = option(
        False, "reserve float32 copies of narrower trained parameters, and optimizer state for these", check=arguments.flag
    )

    accumulate: bool = option(
        False,
        "gradients are accumulated over several micro-steps: count those of earlier micro-steps",
        "The first micro-step fits as well.",
        arguments.flag,
    )
    in_flight: int = option(
        1,
        "forwards that have run before the first backward begins, as in a stage of a pipeline: count what each of them saves",
        "The peak of a step is then (in_flight - 1) times what a forward saves plus the peak of one step alone. Inputs of the "
        "other forwards are not counted: reserve them.",
        arguments.count,
    )

    @property
    def reserve_bytes(self) -> int:
        """`reserve` in bytes."""
        return units.parse_bytes(self.reserve, "reserve", least=0)


@dataclass(frozen=True)
class CostOptions:
    """Where the times and workspaces of kernels come from."""

    costs: Literal["measure", "estimate"] | None = option(
        None,
        "'measure' times every distinct kernel on this device (cached on disk); 'estimate' computes times",
        "Default: measure, or estimate for a `device` that is not here.",
        _costs,
    )
    remeasure: bool | None = option(
        None,
        "measure every kernel anew, whatever is on file; no: time nothing again that is on file",
        "Default: of the times on file, those that take most of the step are checked once per process, and replaced where they "
        "were measured on a busy machine. `planner cache --info` says where the file is.",
        _remeasure,
    )
    device: str | DeviceModel | None = option(
        None,
        "plan for a device that is not here: a name such as 'H100-80GB' (an unknown name lists the known)",
        "Or a DeviceModel; see `planner.devices`. Model and inputs may be on the meta device, and nothing is allocated. "
        "Kernels are those that torch runs there, their times are estimated, and workspace is hardly known. The module "
        "returned trains unplanned: save its plan, and `apply` it on the device.",
    )


@dataclass(frozen=True)
class SolverOptions:
    """What the search for a schedule may take."""

    effort: float = option(
        DEFAULT_EFFORT,
        "work for the solver, about its seconds on an idle core",
        "Counted and not timed: the same call gives the same plan on a busy machine and on every rank. The best plan found "
        "by then is returned. `sweep` spends it on all budgets together, `max_batch` three times as much on all batches.",
        arguments.effort,
    )
    time_limit_s: float | None = option(
        None,
        "wall seconds for the solver (default: many times the effort)",
        "The plan records if the time limit stopped the search.",
        _time_limit,
    )
    progress: bool = option(True, "show a bar on stderr for stages that take more than a second", check=arguments.flag)

    @property
    def limits(self) -> Limits:
        """Effort and time together."""
        return Limits(self.effort, self.time_limit_s)


@dataclass(frozen=True)
class RuntimeOptions:
    """How the planned module trains."""

    num_stages: int = option(8, "maximum number of backward stages; gradients are returned after each", check=arguments.count)
    strict: bool = option(
        False,
        "a training call that is not the one planned for raises MismatchError, instead of running unplanned",
        check=arguments.flag,
    )
    dynamic: bool = option(
        False,
        "also run inputs of other sizes as planned, within the budget; plan for the usual batch and length",
        "A step of a new size is captured when it first comes (seconds, and a line on stderr). Up to the planned size it runs "
        "by the plan's schedule; a larger one, or one whose graph is another, is planned anew.",
        arguments.flag,
    )
    sizes: Sequence[Call] = option(
        (),
        "calls of other sizes to capture before training, as (args, kwargs); switches `dynamic` on",
        "No step waits for them later: `sizes=[((x[:4],), {}), ((x[:1],), {})]`.",
        arguments.calls,
    )
    compile: bool = option(
        False,
        "let inductor compile the planned step (minutes)",
        "Results then equal eager's except for rounding. That fused kernels keep the budget is measured by the check alone.",
        arguments.flag,
    )
    also: Sequence[Call] = option(
        (),
        "other calls to plan for within the budget, as (args, kwargs)",
        "Other shapes, other arguments, inputs that require grad beside inputs that do not (a discriminator's): "
        "`also=[((x.detach().requires_grad_(),), {})]`.",
        arguments.calls,
    )
    check: bool = option(
        True,
        "run one planned step at the end: check that it runs, matches eager bit for bit, and fits the budget",
        "Bits are compared on a CPU with memory for a plain step. Where the step needs more than the budget, it is planned "
        "again for less. The plan says what was measured, or why no step was run. On a CPU, a budget that is a fraction of an "
        "estimate holds for estimates; the plan then says what it needs.",
        arguments.flag,
    )
    audit: bool = option(
        True,
        "at the 2nd, 10th, 100th, ... planned call, compare with the original forward, bit by bit",
        "Both run from the same state. Where results or state differ, twice alike, the model trains unplanned from then on, "
        "with a warning (PlanAuditError where `strict`).",
        arguments.flag,
    )


GROUPS = (CaptureOptions, AccountingOptions, CostOptions, SolverOptions, RuntimeOptions)


@dataclass(frozen=True)
class PlanOptions(RuntimeOptions, SolverOptions, CostOptions, AccountingOptions, CaptureOptions):
    """Every option of planning, checked.

    Raises:
        BudgetError: `reserve` cannot be read.
        InputError: a value of another type, or options that exclude each other.
    """

    def __post_init__(self) -> None:
        for name, described in OPTIONS.items():
            check = described.metadata["check"]
            if check is not None:
                object.__setattr__(self, name, check(getattr(self, name), name))
        if self.sizes:
            object.__setattr__(self, "dynamic", True)
        if self.device is not None and self.costs == "measure":
            raise InputError(
                f"costs='measure' runs kernels on this machine, and device={units.shown(self.device)} is not here: leave costs "
                "out to estimate for that device, or leave device out to measure here"
            )
        if self.remeasure and (self.device is not None or self.costs == "estimate"):
            raise InputError("remeasure=True measures kernels here, and these costs are estimated: leave one of the two out")
        if self.device is not None and self.compile:
            raise InputError("compile=True needs the device here; save the plan, and apply(plan, ..., compile=True) there")


OPTIONS: Mapping[str, Field[Any]] = {each.name: each for group in GROUPS for each in fields(group)}
"""By name, in the order of the groups."""


class _CaptureKeywords(TypedDict, total=False):
    loss: Loss
    opaque: Collection[str]


class _CriterionKeywords(TypedDict, total=False):
    criterion: Criterion | None
    criterion_args: Sequence[Any] | None


class _SolveKeywords(TypedDict, total=False):
    reserve: int | str
    optimizer: Optimizer | None
    master_weights: bool
    accumulate: bool
    in_flight: int
    costs: Literal["measure", "estimate"] | None
    remeasure: bool | None
    device: str | DeviceModel | None
    effort: float
    time_limit_s: float | None


class _RuntimeKeywords(TypedDict, total=False):
    num_stages: int
    strict: bool
    dynamic: bool
    sizes: Sequence[Call]
    compile: bool
    check: bool
    audit: bool


class _ProgressKeywords(TypedDict, total=False):
    progress: bool


class MaxBatchKeywords(_CaptureKeywords, _SolveKeywords, _ProgressKeywords, total=False):
    """What `max_batch` takes."""


class SweepKeywords(_CaptureKeywords, _CriterionKeywords, _SolveKeywords, _ProgressKeywords, total=False):
    """What `sweep` takes."""


class EstimateKeywords(_CaptureKeywords, _CriterionKeywords, _SolveKeywords, _ProgressKeywords, total=False):
    """What `estimate` takes."""


class DoctorKeywords(_CaptureKeywords, _CriterionKeywords, _ProgressKeywords, total=False):
    """What `doctor` takes."""

    device: str | DeviceModel | None


class ApplyKeywords(_CaptureKeywords, _CriterionKeywords, _RuntimeKeywords, _ProgressKeywords, total=False):
    """What `apply` takes."""


class PlanKeywords(_CaptureKeywords, _CriterionKeywords, _SolveKeywords, _RuntimeKeywords, _ProgressKeywords, total=False):
    """What `plan` and `profile` take: everything."""

    also: Sequence[Call]


F = TypeVar("F", bound=Callable[..., Any])


def with_options(keywords: type) -> Callable[[F], F]:
    """Add options to the signature and the docstring of a function that takes them as `**options: Unpack[keywords]`."""
    names = [name for name in OPTIONS if name in keywords.__annotations__]

    def described(function: F) -> F:
        bare = inspect.signature(function)
        given = [parameter for parameter in bare.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        taken = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=OPTIONS[name].default, annotation=OPTIONS[name].type
            )
            for name in names
        ]
        function.__signature__ = bare.replace(parameters=[*given, *taken])  # type: ignore[attr-defined]
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Options:\n{_help(names)}\n"
        return function

    return described


def read_options(given: Mapping[str, Any], keywords: type, function: str) -> PlanOptions:
    """The checked options of a call.

    Args:
        given: by name.
        keywords: those that the function takes.
        function: its name, for errors.

    Raises:
        TypeError: the function takes no option of this name.
        BudgetError, InputError: as `PlanOptions`.
    """
    for name in given:
        if name not in keywords.__annotations__:
            close = get_close_matches(name, keywords.__annotations__, n=1)
            cure = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{cure}")
    return PlanOptions(**given)


def _help(names: Sequence[str]) -> str:
    """The options, as a docstring lists arguments."""
    texts = (f"{name}: {OPTIONS[name].metadata['help']}. {OPTIONS[name].metadata['details']}".rstrip() for name in names)
    wrap = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join(wrap.fill(text) for text in texts)
