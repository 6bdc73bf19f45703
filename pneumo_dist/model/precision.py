"""The floating-point type to compute in: one rule for training, the batch-norm update and every forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type that `amp` ("auto", "fp16", "bf16", "off") means on `device`; None for float32.

    auto: bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU. On a CPU with matrix units (AMX)
    "bf16" is nearly twice as fast. off: float32; stages then exclude TF32 too (`runtime.processor.set_precision`).
    """
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[amp]


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Return the autocast context for a type that `amp_dtype` gave."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
