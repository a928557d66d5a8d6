"""Every private name of torch and inductor that this package uses, in one list, and the check that the installed torch has it.

Importing `planner._compat` checks `REQUIRED`; the first compilation checks `INDUCTOR`, which takes seconds to import. No
version is compared: a torch that has every name is used. A new private name is added here in the commit that uses it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from planner.errors import UnsupportedTorchError

SUPPORTED_TORCH = ">=2.11,<2.16"
"""The releases that the tests have passed on, as in pyproject.toml."""
READ_BY_TORCH = frozenset({"_wrapped_number"})
"""Attributes that torch's C++ looks up on tensors while the user's Python code is what runs."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names of one module, or attributes of one kind of object.

    Attributes:
        home: dotted name of the module; for attributes, of the kind of object.
        names: what is looked up there.
        example: makes an object with these attributes; None: `home` is imported, and has them.
    """

    home: str
    names: tuple[str, ...]
    example: Callable[[], Any] | None = None

    def missing(self) -> list[str]:
        """The dotted names that the installed torch does not have; `home` alone where that cannot be imported."""
        try:
            holder = pkgutil.resolve_name(self.home) if self.example is None else self.example()
        except (ImportError, AttributeError):
            return [self.home] if self.example is None else [f"{self.home}.{name}" for name in self.names]
        return [f"{self.home}.{name}" for name in self.names if not hasattr(holder, name)]


def check(table: Iterable[Names]) -> None:
    """Look every name up once.

    Raises:
        UnsupportedTorchError: the installed torch does not have all of them.
    """
    missing = [name for names in table for name in names.missing()]
    if missing:
        raise UnsupportedTorchError(
            f"install torch{SUPPORTED_TORCH}: torch {torch.__version__} does not have {', '.join(missing)}",
            missing=tuple(missing),
            found=str(torch.__version__),
            supported=SUPPORTED_TORCH,
        )


def _joint_fields() -> SimpleNamespace:
    from torch._functorch.aot_autograd import JointWithDescriptors

    return SimpleNamespace(**JointWithDescriptors.__dataclass_fields__)


def _converter() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().fake_tensor_converter


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of every module that hold its hooks by number."""
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes of every tensor that hold its hooks by number; None where it had none."""
HOOK_FLAGS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
"""Attributes that hold, by the same numbers, how some of these hooks are called."""
HOOK_ATTRIBUTES = frozenset(
    (
        *(*MODULE_HOOKS, *(flag for flags in HOOK_FLAGS.values() for flag in flags), "_is_full_backward_hook"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    )
)
"""All attributes by which a module holds hooks."""
MODULE_STATE = ("_parameters", "_buffers", "_modules")
"""Attributes of every module that hold its tensors and children by name; a planned module shares these dictionaries."""

IMPORTED = (
    Names("torch", ("_from_functional_tensor", "_functionalize_commit_update", "_functionalize_replace", "_sync")),
    Names(
        "torch._C",
        (
            "DispatchKey",
            "DispatchKeySet",
            "_ExcludeDispatchKeyGuard",
            "_current_graph_task_id",
            "_disabled_torch_function_impl",
            "_dispatch_get_all_op_names",
            "_dispatch_has_kernel_for_dispatch_key",
            "_get_fp32_precision_getter",
            "_get_mkldnn_enabled",
            "_get_sdp_priority_order",
            "_len_torch_dispatch_stack",
            "_len_torch_function_stack",
            "_set_sdp_priority_order",
        ),
    ),
    Names(
        "torch._C._autograd",
        (
            *("_get_current_graph_task_keep_graph", "_get_sequence_nr"),
            *("_saved_tensors_hooks_is_enabled", "_top_saved_tensors_default_hooks"),
        ),
    ),
    Names("torch._C._functorch", ("maybe_current_level",)),
    Names("torch._functorch.config", ("backward_pass_autocast", "patch")),
    Names("torch._functorch.aot_autograd", ("JointWithDescriptors", "aot_export_joint_with_descriptors")),
    Names(
        "torch._functorch._aot_autograd.descriptors",
        (
            "BufferAOTInput",
            "InputMutationAOTOutput",
            "ParamAOTInput",
            "PlainAOTInput",
            "PlainAOTOutput",
            "TangentAOTInput",
        ),
    ),
    Names("torch._ops", ("HigherOrderOperator", "OpOverload")),
    Names(
        "torch._subclasses.fake_tensor",
        (
            "DataDependentOutputException",
            "DynamicOutputShapeException",
            "FakeTensor",
            "FakeTensorMode",
            "UnsupportedOperatorException",
        ),
    ),
    Names("torch._subclasses.functional_tensor", ("FunctionalTensor",)),
    Names("torch.autograd.forward_ad", ("_current_level",)),
    Names("torch.fx.experimental.proxy_tensor", ("get_proxy_mode",)),
    Names("torch.fx.graph", ("_BoxedCodeGen",)),
    Names("torch.fx.node", ("_side_effectful_functions",)),
    Names("torch.nn.modules.module", tuple(f"_global{kind}" for kind in MODULE_HOOKS)),
    Names("torch.overrides", ("_get_current_function_mode_stack",)),
    Names("torch.utils._python_dispatch", ("TorchDispatchMode", "_disable_current_modes")),
    Names(
        "torch.utils._pytree",
        (
            "MappingKey",
            "SequenceKey",
            "keystr",
            "register_pytree_node",
            "tree_flatten",
            "tree_flatten_with_path",
            "tree_leaves",
            "tree_map",
            "tree_map_only",
            "tree_structure",
            "tree_unflatten",
        ),
    ),
)
"""Names that are imported."""

ATTRIBUTES = (
    Names("torch.Tensor", (*TENSOR_HOOKS, "_base", "_is_view", "_make_wrapper_subclass", "_version"), lambda: torch.zeros(1)),
    Names("torch.Tensor", ("_indices", "_values")),
    Names("torch.autograd.graph.Node", ("_sequence_nr",), lambda: torch.zeros(1, requires_grad=True).exp().grad_fn),
    Names("torch.UntypedStorage", ("_cdata",), lambda: torch.zeros(1).untyped_storage()),
    Names("torch._subclasses.fake_tensor.FakeTensorMode", ("cache_enabled", "dispatch"), _fake_mode),
    Names("torch.autograd.Function", ("maybe_clear_saved_tensors",)),
    Names(
        "torch.nn.Module",
        (*MODULE_STATE, *sorted(HOOK_ATTRIBUTES), "_apply", "_compiled_call_impl", "_non_persistent_buffers_set"),
        nn.Module,
    ),
    Names("torch.fx.GraphModule", ("_graph",), lambda: fx.GraphModule({}, fx.Graph())),
    Names("torch._ops.OpOverload", ("_dispatch_cache", "_schema", "py_kernels"), lambda: torch.ops.aten.relu.default),
    Names("torch.library.Library", ("_destroy",)),
    Names("torch._functorch.aot_autograd.JointWithDescriptors", ("_aot_graph_capture",), _joint_fields),
    Names("torch._subclasses.fake_tensor.FakeTensorMode", ("dispatch", "from_tensor")),
    Names("torch._subclasses.fake_tensor.FakeTensorMode().fake_tensor_converter", ("meta_converter",), _converter),
    Names("torch._subclasses.meta_utils.MetaConverter", ("describer",), lambda: _converter().meta_converter),
    Names(
        "torch._subclasses.meta_utils.MetaTensorDescriber",
        ("lookup_tensor",),
        lambda: _converter().meta_converter.describer,
    ),
)
"""Attributes, which no import would miss."""

COLLECTIVES = (
    Names("torch.distributed.distributed_c10d", ("_get_default_group", "_get_default_store", "_resolve_process_group")),
)
"""Names that are looked up where this torch has torch.distributed."""

REQUIRED = (*IMPORTED, *ATTRIBUTES, *(COLLECTIVES if torch.distributed.is_available() else ()))
"""Checked when `planner._compat` is imported."""

INDUCTOR = (
    Names("torch._inductor.config", ("layout_optimization",)),
    Names("torch._inductor.compile_fx", ("compile_fx_inner",)),
    Names("torch._inductor.decomposition", ("select_decomp_table",)),
)
"""Checked when a step is first compiled."""

OPTIONAL = (
    Names("torch._C._dynamo.guards", ("TensorGuards",)),  # without it guards compare tensors in Python
    Names("torch._meta_registrations", ("_meta_grouped_mm_common", "_create_grouped_mm_output_tensor")),  # not needed from 2.15
    Names("torch.fx._symbolic_trace", ("_is_fx_tracing_flag",)),  # without it a call under fx tracing is not told apart
)
"""Never required: each use looks first whether the name is there, and says what it does without."""
