# SPDX-License-Identifier: Apache-2.0
"""Mutation test of kernels: ``python -m tests.mutations.mutate_kernels --subject boxes``.

Breaks each barrier, comparison, constant, index and operator of the sources once, compiles every
mutant for the simulator and runs the checks.  A mutant that no check notices is either listed in
equivalent.txt, with the reason why it computes the same, or shows what the checks do not see.
Exits with 1 where a survivor is not listed.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.mutations.judge import Judge, Verdict
from tests.mutations.mutants import KINDS, Mutant
from tests.mutations.subjects import SUBJECTS, Subject

EQUIVALENT = Path(__file__).parent / "equivalent.txt"
SEPARATOR = " :: "
OUTCOMES = ("generated", "invalid", "caught", "equivalent", "survived")

judge: Judge  # of this process and those that it forks


def equivalents() -> dict[tuple[str, str, str, int], str]:
    """The reason for each mutant that is listed; see the head of the file."""
    found = {}
    for line in EQUIVALENT.read_text().splitlines():
        if line and not line.startswith("#"):
            name, text, change, ordinal, reason = line.split(SEPARATOR)
            found[name, text, change, int(ordinal)] = reason
    return found


def chosen(
    mutants: list[Mutant], only: str | None, sample: int | None, kind: str | None = None
) -> list[Mutant]:
    """Those of one line or kind, `sample` of them at even distances, or all."""
    mutants = [mutant for mutant in mutants if kind in (None, mutant.kind)]
    if only:
        name, _, line = only.partition(":")
        mutants = [
            m for m in mutants if m.path.name == Path(name).name and line in ("", str(m.line))
        ]
    if sample and sample < len(mutants):
        mutants = [mutants[i * len(mutants) // sample] for i in range(sample)]
    return mutants


def judge_one(mutant: Mutant) -> Verdict:
    return judge.judge(mutant)


def verdicts(subject: Subject, mutants: list[Mutant], jobs: int) -> Iterator[Verdict]:
    """Judge mutants; raises RuntimeError where the sources fail before any change."""
    global judge
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        judge = Judge(subject, Path(folder))
        if reason := judge.unchanged():
            raise RuntimeError(f"the checks fail on the sources as they are: {reason}")
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(judge_one, mutants)


def table(judged: Iterable[Verdict]) -> str:
    listed = equivalents()
    counts: Counter = Counter()
    for mutant, outcome, _ in judged:
        known = outcome == "survived" and mutant.key in listed
        counts[mutant.kind, "generated"] += 1
        counts[mutant.kind, "equivalent" if known else outcome] += 1
    lines = ["| kind | " + " | ".join(OUTCOMES) + " |", "| --- |" + " ---: |" * len(OUTCOMES)]
    for kind in (*KINDS, "all"):
        numbers = [
            sum(n for (k, o), n in counts.items() if o == outcome and kind in (k, "all"))
            for outcome in OUTCOMES
        ]
        lines.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=SUBJECTS, default="boxes", help="folder of csrc")
    parser.add_argument("--only", metavar="FILE[:LINE]", help="mutants of one file or line")
    parser.add_argument("--kind", choices=KINDS, help="mutants of one kind")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants at even distances")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verbose", action="store_true", help="print those that are caught, too")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    listed, judged, unlisted = equivalents(), [], 0
    subject = SUBJECTS[options.subject]
    mutants = chosen(subject.mutants(), options.only, options.sample, options.kind)
    for verdict in verdicts(subject, mutants, options.jobs):
        judged.append(verdict)
        mutant, outcome, reason = verdict
        new = outcome == "survived" and mutant.key not in listed
        unlisted += new
        if options.verbose or new:
            place = f"{mutant.path.name}:{mutant.line}"
            print(f"{outcome:8} {place}: {mutant.kind} {mutant.change} ({mutant.ordinal})", end="")
            print(f" in `{mutant.text}`", " ".join(reason.split())[:160], flush=True)
    print(f"{table(judged)}\n{time.monotonic() - start:.0f} s")
    return int(unlisted > 0)


if __name__ == "__main__":
    sys.exit(main())
