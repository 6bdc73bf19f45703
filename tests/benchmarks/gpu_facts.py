"""What a GPU does that a CPU cannot show: peaks, determinism, bits of the two data paths, and agreement with the CPU.

    python -m tests.benchmarks gpu_facts --device cuda

Every row is a statement of README or of the code, with what was found here. A row that fails says so; nothing is timed
but the two peaks.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

from pneumo_dist.model.precision import autocast
from pneumo_dist.model.unet import ResNet34UNet, normalise
from tests.benchmarks import frame
from tests.benchmarks.contestants import Case, Ours, films, wait
from tests.benchmarks.frame import Table
from tests.benchmarks.whole_schedule import peak_operations


def copy_bytes_s(device: str) -> float:
    """Measure bytes read and written a second by a copy on the device."""
    size = (1 << 31) if device == "cuda" else (1 << 24)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds[2:])


def weights_after(case: Case, steps: int, *words: str) -> list[torch.Tensor]:
    """Train some steps from the same seed; return the weights."""
    run = Ours(case, None, *words)
    run(steps)
    return [weight.detach().cpu() for weight in run.stepper.model.parameters()]


def repeats(case: Case, *words: str) -> str:
    """Train twice; return whether the weights have the same bits."""
    pairs = list(zip(weights_after(case, 4, *words), weights_after(case, 4, *words), strict=True))
    differing = sum(not torch.equal(a, b) for a, b in pairs)
    return "same bits" if not differing else f"{differing} of {len(pairs)} tensors differ"


def nondeterministic_operations(case: Case) -> str:
    """Train steps with torch's check as warnings; return what it names."""
    run = Ours(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(2)
    named = sorted({str(w.message).split(" does not have")[0] for w in caught if "determinis" in str(w.message)})
    return "; ".join(named) or "none"


def logits_beside_cpu(case: Case) -> str:
    """Return the largest difference of the logits from float32 on the CPU, and the largest logit."""
    net = ResNet34UNet(0).eval()
    images = normalise(films(Case(case.size, 2))[0])
    with torch.inference_mode():
        expected = net(images)[0]
        device = torch.device(case.device)
        with autocast(case.dtype, device):
            found = net.to(device)(images.to(device))[0].float().cpu()
    return f"{float((found - expected).abs().max()):.2g} of {float(expected.abs().max()):.2g}"


def main() -> int:
    """Check what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny cases, to see that it runs")
    asked = parser.parse_args()
    device, size, batch = asked.device, 32 if asked.small else 256, 2 if asked.small else 16
    kinds = {amp: Case(size, batch, amp, device) for amp in ("off", "bf16", "fp16")}
    if device == "cpu":
        del kinds["fp16"]  # torch's CPU scaler needs no check here
    rows: dict[str, Callable[[], str]] = {
        "bf16 matrix product": lambda: f"{peak_operations(torch.bfloat16, device) / 1e12:.3g} TFLOP/s",
        "copy on the device": lambda: f"{copy_bytes_s(device) / 1e12:.3g} TB/s",
        "operations without a deterministic form": lambda: nondeterministic_operations(kinds["bf16"]),
    }
    for amp, case in kinds.items():
        rows[f"the same training twice, {amp}"] = lambda case=case: repeats(case)  # type: ignore[misc]
        rows[f"logits beside the CPU's float32, {amp}"] = lambda case=case: logits_beside_cpu(case)  # type: ignore[misc]
    table = Table("Facts of the device", ["", "found"])
    for name, check in rows.items():
        try:
            found = check()
        except RuntimeError as error:  # one failing row must not hide the others
            found = f"failed: {str(error).splitlines()[0]}"
        table.rows.append([name, found])
        print(name, found, sep=": ", flush=True)
    return frame.report([table], asked, {"gpu": torch.cuda.get_device_name()} if device == "cuda" else None)


if __name__ == "__main__":
    sys.exit(main())
