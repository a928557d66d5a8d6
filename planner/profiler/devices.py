"""Devices by name: published peak rates, in one table, with their sources."""

from __future__ import annotations

import torch

from planner.errors import InputError
from planner.profiler.estimate import DeviceModel
from planner.units import kind, shown

ATTAINABLE = 0.7
"""Share of the published peaks that a kernel is taken to reach.

A round figure: large matrix products and copies reach 0.6 to 0.9 of theirs, small ones less. It is the same for both, so
that the ratio of computing to moving, which decides what is cheap to run again, stays the published one; another share
scales all times by the same factor, except for `LAUNCH_NS`.
"""

LAUNCH_NS = 3_000
"""Fixed cost of a kernel, in ns; the order of magnitude of an empty one."""

_BLAS_BYTES, _HOPPER_BLAS_BYTES = 8_320 * 1024, 32 * 1024**2
"""cuBLAS workspace of one thread (torch docs, CUBLAS_WORKSPACE_CONFIG: ":4096:2:16:8", and 32 MiB from Hopper on)."""

_CONTEXT_BYTES, _DRIVER_SHARE, _ECC_SHARE = 2**29, 0.02, 1 / 16
"""What torch cannot have of a device's memory: a CUDA context (0.3 to 0.5 GiB), what the driver keeps (torch reports 1 to 2 %
less than the published size), and on boards with GDDR6 and error correction the sixteenth that this takes."""
_GDDR6_WITH_ECC = ("A10-", "L4-", "L40S-")

_NVIDIA = "https://www.nvidia.com/en-us/data-center"


def _gpu(
    name: str, memory_gib: int, capability: tuple[int, int], tflops: tuple[float, float, float, float], gb_s: float, source: str
) -> DeviceModel:
    """A row of the table. `tflops`: peaks without sparsity of float32, TF32, float16 and bfloat16, in TFLOP/s."""
    float32, tf32, half, bfloat = tflops
    blas_bytes = _HOPPER_BLAS_BYTES if capability >= (9, 0) else _BLAS_BYTES
    share = _DRIVER_SHARE + (_ECC_SHARE if name.startswith(_GDDR6_WITH_ECC) else 0)
    return DeviceModel(
        name,
        flops_per_s=ATTAINABLE * float32 * 1e12,
        bytes_per_s=ATTAINABLE * gb_s * 1e9,
        launch_ns=LAUNCH_NS,
        dtype_speed={torch.float64: 0.5, torch.float16: half / float32, torch.bfloat16: bfloat / float32},
        tf32_speed=tf32 / float32,
        capability=capability,
        memory_bytes=memory_gib * 2**30,
        library_bytes=2 * blas_bytes,  # autograd runs the backward in a thread of its own, with a handle of its own
        source=source,
        held_bytes=_CONTEXT_BYTES + round(share * memory_gib * 2**30),
    )


_TABLE = (
    # name, GiB, capability, TFLOP/s (float32, TF32, float16, bfloat16; dense, float32 accumulation), GB/s, source
    _gpu("V100-32GB", 32, (7, 0), (15.7, 15.7, 125, 15.7), 900, f"{_NVIDIA}/v100/"),
    _gpu("A100-40GB", 40, (8, 0), (19.5, 156, 312, 312), 1555, f"{_NVIDIA}/a100/"),
    _gpu("A100-80GB", 80, (8, 0), (19.5, 156, 312, 312), 2039, f"{_NVIDIA}/a100/"),
    _gpu("A10-24GB", 24, (8, 6), (31.2, 62.5, 125, 125), 600, f"{_NVIDIA}/products/a10-gpu/"),
    _gpu("L4-24GB", 24, (8, 9), (30.3, 60, 121, 121), 300, f"{_NVIDIA}/l4/"),
    _gpu("L40S-48GB", 48, (8, 9), (91.6, 183, 362, 362), 864, f"{_NVIDIA}/l40s/"),
    _gpu("H100-80GB", 80, (9, 0), (67, 494.7, 989.4, 989.4), 3350, f"{_NVIDIA}/h100/ (SXM)"),
    _gpu("H200-141GB", 141, (9, 0), (67, 494.7, 989.4, 989.4), 4800, f"{_NVIDIA}/h200/ (SXM)"),
    _gpu("B200-180GB", 180, (10, 0), (75, 1125, 2250, 2250), 8000, f"{_NVIDIA}/dgx-b200/ (an eighth of it)"),
    _gpu(
        "RTX3090-24GB",
        24,
        (8, 6),
        (35.6, 35.6, 71, 71),
        936,
        "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    _gpu(
        "RTX4090-24GB",
        24,
        (8, 9),
        (82.6, 82.6, 165.2, 165.2),
        1008,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
)
_devices = {device.name: device for device in _TABLE}


def devices() -> tuple[DeviceModel, ...]:
    """The known devices, by name: those of the table, and the registered ones."""
    return tuple(_devices[name] for name in sorted(_devices))


def register_device(device: DeviceModel) -> None:
    """Make a device of your own known by its name; one of the same name is replaced.

    Args:
        device: its rates and its memory.

    Raises:
        InputError: `device` is no DeviceModel.
    """
    if not isinstance(device, DeviceModel):
        raise InputError(f"register_device takes a planner.DeviceModel, not {kind(device)}")
    _devices[device.name] = device


def find_device(device: str | DeviceModel) -> DeviceModel:
    """A device by its name, in any case and without its memory where that is clear ("h200"). A DeviceModel is returned.

    Raises:
        InputError: unknown, or more than one; lists them.
    """
    if isinstance(device, DeviceModel):
        return device
    if not isinstance(device, str):
        raise InputError(f"device is {kind(device)}: give a device's name such as 'H100-80GB', or a planner.DeviceModel")
    asked = device.lower()
    exact = [known for known in devices() if known.name.lower() == asked]
    found = exact or [known for known in devices() if known.name.lower().startswith(f"{asked}-")]
    if len(found) == 1:
        return found[0]
    which = "is more than one device" if found else "is not a known device"
    names = ", ".join(known.name for known in found or devices())
    raise InputError(
        f"device {shown(device)} {which}: {names}. For another, pass a planner.DeviceModel, or planner.register_device(it) "
        "first; for the device that is here, leave device= out"
    )
