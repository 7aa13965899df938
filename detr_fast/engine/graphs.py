# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of shapes that return: the host submits a whole training step by one call.

A graph holds kernels with their addresses and every number that Python handed to them. Hence
tensors come in through copies at fixed addresses, gradients stay where they are
(``Learner(static_gradients=True)``), numbers that vary are tensors on the device, and weights may
change in place (updates, ``load_state_dict``), but not be replaced (``to()``) once a graph is
recorded.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from detr_fast.config import Config, UsageError
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.log import say
from detr_fast.matcher.packing import Targets

Result = TypeVar("Result")
Work = Callable[[], Result]

BEFORE_RECORDING = 2  # runs of a shape that are not recorded: libraries load, compilers compile
MOST_GRAPHS = 64  # the buckets of an epoch are fewer; each of some thousand kernels takes memory
FREE_SHARE = 0.2  # of the memory of the GPU, which recording leaves free


class Recorder(Protocol):
    """Records work of the device."""

    def run(self, work: Work[Result]) -> Result:
        """Do the work, under the conditions under which it is recorded."""

    def record(self, work: Work[Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work without doing it; return what it returned, and what does it.

        Raises:
            RuntimeError: if it cannot be recorded.
        """

    def why_full(self) -> str:
        """Why nothing more should be recorded; empty if there is room."""


class CudaRecorder:
    """Records CUDA graphs, whose intermediate results share one pool of memory.

    Graphs run one after the other, so what one of them needs only while it runs, the next may
    overwrite. Work that is not recorded runs on the stream of the recordings, too: what libraries
    set up for a stream is ready then.

    Args:
        device (torch.device): a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work[Result]) -> Result:
        """Do the work on the stream of the recordings, in turn with the caller's."""
        # memory may change hands between the streams: each of them waits for the other
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Work[Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work; waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # of this thread alone: that of the loader allocates page-locked memory
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            result = work()
        return result, graph.replay

    def why_full(self) -> str:
        """Whether too little memory is free; waits for the device."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        if free >= FREE_SHARE * total:
            return ""
        return f"{free / 2**30:.1f} of {total / 2**30:.0f} GiB of GPU memory are free"


class _Recorded(NamedTuple):
    inputs: list[Tensor | None]
    outputs: Any
    replay: Callable[[], None]


class ShapeGraphs:
    """Does work of the device, from recordings where its shapes return.

    The first shapes to come a third time are recorded, which are the frequent ones; rare shapes
    run as ever. There are no runs for the sake of recording: what comes before is the work itself.

    Args:
        work (Callable): takes ``inputs`` as they are passed to the call; returns tensors in lists
            and dicts. Depends on nothing else that changes but tensors that are written in place;
            waits for nothing and copies nothing from the host.
        recorder (Recorder): records it.
        name (str): what is recorded, for messages.
        most (int): the largest number of recordings.

    Attributes:
        calls (int): calls so far.
        replays (int): those of them that were replayed.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Any]], Any],
        recorder: Recorder,
        name: str,
        *,
        most: int = MOST_GRAPHS,
    ) -> None:
        self.work, self.recorder, self.name, self.most = work, recorder, name, most
        self.calls = self.replays = 0
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._closed = False

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self._recorded)

    def __call__(self, inputs: Sequence[Tensor | None]) -> Any:
        """Do the work.

        Args:
            inputs (Sequence[Tensor | None]): on the device.

        Returns:
            Any: what the work returns; the tensors are the caller's.
        """
        self.calls += 1
        key = tuple(map(_form, inputs))
        recorded = self._recorded.get(key)
        if recorded is None:
            self._seen[key] += 1
            if self._seen[key] > BEFORE_RECORDING and not self._closed:
                recorded = self._record(key, inputs)
        if recorded is None:
            return self.recorder.run(lambda: self.work(inputs))
        self.replays += 1
        for own, given in zip(recorded.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given, non_blocking=True)
        recorded.replay()
        return tree_map_only(Tensor, torch.clone, recorded.outputs)

    def _record(self, key: Hashable, inputs: Sequence[Tensor | None]) -> _Recorded | None:
        full = len(self) >= self.most
        if reason := f"{self.most} are the most" if full else self.recorder.why_full():
            self._close(f"{reason}; shapes without a graph run without")
            return None
        own = [None if x is None else torch.empty_like(x).copy_(x) for x in inputs]
        try:
            outputs, replay = self.recorder.record(lambda: self.work(own))
        except RuntimeError as error:  # out of memory among them
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._close(f"recording failed, shapes without a graph run without: {lines[0]}")
            return None
        self._recorded[key] = recorded = _Recorded(own, outputs, replay)
        return recorded

    def _close(self, reason: str) -> None:
        self._closed = True
        say(f"warning: CUDA graphs of {self.name}: {len(self)} recorded; {reason}")

    def report(self) -> str:
        """How often the recordings were of use, in a line; empty without any."""
        return (
            ""
            if not self._recorded
            else f"CUDA graphs of {self.name}: {len(self)} recorded, "
            f"{self.replays} of {self.calls} batches replayed"
        )


def _form(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


class _Unread(tuple[int, ...]):
    """Numbers of targets that a recording must not know: they are those of other batches, too."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("Targets.count_host is not for a CUDA graph: use Targets.count")

    __iter__ = __getitem__ = _refuse


class StepGraphs:
    """`TrainingStep.forward_backward`, from CUDA graphs where shapes return.

    Args:
        forward_backward (Callable): images and targets to numbers for the log; adds gradients.
        recorder (Recorder): records it.
    """

    def __init__(
        self,
        forward_backward: Callable[[ImageBatch, Targets], dict[str, Tensor]],
        recorder: Recorder,
    ) -> None:
        self.forward_backward = forward_backward
        self.graphs = ShapeGraphs(self._work, recorder, "training steps")
        self._names: tuple[str, ...] = ()

    def __call__(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """Do the work of the device."""
        values = self.graphs((*images, targets.labels, targets.boxes, targets.count))
        return dict(zip(self._names, values.unbind(), strict=True))

    def _work(self, inputs: Sequence[Any]) -> Tensor:
        pixels, sizes, labels, boxes, count = inputs
        targets = Targets(labels, boxes, count, _Unread((-1,) * len(labels)))
        values = self.forward_backward(ImageBatch(pixels, sizes), targets)
        self._names = tuple(values)
        return torch.stack([*values.values()])  # as one, for less to copy


class InferenceGraphs:
    """A forward pass, from CUDA graphs where shapes return.

    Args:
        forward (Callable): images to outputs, without gradients.
        recorder (Recorder): records it.
    """

    def __init__(self, forward: Callable[[ImageBatch], dict[str, Any]], recorder: Recorder) -> None:
        self.forward = forward
        self.graphs = ShapeGraphs(
            lambda inputs: forward(ImageBatch(*inputs)), recorder, "inference"
        )

    def __call__(self, images: ImageBatch) -> dict[str, Any]:
        """Run the model."""
        outputs: dict[str, Any] = self.graphs(images)
        return outputs


def recorder_of(config: Config, device: torch.device) -> CudaRecorder | None:
    """What records CUDA graphs, where ``--cuda_graphs`` asks for them.

    Raises:
        UsageError: if they are asked for by name and the device is no GPU.
    """
    if config.cuda_graphs == "on" and device.type != "cuda":
        raise UsageError(f"--cuda_graphs on: the device is {device.type}; leave the flag out")
    if config.cuda_graphs == "off" or config.backend == "reference" or device.type != "cuda":
        return None
    return CudaRecorder(device)
