# SPDX-License-Identifier: Apache-2.0
"""What a run reports: console lines and ``log.txt`` in the form of facebookresearch/detr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TextIO, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item", covariant=True)


class SizedIterable(Protocol[Item]):
    """What `MetricLogger.log_every` walks: a list, a DataLoader."""

    def __iter__(self) -> Iterator[Item]: ...

    def __len__(self) -> int: ...


def say(line: str, stream: TextIO | None = None) -> None:
    """Write a line to `stream` (default: stdout), above a progress bar where one is shown."""
    stream = stream or sys.stdout
    if bar := _terminal_bar(stream):
        bar.write(line, file=stream)
    else:
        stream.write(line + "\n")
    stream.flush()


def progress(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Go through items; where there is a terminal, with a bar that tells speed and time left."""
    bar = _terminal_bar(sys.stdout)
    yield from bar(items, total=total, desc=title) if bar else items


def _terminal_bar(stream: TextIO) -> Any:
    """The class ``tqdm.tqdm``, or None where there is no terminal or no tqdm."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm


class SmoothedValue:
    """A series of numbers: statistics over its last values and over all of them.

    A tensor is kept as it is and read when a statistic is asked for, because reading waits for
    the device. It must not be changed in place until then.

    Args:
        window_size (int): how many values count for `median`, `avg` and `max`.
        fmt (str): how the series is printed; knows median, avg, global_avg, max and value.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.fmt = fmt
        self._window: deque[float] = deque(maxlen=window_size)
        self._total = 0.0
        self._count = 0
        self._unread: list[tuple[float | Tensor, int]] = []

    def update(self, value: float | Tensor, n: int = 1) -> None:
        """Append `value` (a number or a tensor of one element), with the weight of `n` values."""
        if isinstance(value, Tensor):
            value = value.detach().reshape(())
        self._unread.append((value, n))

    @staticmethod
    def read(series: Iterable[SmoothedValue]) -> None:
        """Bring the waiting tensors of all `series` to the host: one copy per device and dtype."""
        series = list(series)
        waiting: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for one in series:
            for value, _ in one._unread:
                if isinstance(value, Tensor):
                    waiting[value.device, value.dtype].append(value)
        on_host = {kind: iter(torch.stack(tensors).tolist()) for kind, tensors in waiting.items()}
        for one in series:
            for value, n in one._unread:
                if isinstance(value, Tensor):
                    value = next(on_host[value.device, value.dtype])
                one._window.append(float(value))
                one._total += float(value) * n
                one._count += n
            one._unread.clear()

    def _last(self) -> list[float]:
        """The window in ascending order; all NaN where one value is (order means nothing then)."""
        self.read([self])
        if not self._window or any(map(math.isnan, self._window)):
            return [math.nan]
        return sorted(self._window)

    @property
    def median(self) -> float:
        """The lower median of the window, as ``torch.median``."""
        values = self._last()
        return values[(len(values) - 1) // 2]

    @property
    def avg(self) -> float:
        """The mean of the window."""
        values = self._last()
        return sum(values) / len(values)

    @property
    def max(self) -> float:
        """The largest value of the window."""
        return self._last()[-1]

    @property
    def value(self) -> float:
        """The last value."""
        self.read([self])
        return self._window[-1] if self._window else math.nan

    @property
    def global_avg(self) -> float:
        """The mean of all values, each with its weight."""
        self.read([self])
        return self._total / self._count if self._count else math.nan

    @property
    def count(self) -> int:
        """How many values there were, each with its weight."""
        return self._count + sum(n for _, n in self._unread)

    def state(self) -> dict[str, Any]:
        """The series as plain numbers, for a checkpoint."""
        self.read([self])
        return {"window": list(self._window), "total": self._total, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the series that `state` was taken of."""
        self._unread.clear()
        self._window.clear()
        self._window.extend(state["window"])
        self._total, self._count = state["total"], state["count"]

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Named `SmoothedValue` meters, printed in one line in the order of their first update.

    Args:
        delimiter (str): stands between the parts of a line.
        stream (TextIO, optional): where lines and bar go; default: stdout at the time of writing.
    """

    def __init__(self, delimiter: str = "  ", stream: TextIO | None = None) -> None:
        self.delimiter = delimiter
        self.stream = stream
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Give `name` its place in the line and another window or format than the default."""
        self.meters[name] = meter

    def update(self, **values: float | Tensor) -> None:
        """Append one value (a number or a tensor of one element, on any device) to each meter.

        Raises:
            ValueError: a tensor holds no or several numbers.
        """
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"metric {name!r} takes one number per update; "
                    f"found a tensor of shape {tuple(value.shape)}"
                )
            self.meters[name].update(value)

    def say(self, line: str) -> None:
        """Write a line where those of `log_every` go, above its progress bar."""
        say(line, self.stream)

    def averages(self) -> dict[str, float]:
        """The mean of each meter over all its values: what ``log.txt`` holds of an epoch."""
        SmoothedValue.read(self.meters.values())
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def state(self) -> dict[str, Any]:
        """All meters in their order, for a checkpoint."""
        SmoothedValue.read(self.meters.values())
        return {name: meter.state() for name, meter in self.meters.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the meters that `state` was taken of."""
        for name, values in state.items():
            self.meters[name].restore(values)

    def __str__(self) -> str:
        SmoothedValue.read(self.meters.values())
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(
        self,
        iterable: SizedIterable[Item],
        print_freq: int,
        header: str = "",
        start: int = 0,
        before_line: Callable[[], None] = lambda: None,
    ) -> Iterator[Item]:
        """Yield the items of `iterable`; print the meters, the pace and the time left.

        A line follows the first item, every `print_freq`-th after it and the last one. On a
        terminal with tqdm installed a progress bar stands under the lines. Counting begins at
        `start`, where `iterable` yields only the items from there on. `before_line` may bring the
        meters up to date; the time between two lines is shared out to their items evenly, for on a
        GPU most of it passes where the host waits.
        """
        length = len(iterable)
        step_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        tqdm = _terminal_bar(self.stream or sys.stdout)
        bar = tqdm and tqdm(
            total=length,
            initial=start,
            desc=header,
            file=self.stream or sys.stdout,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left "
            "({rate_fmt})",
        )
        began = last = line = perf_counter()
        since_line = 0
        try:
            for index, item in enumerate(iterable, start):
                data_time.update(perf_counter() - last)
                yield item
                since_line += 1
                if bar is not None:
                    bar.update()
                if index % print_freq == 0 or index == length - 1:
                    # waits for the device: the clock must stop after the work, not its submission
                    before_line()
                    SmoothedValue.read(self.meters.values())
                    now = perf_counter()
                    for _ in range(since_line):
                        step_time.update((now - line) / since_line)
                    line, since_line = now, 0
                    left = timedelta(seconds=int(step_time.global_avg * (length - index - 1)))
                    parts = [header, f"[{index:{len(str(length))}d}/{length}]", f"eta: {left}"]
                    parts += [str(self)] if self.meters else []
                    parts += [f"time: {step_time}", f"data: {data_time}"]
                    if torch.cuda.is_initialized():
                        parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                    self.say(self.delimiter.join(parts))
                last = perf_counter()
        finally:
            if bar is not None:
                bar.close()
        took = perf_counter() - began
        pace = f"({took / max(length - start, 1):.4f} s / it)"
        self.say(f"{header} Total time: {timedelta(seconds=int(took))} {pace}")


class JsonLog:
    """``log.txt``: one JSON object per line and epoch.

    A run that starts at epoch n replaces what an earlier run wrote of the epochs from n on, with
    its first line: a run that ends before that leaves the file as it was.

    Args:
        path (path): the file; its folder is created when needed.
        start_epoch (int): the first epoch of this run (0: the file starts anew).
    """

    def __init__(self, path: str | os.PathLike[str], start_epoch: int = 0) -> None:
        self.path = Path(path)
        self.start_epoch = start_epoch
        self._trimmed = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write `record` as one line. Tensors and arrays become lists, NaN and infinities null."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        if not self._trimmed:
            self._trim()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _trim(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [r for r in read_log(self.path) if r.get("epoch", -1) < self.start_epoch]
            fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            fresh.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            fresh.replace(self.path)
        self._trimmed = True


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``log.txt``. A last line that a killed run left torn is passed over.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]}")
        records.append(record)
    return records


def _plain(value: Any) -> Any:
    """`value` in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
