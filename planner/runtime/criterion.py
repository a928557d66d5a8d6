"""WithCriterion: a loss computed outside of the model made part of the plan: plan(..., criterion=fn, criterion_args=(y,))."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from planner.errors import InputError
from planner.tracer.faults import calls_users_code
from planner.units import kind

Criterion = Callable[..., Any]
CRITERION_ARGS = "criterion_args"


class WithCriterion(nn.Module):
    """A model and its loss: `loss, output = module(*args, criterion_args=(y,), **kwargs)`.

    The loss is `criterion(output, *criterion_args)`. A call without criterion_args returns the model's output alone.
    state_dict, training mode and attributes are the model's.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.training = model.training

    @calls_users_code
    def forward(self, *args: Any, criterion_args: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """(loss, output), or the output alone without criterion_args."""
        output = self.model(*args, **kwargs)
        return output if criterion_args is None else (self.criterion(output, *criterion_args), output)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Training mode, shared with the model."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        held = self.__dict__.get("_modules") or {}
        self.__dict__["training"] = mode
        if "model" in held:
            self.model.training = mode
        if "criterion" in held:
            self.criterion.train(mode)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = (self.__dict__.get("_modules") or {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state_dict."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model."""
        return self.model.load_state_dict(*args, **kwargs)


def planned_model(module: nn.Module) -> nn.Module:
    """The user's model, without the criterion."""
    return module.model if isinstance(module, WithCriterion) else module


def with_criterion(
    model: nn.Module,
    kwargs: Mapping[str, Any] | None,
    loss: Any,
    opaque: Sequence[str],
    criterion: Criterion | None,
    criterion_args: Sequence[Any] | None,
) -> tuple[nn.Module, dict[str, Any], Any, tuple[str, ...]]:
    """What to plan: (module, kwargs, loss, opaque), with the criterion in the module; unchanged where there is none.

    Raises:
        InputError: criterion and criterion_args do not fit together, or do not fit the model.
    """
    given = dict(kwargs or {})
    if criterion is None:
        if criterion_args is not None:
            raise InputError("criterion_args was given without criterion: pass criterion=your loss function, too")
        return model, given, loss, tuple(opaque)
    if not callable(criterion) or isinstance(criterion, type):
        raise InputError(
            f"criterion takes a function or an nn.Module instance, called as criterion(output, *criterion_args), not "
            f"{kind(criterion)}"
        )
    if not isinstance(criterion_args, (tuple, list)):
        raise InputError(
            f"pass criterion_args=(y,), a tuple of what your loss takes beside the output: criterion_args is "
            f"{kind(criterion_args)}"
        )
    if loss is not None:
        raise InputError("loss= names an output of the model; with criterion= the loss is what the criterion returns")
    if not isinstance(model, nn.Module):
        return model, given, loss, tuple(opaque)  # the capture's error says what is wrong
    if CRITERION_ARGS in given or CRITERION_ARGS in inspect.signature(model.forward).parameters:
        raise InputError(f"the model's own forward takes {CRITERION_ARGS}: leave criterion= out, and name the loss by loss=")
    module = WithCriterion(model, criterion)
    return module, {**given, CRITERION_ARGS: tuple(criterion_args)}, 0, tuple(f"model.{name}" for name in opaque)
