# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set: found, counted, and said in one line per kind."""

from collections.abc import Iterable

SHOWN = 3  # culprits named in full per kind


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
        super().__init__(one_line(message))


class DataReport:
    """Collects the problems of one data set.

    Args:
        source (str): what the data set is called in messages: its annotation file or folder.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

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
