"""Real steps of a copy of the model, with planned units: how units are called, its peak, what it holds between them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from planner._compat import pytree
from planner._compat.switches import in_transform
from planner.composite.marked import joined, mark_module
from planner.composite.submodule_calls import SubmoduleCalls
from planner.composite.training_step import Autocast, TrainingStep
from planner.errors import CaptureError, InputError, MismatchError, PlannerError
from planner.graph.outer import MeasuredSection
from planner.log import PLANNER
from planner.profiler.marks import Mark, marked_sections
from planner.results.plan import Plan
from planner.runtime.executable import Executable
from planner.runtime.guards.call import CallGuard
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.install import install, uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import RewrittenStep
from planner.tracer.call import own_tensors
from planner.tracer.capture import running_steps
from planner.tracer.checks import check_gradients_recorded, check_trains
from planner.tracer.copies import with_left_tensors
from planner.tracer.faults import concerns_model, is_out_of_memory
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.generators import Generators, seed_own
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.observe import Observer
from planner.tracer.host.preserve import Preserved, keep_model, model_preserved
from planner.tracer.loss import Loss
from planner.tracer.module_stack import ModuleStack
from planner.tracer.opaque.measure import FIRST_DRAWS, MOST_DRAWS, upper_bound
from planner.tracer.refusal import own_words

_FIRST_SEEDS, _SEEDS = 4, 32
"""Seeds that are tried for the step that saves most; the first ones are all if they make no difference."""
Made = tuple[RewrittenStep, Plan, Executable | None]
"""What a planned module of a unit is made of, beside the unit; the code is shared by units that run the same step."""


@dataclass(frozen=True, slots=True)
class Call:
    """A submodule's call in a step; tensors as they arrive, without what they were computed from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: Autocast


class Trial:
    """A copy of the model, to run real steps on.

    Attributes:
        submodules: what the step does with submodules.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss, *, accumulates: bool = False
    ) -> None:
        """`accumulates`: gradients are accumulated over several steps, whose second one counts, too."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        check_gradients_recorded()
        check_trains(model, len(tensors))
        try:
            self.original, self.model = model, copy.deepcopy(model, with_left_tensors(model, {}))
        except Exception as error:
            if not concerns_model(error):
                raise
            raise InputError(f"the model cannot be copied, and steps are measured on a copy: {own_words(error)}") from error
        for module in self.model.modules():
            uninstall(module)
        self._call = args, kwargs
        self.step = TrainingStep(self.model, *own_tensors(args, kwargs), loss, accumulates=accumulates)
        self.held_bytes = 0
        self.device = self.step.device
        self.autocast = Autocast.of(self.device)
        self.submodules = SubmoduleCalls(self.model)
        self.is_random = False
        self._saved_on_host: Callable[[], contextlib.AbstractContextManager[Any]] = torch.autograd.graph.save_on_cpu
        buffers = list(self.model.buffers())
        self._observer = Observer(self.model, ModuleStack(self.model), (), self.device, buffers)
        self._observer.preserved.restore()  # its guards of iterators; `untouched` puts others in their places
        try:
            self.step.fix_random_state()
            self._observe_step()
        except PlannerError:
            raise
        except Exception as error:
            if not concerns_model(error):
                raise
            if self.submodules.follows_nodes:
                raise CaptureError(
                    "the forward follows autograd's graph (grad_fn.next_functions), which is another one around units: a step "
                    f"of the model {own_words(error)}. Plan with planner.plan, or train the model as it is"
                ) from error
            raise InputError(f"correct the model or the example call: a step of the model {own_words(error)}") from error

    def _observe_step(self) -> None:
        """Observe the step, of those with other random numbers the one that saves most.

        Where a forward takes derivatives by torch.func, which allows no hooks on saved tensors, these stay on the device, and
        the random state is the present one.
        """
        try:
            draws = self._observe()
        except RuntimeError as error:
            if isinstance(error, PlannerError) or is_out_of_memory(error):
                raise
            PLANNER.debug("a step with saved tensors in the host's memory fails; once more without", exc_info=True)
            self._saved_on_host = contextlib.nullcontext
            draws = self._observe()
        self.is_random = draws or bool(self._own_generators())
        allows_hooks = self._saved_on_host is not contextlib.nullcontext
        if self.is_random and allows_hooks and self._choose_random_state():
            self._observe()

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call."""
        return self._call

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Steps leave no trace in the copy, the call's tensors, the random state, or what code shares with the model itself."""
        seen = self._observer.preserved
        with model_preserved(self.model, [*self.model.buffers(), *self.step.inputs]), seen.checkpoint(), iterators_copied():
            try:  # what was first seen inside is restored first: it was found with the guards of the others in place
                yield
            finally:
                seen.restore()
                self.step.clear_gradients()

    @contextlib.contextmanager
    def _planned(self, made: Mapping[str, Made]) -> Iterator[dict[str, CheckpointedModule]]:
        """While entered, the copy's units run planned, and steps leave no trace."""
        modules = {
            name: CheckpointedModule(
                self.model.get_submodule(name),
                step,
                replace(plan, num_calls=self.submodules.counts[name]),
                executable=executable,
                audits=False,
            )
            for name, (step, plan, executable) in made.items()
        }
        try:
            for module in modules.values():
                install(module.original, module, strict=True)
            with self.untouched(), running_steps():
                yield modules
        except MismatchError as error:
            name = next((name for name, module in modules.items() if module.num_unplanned_calls), "")
            if not name:
                raise
            raise CaptureError(f"leave {name} out of the units: in a further step, the model calls it otherwise") from error
        except Exception as error:
            if isinstance(error, PlannerError) or not concerns_model(error):
                raise
            raise CaptureError(
                f"correct the model, or plan a submodule of it: a further step {own_words(error)}; the first one did not"
            ) from error
        finally:
            for module in modules.values():
                uninstall(module.original)

    def peak(self, made: Mapping[str, Made], *, varies: bool = False) -> int | None:
        """The measured peak of a step with these units planned, everything resident included; None: out of memory.

        Args:
            varies: it may depend on the data. An upper bound then, from steps with data drawn from the example's, too.
        """
        found: list[int] = []
        for draw in range(MOST_DRAWS if varies else 1):
            if draw >= FIRST_DRAWS and len({*found}) == 1:
                break
            fits = [True]
            try:
                with self._planned(made), _none_without_memory() as fits:
                    self.step.run()  # what a first call allocates for good is no part of a step
                    self.step.draw_inputs(draw)
                    found.append(self.step.peak())
            except PlannerError as error:
                if draw == 0:
                    raise
                PLANNER.debug("a step does not run on other data: %s", error)
            if not fits:
                return None
        return upper_bound(found)

    def sections(self, made: Mapping[str, Made]) -> list[MeasuredSection] | None:
        """What a step with these units planned holds, in order of time; None: out of memory.

        Where gradients are accumulated, a second micro-step, above `held_bytes`.
        """
        found: list[MeasuredSection] = []
        with self._planned(made) as modules, _none_without_memory() as fits:
            self.step.run()
            is_first = not self.step.accumulates
            if is_first:
                self.step.clear_gradients()
            self.held_bytes = self.step.gradient_bytes

            def run(mark: Mark) -> None:
                for name, module in modules.items():
                    mark_module(module, name, mark)
                self.step.run(is_first=is_first)

            found = marked_sections(run, self.device)
        return joined(found) if fits else None

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters, buffers and inputs, each storage once."""
        return self.step.resident_bytes

    def _choose_random_state(self) -> bool:
        """Fix the random state, of those that are tried, for which a forward saves most; whether it is another one than now.

        What a model skips at random (LayerDrop, stochastic depth), or calls once more, then counts in the peak, and is a unit.
        """
        own = self._own_generators()
        self.step.fix_random_state(own)
        first = best = self.step.random_state
        most = least = self._saved_bytes()
        for seed in range(_SEEDS):
            if seed == _FIRST_SEEDS and most == least:
                break
            with self.untouched():
                Generators(self.device).seed(seed)
                for generator in own:
                    seed_own(generator, seed)
                self.step.fix_random_state(own)
            saved = self._saved_bytes()
            least = min(least, saved)
            if saved > most:
                most, best = saved, self.step.random_state
        self.step.random_state = best
        return best is not first

    def _own_generators(self) -> list[Any]:
        """Generators that the model's code holds itself, in attributes, containers and the variables that it reads."""
        held = (*keep_model(self.model, Preserved(guards_iterators=False)).held, *self._observer.preserved.held)
        return list({id(value): value for value in held if is_generator(value)}.values())

    def _saved_bytes(self) -> int:
        """Bytes that a forward saves for its backward; they lie in the host's memory."""
        nbytes = 0

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            nonlocal nbytes
            nbytes += tensor.numel() * tensor.element_size()
            return tensor.device, tensor.cpu()

        def unpack(held: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            return held[1].to(held[0])

        with self.untouched(), torch.autograd.graph.saved_tensors_hooks(pack, unpack), self._observer.remembering():
            self.step.restore_random_state()
            self.step.forward()
        return nbytes

    def _observe(self) -> bool:
        """Run a step, and note what it does with submodules. Returns whether it draws from the default generators."""
        self.submodules, generators = SubmoduleCalls(self.model), Generators(self.device)
        with self.untouched(), self._saved_on_host(), self.submodules.noted(self._observer):
            before = generators.of_torch(), generators.host()
            self.step.run()
            return before != (generators.of_torch(), generators.host())

    def record(self, names: Sequence[str]) -> dict[str, list[Call]]:
        """Run a forward, and keep the arguments of each call of these submodules; what it saves lies in the host's memory."""
        found: dict[str, list[Call]] = {}

        def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled() and not in_transform():
                found.setdefault(name, []).append(Call(*own_tensors(args, kwargs), Autocast.of(self.device)))

        modules = [(name, self.model.get_submodule(name)) for name in names]
        with self.untouched(), self._saved_on_host():
            hooks = [module.register_forward_pre_hook(partial(before, name), with_kwargs=True) for name, module in modules]
            try:
                self.step.restore_random_state()
                self.step.forward()
            finally:
                for hook in hooks:
                    hook.remove()
        return found

    def mismatches(self, steps: Mapping[str, RewrittenStep]) -> dict[str, Mismatch]:
        """Which of these units two successive forwards call otherwise than planned, and what differs first.

        Args:
            steps: per unit, its planned step.
        """
        found: dict[str, Mismatch] = {}
        modules = {name: self.model.get_submodule(name) for name in steps}
        guards = {name: CallGuard(module, steps[name]) for name, module in modules.items()}
        hooks: dict[str, RemovableHandle] = {}

        def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            hooks.pop(name).remove()  # a hook is a difference of its own
            match = guards[name].match(args, kwargs)
            if isinstance(match, Mismatch):
                found.setdefault(name, match)

        with self.untouched(), self._saved_on_host():
            for _ in range(2):
                for name, module in modules.items():
                    hooks[name] = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                try:
                    self.step.forward()
                finally:
                    while hooks:
                        hooks.popitem()[1].remove()
        return found


@contextlib.contextmanager
def _none_without_memory() -> Iterator[list[bool]]:
    """Lack of memory ends the block quietly; the list is then empty."""
    fits = [True]
    try:
        yield fits
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits.clear()
