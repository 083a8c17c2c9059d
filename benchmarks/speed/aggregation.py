"""Aggregation of large replies, against how fast this machine's memory is.

    python benchmarks/speed/aggregation.py [--replies 50] [--mb 100]

Prints a JSON object. The bandwidth is that of numpy's own addition of two large float32 arrays into one of them (12
bytes a value), measured between the replies; that of its copy (8 bytes a value) is told beside it. What must move for a
reply is 20 bytes a value: 4 to read it, and 16 to read and write a float64 sum. Memory is what the aggregator takes
beside the shared state and the reply.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from server.aggregation import BlockwiseMean

TENSORS = 25  # of 4 MB each, as the layers of a transformer have them
READ_AND_WRITE, BESIDES = 20, 28  # bytes a value: of a reply; of the division and the conversion at the end


def measure(replies: int, mb: int) -> dict[str, float]:
    """Bandwidths in GB/s and their ratio, the peak of memory in models, and how much the order of replies shows."""
    size = mb * 250_000 // TENSORS
    rng = np.random.default_rng(0)
    shared = {f"fusion.{index}": rng.normal(size=size).astype(np.float32) for index in range(TENSORS)}
    reply = {name: tensor.copy() for name, tensor in shared.items()}
    other = {name: tensor.copy() for name, tensor in shared.items()}
    seconds, bandwidths, copies = [], [], []
    mean = BlockwiseMean()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for number in range(replies):
        begun = time.process_time()
        mean.fold(reply, {"fusion": 40.0 + number})
        seconds.append(time.process_time() - begun)
        bandwidths.append(_bandwidth(np.add, 12, reply, other))
        copies.append(_bandwidth(lambda a, b, out: np.copyto(out, a), 8, reply, other))
    begun = time.process_time()
    mean.apply_to(shared)
    first, *others = seconds  # the first one finds no sums yet, and waits for the pages of memory they need
    total = first + statistics.median(others) * len(others) + time.process_time() - begun
    moved = size * TENSORS * (replies * READ_AND_WRITE + BESIDES)
    ours, theirs = moved / total / 1e9, statistics.median(bandwidths)
    peak = (_memory("VmHWM") - before) / mb
    found = {"gb_per_s": ours, "add_gb_per_s": theirs, "copy_gb_per_s": statistics.median(copies)}
    return found | {"ratio": ours / theirs, "peak_models": peak} | order()


def order(sites: int = 50, size: int = 100_000) -> dict[str, float]:
    """The share of values that are other ones when the same replies come in another order, by the type of the sums."""
    rng = np.random.default_rng(1)
    sent = [(float(rng.integers(20, 400)), rng.normal(size=size).astype(np.float32)) for _ in range(sites)]
    shares = {}
    for kind in (np.float32, np.float64):
        means = []
        for replies in (sent, sent[::-1]):
            total = np.zeros(size, kind)
            for weight, tensor in replies:
                total += np.multiply(tensor, weight, dtype=kind)
            means.append((total / sum(weight for weight, _ in replies)).astype(np.float32))
        shares[f"changed_by_order_{np.dtype(kind)}"] = float((means[0] != means[1]).mean())
    return shares


def _bandwidth(
    work: Callable[..., object], bytes_each: int, a: dict[str, np.ndarray], b: dict[str, np.ndarray]
) -> float:
    begun = time.process_time()
    for name, tensor in a.items():
        work(tensor, b[name], out=b[name])
    return bytes_each * sum(tensor.size for tensor in a.values()) / (time.process_time() - begun) / 1e9


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--mb", type=int, default=100)
    print(json.dumps(measure(**vars(parser.parse_args()))))
