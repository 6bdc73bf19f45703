"""Processor, threads and library: the bits of a result depend on them besides the settings.

They are recorded in checkpoints; a resume compares them and warns.
"""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path

import torch

from pneumo_dist.config import Train
from pneumo_dist.runtime.processes import keep_memory, thread_count

log = logging.getLogger(__name__)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_processor() -> dict[str, str | int]:
    """Return the facts that a resume compares."""
    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def set_threads(train: Train) -> dict[str, str | int]:
    """Set torch's threads, precision and determinism for this rank; return `describe_processor()`."""
    torch.set_num_threads(thread_count(train.threads))
    set_precision(train)
    if not torch.cuda.is_available():
        keep_memory(512 << 20)  # every step allocates feature maps of tens of MB: page faults took 3 to 5 % of its time
    # warn_only: no operation of a step is on PyTorch's list of those without a deterministic form; lists change.
    torch.use_deterministic_algorithms(train.deterministic, warn_only=True)
    if train.deterministic:  # cuBLAS computes the image-level head; it reads this at its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On by default with deterministic algorithms: a debugging aid that takes 6 % of a step and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not train.deterministic
    return describe_processor()


def set_precision(train: Train) -> None:
    """Exclude TF32, which torch takes for convolutions in float32, if train.amp is off: for the whole process."""
    torch.backends.cudnn.allow_tf32 = train.amp != "off"


def warn_if_bits_may_differ(
    before: dict[str, str | int], now: dict[str, str | int], world_before: int, world_now: int
) -> None:
    """Warn of changes since the checkpoint that can change the last bits of the result."""
    for name in now:
        if before.get(name) != now[name]:
            log.warning(
                "%s was %s and is %s: the last bits of the result may differ", name, before.get(name), now[name]
            )
    if world_before != world_now:
        log.warning(
            "%d ranks before, %d now: samples continue in the same order; batch-norm statistics are those of each "
            "rank's share of a batch, so the weights will differ slightly",
            world_before,
            world_now,
        )
