# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set: found, counted, and said in one line per kind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from detr_fast.data.annotations import CocoAnnotations
    from detr_fast.data.coco import CocoDetection

SHOWN = 3  # culprits named in full per kind
AHEAD = 1024  # images whose check is under way or waits for the caller


def one_line(text: str) -> str:
    """The text with everything that is not printable escaped: line ends, controls, surrogates.

    File and class names come from strangers; what is said of them must not break a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DatasetError(ValueError):
    """A data set on disk is incomplete or malformed; the message names the file and the remedy."""

    def __init__(self, message: str) -> None:
        # a loader raises a worker's error again, with a traceback in front of its one line
        of_worker = message.startswith("Caught DatasetError in ")
        super().__init__(message if of_worker else one_line(message))


class DataReport:
    """Collects the problems of one data set.

    Args:
        source (str): what the data set is called in messages: its annotation file or folder.

    Attributes:
        counts (dict[str, int]): number of problems of each kind.
        notes (list[str]): how the data were understood; no problems.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        """Add to the notes."""
        self.notes.append(one_line(line))

    def add(self, kind: str, culprits: Iterable[str]) -> None:
        """Count problems of a kind.

        Args:
            kind (str): what is wrong in the plural, and what was done about it, for instance
                ``"boxes without extent (left out)"``.
            culprits (Iterable[str]): one text each: file, image id, annotation id.
        """
        for culprit in culprits:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            first = self._first.setdefault(kind, [])
            if len(first) < SHOWN:
                first.append(culprit)

    def __len__(self) -> int:
        """Number of problems of all kinds."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line per kind: source, number, kind, first culprits."""
        return [
            one_line(f"{self.source}: {count} {kind}: {', '.join(self._first[kind])}")
            + (", ..." if count > SHOWN else "")
            for kind, count in self.counts.items()
        ]


def leave_out_missing_images(
    annotations: CocoAnnotations, image_folder: str | Path, report: DataReport
) -> CocoAnnotations:
    """The annotations of those images whose file exists, by one listing of each folder.

    Upper and lower case are told apart on every file system: a data set that trains on one shall
    train on all.

    Args:
        annotations (CocoAnnotations): of any data set; returned as it is where all files exist
        image_folder (str | Path): what file names are relative to
        report (DataReport): counts the images that are left out

    Raises:
        DatasetError: no such folder, it may not be read, or not one of the images is in it.
    """
    image_folder = Path(image_folder)
    if not image_folder.is_dir():
        raise DatasetError(f"{image_folder}: no such image folder")
    held: dict[str, frozenset[str]] = {}
    keep = np.ones(len(annotations.image_ids), dtype=bool)
    for at, file_name in enumerate(annotations.file_names.tolist()):
        parent, name = os.path.split(file_name)
        if parent not in held:
            held[parent] = _files(image_folder / parent)
        keep[at] = name in held[parent]
    if keep.all():
        return annotations
    missing = np.flatnonzero(~keep)
    if not keep.any():
        raise DatasetError(
            f"{image_folder}: none of the {len(keep)} images of {report.source} is in it; looked "
            f"first for {image_folder / str(annotations.file_names[0])}"
        )
    rows = zip(annotations.image_ids[missing], annotations.file_names[missing], strict=True)
    report.add("images whose file is missing (left out)", (f"image {i} ({n})" for i, n in rows))
    return annotations.keep_images(keep)


def check_images(
    dataset: CocoDetection, report: DataReport, threads: int | None = None
) -> Iterator[int]:
    """Open and decode every image, and report those that training could not use.

    Works while it is iterated over; a progress bar takes its length from the data set::

        for _ in tqdm(check_images(dataset, report), total=len(dataset)):
            pass

    Args:
        dataset (CocoDetection): its transforms are not run
        report (DataReport): counts files that are missing, broken, cut off or of another size
        threads (int, optional): decoders; by default some more than there are cores

    Yields:
        int: the index of each image, when it has been looked at
    """
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(dataset), AHEAD):
            indices = range(start, min(start + AHEAD, len(dataset)))
            for index, fault in zip(indices, pool.map(dataset.fault, indices), strict=True):
                if fault is not None:
                    kind, culprit = fault
                    report.add(kind, [culprit])
                yield index


def _files(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except PermissionError as error:
        raise DatasetError(f"{folder}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError):  # no such folder, or no name that a folder could have
        return frozenset()
