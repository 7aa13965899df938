# SPDX-License-Identifier: Apache-2.0
"""What the device can do at most: bandwidth and matmul rate, both measured, and its clocks."""

import functools
from typing import NamedTuple

import torch

from benchmarks.timing import time_all

MIB = 1024**2


class Limits(NamedTuple):
    """Measured on one device with the number of threads that torch has at the time."""

    copy_gb_s: float  # bytes read and bytes written, 1e9 a second
    matmul_tflop_s: float  # 2 n^3 operations of an n x n bfloat16 product, 1e12 a second


@functools.cache
def measured_limits(device: torch.device, quick: bool = False) -> Limits:
    """Copy between two buffers beyond any cache; multiply two random matrices.

    Random and not zero: a product of zeros draws less power and may run at a higher clock.
    """
    on_gpu = device.type == "cuda"
    size = (1024 if on_gpu else 128) * MIB // (16 if quick else 1)
    n = (8192 if on_gpu else 1024) // (4 if quick else 1)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    left, right = torch.randn(2, n, n, device=device).bfloat16()
    runs = {"copy": lambda: copy.copy_(source), "matmul": lambda: left @ right}
    times = time_all(runs, device, seconds=0.05 if quick else 0.5)
    return Limits(
        copy_gb_s=round(2 * size / times["copy"].us / 1e3, 1),
        matmul_tflop_s=float(f"{2 * n**3 / times['matmul'].us / 1e6:.4g}"),
    )


def clocks_of_all_sms(device: torch.device) -> float:
    """Clocks a second of all SMs of a GPU at its highest rate; 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * properties.clock_rate * 1e3  # kHz
