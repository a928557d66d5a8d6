"""Make torchvision and torchaudio importable beside a CPU build of torch.

PyPI serves both with CUDA binaries only. The models here need none of their compiled code, only the import: torchvision
registers shape functions for two compiled operators, so these are declared without a kernel; torchaudio believes that
it was built without its extension.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def install() -> None:
    """Call before the first import of either package. Changes nothing where torch is built for CUDA."""
    if torch.version.cuda is not None:
        return
    if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", _NMS)
    if importlib.util.find_spec("torchaudio") is not None and "torchaudio" not in sys.modules:
        extension: Any = ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = extension._IS_ALIGN_AVAILABLE = False
        extension.fail_if_no_align = lambda function: function
        extension._check_cuda_version = lambda: None
        sys.modules["torchaudio._extension"] = extension
