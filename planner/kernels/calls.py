"""Keys that are equal for equal kernel calls, and real inputs to run a call with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from planner.kernels.batch_norm import KERNELS

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load


def kernel_key(node: Node) -> str:
    """Text that is equal for two nodes exactly when they run the same kernel on tensors of the same kind.

    Stable across processes. Tensors are described by dtype, sizes, strides, device and misalignment in bytes, never by
    name; an argument given twice is marked, because reading one tensor twice costs less than reading two.
    """
    seen: dict[Node, int] = {}
    args = ", ".join(_describe(arg, seen) for arg in node.args)
    kwargs = ", ".join(f"{name}={_describe(arg, seen)}" for name, arg in sorted(node.kwargs.items()))
    return f"{_target_name(node.target)}({', '.join(filter(None, (args, kwargs)))})"


def call_key(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Text for a call on tensors, or on nodes with tensors in `meta["val"]`: equal where the outputs have the same layouts."""
    given = ", ".join((*map(_describe_call, args), *(f"{name}={_describe_call(arg)}" for name, arg in sorted(kwargs.items()))))
    return f"{_target_name(target)}({given}) {_settings()}"


def _settings() -> str:
    """What a kernel's layouts depend on besides its inputs."""
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    flags = (torch.are_deterministic_algorithms_enabled(), mkldnn.enabled, cudnn.enabled, cudnn.benchmark)
    return "".join("01"[bool(flag)] for flag in flags)


def _describe_call(arg: Any) -> str:
    if isinstance(arg, Node):
        arg = arg.meta.get("val")
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_describe_call, arg))}]"
    if isinstance(arg, torch.Tensor) and arg.layout is torch.strided:
        return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}{list(arg.stride())} {arg.device}"
    return _describe_value(arg)


def make_inputs(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Real arguments of the same kind as the fake ones: same dtype, sizes, strides (expanded ones too), device, alignment.

    Integers are 0 (an index that is always valid), floats lie in (.1, 1), bools are mixed. The same node given twice
    becomes the same tensor. Where the kernel reads the generator's state as another one saved it (dropout within attention,
    whose seed lies on the host or on the device), that one runs, and moves the default generator, which is put back after.

    Raises:
        ValueError: an argument cannot be made (a sparse tensor, a size that is not known, ...).
    """
    made: dict[Node, Any] = {}

    def make(arg: Node) -> Any:
        if arg not in made:
            if "val" not in arg.meta:
                raise ValueError(f"argument {arg.name} of {node.name} has no fake tensor in meta['val']")
            val = arg.meta["val"]
            if (row := KERNELS.get(node.target)) is not None and row.is_backward and val.numel() == 0:
                val = val.float()  # statistics that eval mode does not save: the kernel makes them float32, its fake does not
            made[arg] = _drawn(arg) if _is_state_of_draws(arg) else _real(val)
        return made[arg]

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), make)
    return tuple(_plain(arg) for arg in args), {name: _plain(arg) for name, arg in kwargs.items()}


def _is_state_of_draws(node: Node) -> bool:
    val, kernel = node.meta["val"], node.args[0] if node.target is operator.getitem else None
    if not isinstance(kernel, Node) or torch.Tag.nondeterministic_seeded not in getattr(kernel.target, "tags", ()):
        return False
    return isinstance(val, torch.Tensor) and val.dtype in (torch.int64, torch.uint64) and val.numel() <= 2


def _drawn(node: Node) -> Any:
    kernel, index = node.args
    args, kwargs = make_inputs(kernel)  # type: ignore[arg-type]
    return kernel.target(*args, **kwargs)[index]  # type: ignore[union-attr, operator, index]


def footprint_bytes(node: Node) -> int:
    """Bytes that one set of inputs and the outputs occupy, had each its own memory."""
    vals = [arg.meta.get("val") for arg in (*node.all_input_nodes, node)]
    return sum(_extent(t) * t.element_size() for val in vals for t in tensors_in(val))


def tensors_in(val: Any) -> list[torch.Tensor]:
    """The tensors of a node's value: of itself, or of the lists and tuples it is made of."""
    if isinstance(val, (list, tuple)):
        return [tensor for item in val for tensor in tensors_in(item)]
    return [val] if isinstance(val, torch.Tensor) else []


def _target_name(target: Callable[..., Any] | str) -> str:
    if hasattr(target, "overloadpacket"):
        return str(target)
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(type(target)))}"


def _describe(arg: Any, seen: dict[Node, int]) -> str:
    if isinstance(arg, Node):
        if arg in seen:
            return f"same as {seen[arg]}"
        seen[arg] = len(seen)
        return _describe_value(arg.meta.get("val"))
    return nested_text(arg, lambda item: _describe(item, seen)) or _describe_value(arg)


def nested_text(arg: Any, text: Callable[[Any], str]) -> str:
    """An argument that holds others (a list, a mapping, a slice), with `text` for each of them; "" for any other."""
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(text, arg))}]"
    if isinstance(arg, Mapping):
        return f"{{{', '.join(f'{key}: {text(value)}' for key, value in arg.items())}}}"
    if isinstance(arg, slice):
        return f"slice({', '.join(map(text, (arg.start, arg.stop, arg.step)))})"
    return ""


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_describe_value(item) for item in value)}]"
    if callable(value) and not isinstance(value, type):
        return _target_name(value)  # repr would hold an address
    return repr(value)


def _describe_tensor(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        return f"{dtype}{list(tensor.shape)} {tensor.layout} {tensor.device}"
    offset = _misalignment(tensor)
    return f"{dtype}{list(tensor.shape)}{list(tensor.stride())} {tensor.device}{f' +{offset}B' if offset else ''}"


def _misalignment(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size() % _ALIGNMENT_BYTES


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one that the strides reach."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _plain(arg: Any) -> Any:
    # fx keeps argument lists as immutable ones; plain functions may want to change theirs.
    if isinstance(arg, list):
        return [_plain(item) for item in arg]
    if isinstance(arg, dict):
        return {key: _plain(value) for key, value in arg.items()}
    return arg


def _real(val: Any) -> Any:
    if isinstance(val, (list, tuple)):
        return [_real(item) for item in val]
    return _real_tensor(val) if isinstance(val, torch.Tensor) else val


def _real_tensor(fake: torch.Tensor) -> torch.Tensor:
    if fake.layout is not torch.strided:
        raise ValueError(f"cannot make up a tensor of layout {fake.layout}")
    device = torch.device("cpu") if fake.device.type == "meta" else fake.device  # host-side state has a meta tensor
    skip = _misalignment(fake) // fake.element_size()
    extent = _extent(fake)
    memory = torch.empty(skip + extent, dtype=fake.dtype, device=device)
    _fill(memory)
    return torch.as_strided(memory, _ints(fake.shape), _ints(fake.stride()), skip)


def _ints(sizes: Sequence[Any]) -> list[int]:
    return [int(size) for size in sizes]


def _fill(memory: torch.Tensor) -> None:
    if memory.dtype == torch.uint8 and memory.device.type == "cpu" and memory.numel() == torch.get_rng_state().numel():
        memory.copy_(torch.get_rng_state())  # a generator refuses a state of zeros
    elif memory.dtype.is_floating_point or memory.dtype.is_complex:
        _tile(memory, _block().to(memory.device, memory.dtype))
    elif memory.dtype == torch.bool:
        _tile(memory, (_block() > 0.55).to(memory.device))
    else:
        memory.zero_()


@lru_cache(maxsize=1)
def _block() -> torch.Tensor:
    return torch.empty(4093, dtype=torch.float32, device="cpu").uniform_(
        0.1, 1.0, generator=torch.Generator("cpu").manual_seed(0)
    )


def _tile(memory: torch.Tensor, block: torch.Tensor) -> None:
    """Fill by repeating: many times faster than drawing every number."""
    rows = memory.numel() // block.numel()
    whole = rows * block.numel()
    memory[:whole].view(rows, block.numel()).copy_(block)
    memory[whole:].copy_(block[: memory.numel() - whole])


def like(value: Any, items: Iterable[Any]) -> Any:
    """A list or tuple of the same class, with other items; a namedtuple's class takes them one by one."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
