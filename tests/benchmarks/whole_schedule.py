"""The paper's two stages on a device: images a second, share of its arithmetic, and the time of the whole schedule.

Written for GPUs; with small cases it runs on a CPU as well, which shows that it runs, not how fast a GPU is.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pneumo_dist.model.unet import ResNet34UNet
from tests.benchmarks import frame
from tests.benchmarks.contestants import OURS, Case, Ours, smp_loop, smp_tuned, wait
from tests.benchmarks.frame import Table

FILMS, EPOCHS = 10_800, (100, 70)  # the paper's training films, epochs of its first and second stage
STAGES = "256x64,512x16"
LARGER = "256x128,256x256,512x32,512x64"
# Lower bound of a step by memory traffic and arithmetic (bf16, 600 TFLOP/s in convolutions; H100 3.0 TB/s, H200 4.3),
# every operator's inputs read and outputs written once: images/s by GPU and image side, at the paper's batches.
BOUND = {"H100": {256: 5366, 512: 1342}, "H200": {256: 6615, 512: 1654}}
LOOSE = "train.deterministic=false"
WAYS = {  # name -> settings
    "cpu": {OURS: (), f"{OURS}, {LOOSE}": (LOOSE,)},  # compile takes minutes of a C++ compiler there
    "cuda": {
        OURS: (),
        f"{OURS}, train.cuda_graph=true": ("train.cuda_graph=true",),
        f"{OURS}, {LOOSE}": (LOOSE,),
        f"{OURS}, {LOOSE}, train.compile=true": (LOOSE, "train.compile=true"),
    },
}
PEER = "segmentation_models_pytorch, plain loop with autocast"
TUNED_PEER = "the same, channels_last, cudnn.benchmark, fused Adam"


def operations(size: int) -> int:
    """Count the floating-point operations of a forward and backward pass of one image, multiply and add apart.

    Convolutions and their gradients only; normalisation and activations are left out, as is usual.
    """
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:  # shapes only
        model = ResNet34UNet()
        images = torch.empty((2, 3, size, size))  # two: batch norm refuses one image where one value a channel is left
        model(images)[0].sum().backward()
    return counter.get_total_flops() // 2


def peak_operations(dtype: torch.dtype, device: str) -> float:
    """Measure operations a second of a large matrix product: what the arithmetic units give when nothing else counts."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        wait(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(seconds[2:])


def bound_of(case: Case) -> float | None:
    """Return the lower bound of the step as images/s; None for another GPU, a CPU, or float32."""
    if case.device != "cuda" or case.amp == "off":
        return None
    name = torch.cuda.get_device_name()
    return next((bounds.get(case.size) for gpu, bounds in BOUND.items() if gpu in name), None)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(case: Case, rounds: int, steps: int) -> tuple[Table, float]:
    """Measure ours, ours without determinism and the plain loop with autocast in turns; return table and ours' images/s."""
    makers = {name: lambda words=words: Ours(case, None, *words) for name, words in WAYS[case.device].items()}
    if find_spec("segmentation_models_pytorch"):
        makers |= {PEER: lambda: smp_loop(case), TUNED_PEER: lambda: smp_tuned(case)}
    memory: dict[str, float | None] = {}
    for name, make in makers.items():  # one after the other, alone on the device
        _release(case.device)
        run = make()
        run(3)
        memory[name] = torch.cuda.max_memory_allocated() / 1e9 if case.device == "cuda" else None
        del run
    _release(case.device)
    runs = {name: make() for name, make in makers.items()}
    for run in runs.values():
        run(3)
    turns = {name: lambda run=run: case.batch * steps / run(steps) for name, run in runs.items()}
    found = frame.in_turns(turns, rounds)
    peak = peak_operations(case.dtype or torch.float32, case.device)
    columns = ["", "images/s (median)", "lowest", "highest", "over the tuned peer", "share of the bound", "share of matmul peak", "GB"]  # fmt: skip
    table = Table(f"Step on the device: {case}", columns)
    bound = bound_of(case)
    for name, rates in found.items():
        rate = statistics.median(rates)
        over = frame.ratio(rates, found[TUNED_PEER]) if TUNED_PEER in found else None
        share = rate * operations(case.size) / peak
        table.rows.append(
            [name, rate, min(rates), max(rates), over, rate / bound if bound else None, share, memory[name]]
        )
    table.notes.append(
        f"{operations(case.size) / 1e9:.1f} GFLOP an image forward and backward; a large matrix product reaches "
        f"{peak / 1e12:.2f} TFLOP/s here"
    )
    return table, max(statistics.median(rates) for name, rates in found.items() if name.startswith(OURS))


def schedule_minutes(rates: Mapping[int, float], batches: Mapping[int, int]) -> float:
    """Return the minutes of step time of the whole schedule; `rates` are images/s by image side, `batches` likewise.

    The last incomplete batch of an epoch is dropped.
    """
    seconds = 0.0
    for epochs, size in zip(EPOCHS, sorted(rates), strict=True):
        seconds += epochs * (FILMS // batches[size]) * batches[size] / rates[size]
    return seconds / 60


def tables(stages: list[Case], larger: list[Case], amps: list[str], rounds: int, steps: int) -> list[Table]:
    """Measure every case in every arithmetic, and sum the schedule up from the two stages."""
    found: list[Table] = []
    summary = Table("The paper's whole schedule", ["", "stage 1 images/s", "stage 2 images/s", "minutes of step time"])
    for amp in amps:
        rates = {}
        for case in [*stages, *larger]:
            table, rate = measure(replace(case, amp=amp), rounds, steps)
            found.append(table)
            if case in stages:
                rates[case.size] = rate
        if len(rates) == len(EPOCHS):
            minutes = schedule_minutes(rates, {case.size: case.batch for case in stages})
            summary.rows.append([amp, *(rates[size] for size in sorted(rates)), minutes])
    summary.notes.append(
        f"{FILMS} films, {EPOCHS[0]} and {EPOCHS[1]} epochs at the two sizes, the faster setting of each case above"
    )
    return [*found, summary]
