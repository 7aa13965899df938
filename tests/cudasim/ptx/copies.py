# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies to shared memory (cp.async): each thread waits for groups of its own."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Flight(NamedTuple):
    """The copies that one instruction has started, one per thread."""

    lanes: np.ndarray
    group: np.ndarray  # of each thread, counted from its first
    target: np.ndarray  # addresses
    data: np.ndarray  # (lanes, bytes) uint8


class Copies:
    """The copies of a block that are on their way."""

    def __init__(self, count: int):
        self.committed = np.zeros(count, np.int64)  # groups of each thread
        self.flights: list[Flight] = []

    def start(self, lanes: np.ndarray, target: np.ndarray, data: np.ndarray) -> None:
        self.flights.append(Flight(lanes, self.committed[lanes], target, data))

    def commit(self, lanes: np.ndarray) -> None:
        self.committed[lanes] += 1

    def land(self, lanes: np.ndarray, pending: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Addresses and data of all but the last `pending` groups of the threads `lanes`."""
        due = np.full_like(self.committed, -1)
        due[lanes] = self.committed[lanes] - pending
        flights, self.flights = self.flights, []
        for flight in flights:
            lands = flight.group < due[flight.lanes]
            if lands.any():
                yield flight.target[lands], flight.data[lands]
            if not lands.all():
                self.flights.append(Flight(*(part[~lands] for part in flight)))

    def of(self, lanes: np.ndarray) -> bool:
        """Whether one of these threads has copies on their way."""
        return any(np.isin(flight.lanes, lanes).any() for flight in self.flights)
