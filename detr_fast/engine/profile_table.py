# SPDX-License-Identifier: Apache-2.0
"""What a profile found, and the table that says it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from detr_fast.engine.batch import Batch
from detr_fast.engine.train import Run

PHASES = {
    "data": "data: waiting for the loader",
    "copy": "packing targets, copy to the device",
    "forward": "forward, images normalised",
    "match and loss": "match and loss",
    "backward": "backward",
    "optimizer": "optimizer: clipping, AdamW",
    "metrics": "metrics and log",
}
MIB = 2**20


class Counts(NamedTuple):
    """What a step consists of, on average; None for what was not counted.

    Attributes:
        calls (float): of torch, as its dispatcher sees them.
        kernels (float): that ran on the GPU.
        copies (float): copies and fills of GPU memory.
        graphs (float): CUDA graphs that were launched.
        syncs (float): waits of the host for the GPU.
    """

    calls: float | None = None
    kernels: float | None = None
    copies: float | None = None
    graphs: float | None = None
    syncs: float | None = None


def read_trace(file: Path, steps: int) -> Counts:
    """Count kernels, copies and graph launches in a Chrome trace of torch's profiler."""
    events = json.loads(file.read_text())["traceEvents"]
    kinds = [event.get("cat", "") for event in events]
    copies = sum(kind in ("gpu_memcpy", "gpu_memset") for kind in kinds)
    launches = sum(event.get("name") == "cudaGraphLaunch" for event in events)
    return Counts(
        kernels=kinds.count("kernel") / steps, copies=copies / steps, graphs=launches / steps
    )


class Waste(NamedTuple):
    """What padding costs.

    Attributes:
        ratio (float): pixels of the batches over those of their images.
        shapes (int): distinct shapes of batches.
    """

    ratio: float
    shapes: int


def padding_waste(batches: Sequence[Batch]) -> Waste:
    """Pixels that are computed for one of an image, and shapes that a compiler would see."""
    padded = real = 0
    for images, *_ in batches:
        count, _, height, width = images.tensors.shape
        padded += count * height * width
        real += count * height * width if images.sizes is None else _pixels(images.sizes)
    return Waste(padded / real, len({tuple(batch.images.tensors.shape) for batch in batches}))


def _pixels(sizes: torch.Tensor) -> int:
    return int(sizes.long().prod(1).sum())


@dataclass(frozen=True)
class Profile:
    """Where the time of training steps went.

    Attributes:
        run (Run): what was trained.
        steps (int): batches that were timed.
        warmup (int): batches before them.
        seconds (float): of all timed batches, undisturbed.
        phases (dict[str, float]): seconds of as many batches by phase, in a pass of their own.
        batches (list[Batch]): those that were timed.
        counts (Counts): of a step.
        memory (dict[str, int]): bytes at peak.
    """

    run: Run
    steps: int
    warmup: int
    seconds: float
    phases: dict[str, float]
    batches: list[Batch]
    counts: Counts
    memory: dict[str, int]

    def table(self) -> str:
        """The profile to read."""
        return "\n".join([*self._what(), "", *self._times(), "", *self._facts()])

    def _what(self) -> Iterator[str]:
        config, device = self.run.config, self.run.device
        cpu = f"cpu, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        yield (
            f"{config.model or config.backbone} on {config.data()}, batch size "
            f"{config.batch_size}, {self.steps} steps after {self.warmup} of warm-up, on {name}"
        )
        dtype = getattr(getattr(self.run.step, "precision", None), "dtype", None) or torch.float32
        yield (
            f"back end {config.backend}, --amp {config.amp}: {str(dtype).removeprefix('torch.')}, "
            f"--padding {config.padding}, --compile {config.compile}, "
            f"--cuda_graphs {config.cuda_graphs}"
        )
        if config.accumulate_steps > 1:
            yield f"a step is a batch; one in {config.accumulate_steps} ends with an update"

    def _times(self) -> Iterator[str]:
        total, width = sum(self.phases.values()), max(map(len, PHASES.values()))
        yield f"{'phase':{width}}  ms a step   share"
        for name, title in PHASES.items():
            seconds = self.phases[name]
            yield f"{title:{width}}  {seconds / self.steps * 1e3:9.2f}  {seconds / total:6.1%}"
        yield f"{'sum, host and device in turn':{width}}  {total / self.steps * 1e3:9.2f}"
        mean, rate = self.seconds / self.steps, self.images / self.seconds
        yield f"{'undisturbed':{width}}  {mean * 1e3:9.2f}  {rate:.4g} images/s"
        yield "(phases: a pass of its own, which waits for the device at the end of each of them)"

    @property
    def images(self) -> int:
        """Images in the timed batches."""
        return sum(batch.images.tensors.shape[0] for batch in self.batches)

    def _facts(self) -> Iterator[str]:
        counts, waste = self.counts, padding_waste(self.batches)
        if counts.kernels is not None:
            yield (
                f"kernels a step: {counts.kernels:g}, copies and fills {counts.copies:g}, "
                f"CUDA graphs {counts.graphs:g}"
            )
        elif counts.calls is not None:
            yield f"calls of torch a step: {counts.calls:g}"
        else:
            yield "calls of torch a step: not counted, the model is compiled"
        waits = "n/a, there is no GPU to wait for" if counts.syncs is None else f"{counts.syncs:g}"
        yield f"host syncs a step: {waits}"
        yield (
            f"padding: {waste.ratio:.2f} times the pixels of the images, {waste.shapes} shapes in "
            f"{self.steps} batches"
        )
        peaks = ", ".join(f"{size / MIB:.0f} MiB {name}" for name, size in self.memory.items())
        since = " (of this process since its start)" if "resident" in self.memory else ""
        yield f"peak memory: {peaks or 'n/a on this system'}{since}"
