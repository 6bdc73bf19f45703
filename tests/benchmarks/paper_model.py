"""A model on paper of a data-parallel step on N nodes: pure functions, nothing is measured in here.

A ring all-reduce sends 2 (N-1)/N of the gradient through every node's link, in 2 (N-1) hops a bucket. DDP sends a
bucket as soon as the backward pass has filled it, so only what outlasts the backward pass, and at least the last
bucket, lengthens the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.frame import Table

LINKS = {"1 Gbit/s": 0.125e9, "10 Gbit/s": 1.25e9, "25 Gbit/s": 3.125e9, "100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9}
NODES = (1, 2, 4, 8, 16, 32)
SHOWS = 0.05  # communication shows when it lengthens the step by this share


@dataclass(frozen=True)
class Step:
    """The step of one node: `fixed_s` (the optimizer, launching) + `image_s` for each image of its share."""

    fixed_s: float
    image_s: float
    gradient_bytes: float
    backward: float = 2 / 3  # share of the images' time that is the backward pass
    bucket_bytes: float = 25 * 2**20  # DDP's default

    @staticmethod
    def through(batches: tuple[int, int], seconds: tuple[float, float], gradient_bytes: float) -> Step:
        """Return the line through two measured steps."""
        image_s = max((seconds[1] - seconds[0]) / (batches[1] - batches[0]), 0.0)
        return Step(max(seconds[0] - batches[0] * image_s, 0.0), image_s, gradient_bytes)


@dataclass(frozen=True)
class Link:
    """What connects the nodes: bytes a second in each direction, and seconds a hop."""

    bytes_s: float
    latency_s: float = 20e-6


def ring_seconds(nodes: int, bytes_: float, link: Link, buckets: float = 1) -> float:
    """Return the time of a ring all-reduce of `bytes_` in `buckets` parts."""
    return 2 * (nodes - 1) / nodes * bytes_ / link.bytes_s + 2 * (nodes - 1) * link.latency_s * buckets


def compute_seconds(step: Step, nodes: int, global_batch: int) -> float:
    """Return the slowest node's compute time for its share of a fixed global batch."""
    return step.fixed_s + step.image_s * -(-global_batch // nodes)


def exposed_seconds(step: Step, nodes: int, global_batch: int, link: Link, compression: float = 1) -> float:
    """Return by how much the exchange lengthens the step; `compression` 2 sends half the bytes."""
    if nodes == 1:
        return 0.0
    bytes_ = step.gradient_bytes / compression
    buckets = max(1.0, step.gradient_bytes / step.bucket_bytes)
    whole = ring_seconds(nodes, bytes_, link, buckets)
    last = ring_seconds(nodes, bytes_ / buckets, link)
    hidden = step.backward * step.image_s * -(-global_batch // nodes)
    return max(last, whole - hidden)


def step_seconds(step: Step, nodes: int, global_batch: int, link: Link, compression: float = 1) -> float:
    """Return the time of a step."""
    return compute_seconds(step, nodes, global_batch) + exposed_seconds(step, nodes, global_batch, link, compression)


def shows_at(step: Step, global_batch: int, link: Link, compression: float = 1) -> int | None:
    """Return the smallest number of nodes at which the exchange lengthens the step by a twentieth, if there is one."""
    for nodes in range(2, global_batch + 1):
        exposed = exposed_seconds(step, nodes, global_batch, link, compression)
        if exposed > SHOWS * compute_seconds(step, nodes, global_batch):
            return nodes
    return None


def table(step: Step, global_batch: int, compression: float = 1) -> Table:
    """Return step times for all links and numbers of nodes, and where communication shows."""
    sent = "gradients as bf16" if compression == 2 else "float32 gradients"
    found = Table(
        f"On paper: a step of {global_batch} images on N nodes, {sent}",
        ["link", *(f"N={n}, s" for n in NODES), "shows from N"],
    )
    for name, bytes_s in LINKS.items():
        link = Link(bytes_s)
        times = [step_seconds(step, n, global_batch, link, compression) for n in NODES if n <= global_batch]
        padded = [*times, *[None] * (len(NODES) - len(times))]
        found.rows.append([name, *padded, shows_at(step, global_batch, link, compression) or "never"])
    found.notes.append(
        f"compute {step.fixed_s:.3g} s + {step.image_s:.3g} s an image, {step.gradient_bytes / 1e6:.1f} MB of gradients, "
        f"20 us a hop; it shows where it lengthens the step by {SHOWS:.0%}"
    )
    return found


def exchange_table(gradient_bytes: float, bucket_bytes: float = Step.bucket_bytes) -> Table:
    """Return the exchange's own time for all links and numbers of nodes: what a backward pass must last to hide it."""
    found = Table(
        f"On paper: exchanging {gradient_bytes / 1e6:.1f} MB of gradients, ms (as bf16)",
        ["link", *(f"N={n}" for n in NODES[1:])],
    )
    buckets = max(1.0, gradient_bytes / bucket_bytes)
    for name, bytes_s in LINKS.items():
        pairs = [
            [1000 * ring_seconds(n, gradient_bytes / c, Link(bytes_s), buckets) for c in (1, 2)] for n in NODES[1:]
        ]
        found.rows.append([name, *(f"{whole:.1f} ({half:.1f})" for whole, half in pairs)])
    return found
