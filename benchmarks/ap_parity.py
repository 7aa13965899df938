# SPDX-License-Identifier: Apache-2.0
"""Whether the fast path learns as well as the reference: AP of both, from the same seeds.

Both arms of a pair are trainings by the loop of the package (`detr_fast.engine.train.Run`), from
the same weights, on the same images in the same order with the same augmentation
(``--padding official``); that they are is checked. All other flags of the fast path are its
defaults on the device, its precision among them.

Rounding alone parts two runs within some dozen steps, so that AP of a pair differs even where
nothing is wrong. What keeps that noise down: all images of the val split count, the learning rates
are divided by 10 for the last fifth of the steps (AP stands still there), and several seeds are
paired. What is said of the mean is its 95 % interval; see `benchmarks.paired`.

``--plant`` adds a third arm, the fast path with a fault, which must come out as different: else the
comparison would be too blunt to tell anything. It is compared with the same reference runs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.paired import DIFFERENT, EQUAL, Comparison, compare
from detr_fast.command_line import parse
from detr_fast.config import Config, configure
from detr_fast.engine.backend import chosen_ops
from detr_fast.engine.batch import Batch, DeviceBatches
from detr_fast.engine.output import OutputFolder
from detr_fast.engine.train import Run

BOUND = 0.02  # of AP
REFERENCE, FAST, PLANTED = "reference", "fast", "planted"
LR_DROP = 0.8  # share of the steps
# small images of blood cells, as docs/train.md trains on them
BCCD = "--model detr_tiny --backbone_weights none --image_size 192 --batch_size 8"
BCCD += " --lr 1e-3 --lr_backbone 1e-3"


def _without_last_class_loss(run: Run) -> None:
    run.criterion.weight_dict["loss_ce"] = 0.0


# faults of the fast path, by the name of --plant
PLANTS: dict[str, Callable[[Run], None]] = {"class_loss": _without_last_class_loss}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        data (tuple[str, ...]): ``("shapes",)``, ``("bccd", folder)``, or a folder that
            ``--data_path`` takes.
        steps (int): updates of a run, rounded up to whole epochs.
        flags (tuple[str, ...]): of both arms.
        fast_flags (tuple[str, ...]): of the fast arm alone.
        device (str): of ``--device``.
    """

    data: tuple[str, ...] = ("shapes",)
    steps: int = 600
    flags: tuple[str, ...] = ()
    fast_flags: tuple[str, ...] = ()
    device: str = "auto"

    def config(self, arm: str, seed: int, epochs: int = 1) -> Config:
        """The flags of a run."""
        line = ["--seed", str(seed), "--device", self.device, "--output_dir", "", *self._data()]
        line += ["--epochs", str(epochs), "--lr_drop", str(LR_DROP), "--padding", "official"]
        line += [*self.flags, "--backend", REFERENCE if arm == REFERENCE else FAST]
        if arm != REFERENCE:
            line += self.fast_flags
        return configure(parse("ap_parity.py", "", line))

    def _data(self) -> list[str]:
        if self.data == ("shapes",):
            return ["--dataset_file", "shapes"]
        if self.data[0] == "bccd" and len(self.data) == 2:
            folder = Path(self.data[1])
            line = BCCD.split()
            for split in ("train", "val"):
                line += [f"--{split}_images", str(folder / "images")]
                line += [f"--{split}_annotations", str(folder / f"instances_{split}.json")]
            return line
        return ["--data_path", " ".join(self.data)]


class _Log(OutputFolder):
    """Keeps AP and AP50 of every epoch, and writes nothing."""

    def __init__(self, seen: Callable[[list[list[float]]], None]) -> None:
        super().__init__("")
        self.scores: list[list[float]] = []
        self._seen = seen

    def write_log(self, record: dict[str, Any]) -> None:
        self.scores.append(record["test_coco_eval_bbox"][:2])
        self._seen(self.scores)


class _Watched:
    """Batches that remember which images went by, in which order, with which boxes."""

    def __init__(self, batches: DeviceBatches) -> None:
        self._batches, self.images = batches, hashlib.sha256()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch | None]:
        for batch in self._batches:
            if batch is not None:
                for index, image_id in enumerate(batch.image_ids):
                    boxes = batch.annotations[index]["boxes"]  # on the host
                    self.images.update(f"{image_id} {boxes.tolist()}".encode())
            yield batch


def trained(
    plan: Plan,
    arm: str,
    seed: int,
    plant: str = "",
    progress: Callable[[int, int, list[float]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train and evaluate once.

    Args:
        plan (Plan): what is compared.
        arm (str): ``reference``, ``fast`` or ``planted``.
        seed (int): of weights, order and augmentation.
        plant (str): the fault of a planted run, a key of `PLANTS`.
        progress (Callable): told after each epoch how many are done, of how many, and its AP and
            AP50.

    Returns:
        dict: the run as the JSON file holds it.

    Raises:
        KeyboardInterrupt: if it was stopped.
    """
    with chosen_ops(plan.config(arm, seed)):
        per_epoch = len(Run(plan.config(arm, seed), None).train_batches)
        epochs = -(-plan.steps // per_epoch)
        run = Run(plan.config(arm, seed, epochs), None)
        if arm == PLANTED:
            PLANTS[plant](run)
        start = hashlib.sha256()
        for name, value in sorted(run.model.state_dict().items()):
            start.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        run.output = _Log(lambda scores: progress(len(scores), epochs, scores[-1]))
        run.train_batches = _Watched(run.train_batches)
        began = time.perf_counter()
        if run():
            raise KeyboardInterrupt
    return {
        "arm": arm,
        "seed": seed,
        "ap": run.output.scores[-1][0],
        "ap50": run.output.scores[-1][1],
        "steps": run.learner.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "start": start.hexdigest()[:16],
        "images": run.train_batches.images.hexdigest()[:16],
        "epochs": run.output.scores,
    }


@dataclass
class Results:
    """Finished runs, kept in a file from run to run.

    Attributes:
        plan (dict): what they are runs of.
        runs (list[dict]): those of `trained`.
        path (Path, optional): the file.
    """

    plan: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def at(cls, path: Path | None, plan: dict[str, Any]) -> "Results":
        """Those of a file, or none yet.

        Raises:
            ValueError: if the file holds runs of another plan.
        """
        plan = json.loads(json.dumps(plan))  # as a file gives it back
        if path is None or not path.exists():
            return cls(plan, [], path)
        stored = json.loads(path.read_text())
        if stored["plan"] != plan:
            differ = [name for name in plan if plan[name] != stored["plan"].get(name)]
            raise ValueError(
                f"{path} holds runs with another {', '.join(differ)}: name another --out, or give "
                "the same flags"
            )
        return cls(plan, stored["runs"], path)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, in the file too."""
        self.runs.append(run)
        self.write()

    def write(self, **conclusions: Any) -> None:
        """Write the file, complete at any time."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(f".{self.path.name}.tmp")
            content = {"plan": self.plan, **conclusions, "runs": self.runs}
            aside.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(aside, self.path)

    def run(self, arm: str, seed: int) -> dict[str, Any] | None:
        """The run of an arm and a seed, if there is one."""
        found = (run for run in self.runs if (run["arm"], run["seed"]) == (arm, seed))
        return next(found, None)

    def pairs(self, arm: str, seeds: Sequence[int]) -> Iterator[tuple[dict, dict]]:
        """Reference and ``arm`` of each seed.

        Raises:
            ValueError: if the two did not start from the same weights or saw other images.
        """
        for seed in seeds:
            one, other = self.run(REFERENCE, seed), self.run(arm, seed)
            assert one is not None
            assert other is not None
            for what in ("start", "images", "steps"):
                if one[what] != other[what]:
                    raise ValueError(
                        f"seed {seed}: reference and {arm} differ in {what} ({one[what]}, "
                        f"{other[what]}): they are no pair"
                    )
            yield one, other


def comparison(
    results: Results, arm: str, seeds: Sequence[int], score: str = "ap", bound: float = BOUND
) -> Comparison:
    """Compare an arm with the reference by ``ap`` or ``ap50``."""
    return compare([b[score] - a[score] for a, b in results.pairs(arm, seeds)], bound)


def table(results: Results, arm: str, seeds: Sequence[int]) -> str:
    """AP and AP50 of an arm and of the reference, a line per seed, and their mean."""
    head = f"{'':>6}{REFERENCE:>18}{arm:>18}{'difference':>18}"
    lines = [head, f"{'seed':>6}" + f"{'AP':>10}{'AP50':>8}" * 3]
    rows = [
        (str(one["seed"]), [run[name] for run in (one, other) for name in ("ap", "ap50")])
        for one, other in results.pairs(arm, seeds)
    ]
    rows.append(("mean", [fmean(column) for column in zip(*(v for _, v in rows), strict=True)]))
    for name, (ap, ap50, ap_too, ap50_too) in rows:
        lines.append(
            f"{name:>6}{ap:10.4f}{ap50:8.4f}{ap_too:10.4f}{ap50_too:8.4f}"
            f"{ap_too - ap:+10.4f}{ap50_too - ap50:+8.4f}"
        )
    return "\n".join(lines)


def train_all(
    plan: Plan, results: Results, arms: Sequence[str], seeds: Sequence[int], plant: str, quiet: bool
) -> None:
    """Make the runs that are not there yet, and say how it goes."""
    missing = [(arm, seed) for seed in seeds for arm in arms if not results.run(arm, seed)]
    began = time.perf_counter()
    for done, (arm, seed) in enumerate(missing):

        def say(
            epoch: int, epochs: int, scores: list[float], done=done, arm=arm, seed=seed
        ) -> None:
            share = (done + epoch / epochs) / len(missing)
            left = timedelta(seconds=round((time.perf_counter() - began) * (1 / share - 1)))
            sys.stderr.write(
                f"run {done + 1} of {len(missing)}: seed {seed}, {arm}, epoch {epoch} of {epochs}: "
                f"AP {scores[0]:.4f}, AP50 {scores[1]:.4f}  eta: {left}\n"
            )

        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            run = trained(plan, arm, seed, plant, say)
        results.add(run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ap_parity",
        description="AP of the fast path against the reference, from the same seeds.",
        epilog="Flags behind -- go to both arms: ... --steps 600 -- --batch_size 16",
    )
    parser.add_argument("--seeds", type=int, default=5, help="pairs, from seed 0 on (5)")
    parser.add_argument("--steps", type=int, default=600, help="updates of a run (600)")
    parser.add_argument(
        "--data", nargs="+", default=["shapes"], help="shapes, bccd FOLDER, or any FOLDER of data"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plant", choices=PLANTS, default="", help="also compare with this fault")
    parser.add_argument("--fast_flags", default="", help='of the fast arm: "--amp off"')
    parser.add_argument("--out", type=Path, help="JSON; runs that it holds are not made again")
    parser.add_argument("--verbose", action="store_true", help="show the logs of the trainings")
    parser.add_argument("flags", nargs="*", help="of both arms, behind --")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit code 0 where the fast path is equal and the planted fault, if any, is seen."""
    given = parser().parse_args(arguments)
    if given.seeds < 2:
        parser().error("--seeds: an interval needs at least 2")
    data, flags = tuple(given.data), tuple(given.flags)
    plan = Plan(data, given.steps, flags, tuple(given.fast_flags.split()), given.device)
    arms = [REFERENCE, FAST, *([PLANTED] if given.plant else [])]
    seeds = range(given.seeds)
    described = {**vars(plan), "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        results = Results.at(given.out, described)
    except ValueError as error:
        parser().error(str(error))
    try:
        train_all(plan, results, arms, seeds, given.plant, quiet=not given.verbose)
    except KeyboardInterrupt:
        kept = f"; {len(results.runs)} runs are in {given.out}, the same command goes on"
        sys.stderr.write(f"stopped{kept if given.out else ''}\n")
        return 130

    verdicts, lines = {}, []
    for arm in arms[1:]:
        of_ap, of_ap50 = (comparison(results, arm, seeds, score) for score in ("ap", "ap50"))
        verdicts[arm] = of_ap.verdict
        lines += [table(results, arm, seeds), f"AP    {of_ap}", f"AP50  {of_ap50}", ""]
    results.write(verdicts=verdicts, table=lines)
    sys.stdout.write("\n".join(lines) + "\n")
    expected = {FAST: EQUAL, PLANTED: DIFFERENT}
    return int(any(verdict != expected[arm] for arm, verdict in verdicts.items()))


if __name__ == "__main__":
    sys.exit(main())
