# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, put into a checkpoint and taken from one."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from detr_fast.config import Config
from detr_fast.engine.log import say
from detr_fast.engine.random_state import random_state, restore_random_state
from detr_fast.models.checkpoint import CheckpointError, generation, read_checkpoint


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest good checkpoint of a folder, and say so where it is not the newest file.

    Returns:
        tuple[Path, dict] | None: the file and its content; None where there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints, but none can be read.
    """
    newest = Path(folder) / "checkpoint.pth"
    files = [newest]
    while (older := generation(newest, len(files))).exists():
        files.append(older)
    milestones = sorted(newest.parent.glob("checkpoint[0-9]*.pth"), reverse=True)
    best = newest.with_name("checkpoint_best.pth")
    present = [file for file in [*files, *milestones, best] if file.exists()]
    reasons = []
    for file in present:
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"passed over: {error}")
            continue
        say(f"--resume auto takes {file}")
        return file, checkpoint
    if reasons:
        raise CheckpointError(
            f"{folder}: none of {len(reasons)} checkpoints can be read; the newest: {reasons[0]}"
        )
    say(f"--resume auto: no checkpoint in {folder} yet, starting anew")
    return None


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch (int): the epoch in hand, or the next one.
        batch (int): batches of it that are done.
        meters (dict): the averages of these batches.
        skipped (int): updates skipped in these batches.
        best_ap (float): highest AP so far; -1 before the first.
        best_epoch (int): its epoch.
        images (tuple[int, ...]): number of training images, batch size, batches per update, seed,
            and for batches of like sizes bucket and image size, else 0: what ``batch`` counts.
    """

    epoch: int = 0
    batch: int = 0
    meters: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    best_ap: float = -1.0
    best_epoch: int = -1
    images: tuple[int, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint; ``epoch`` is the last whole one, as in the original."""
        own = asdict(self)
        kept = ("batch", "meters", "skipped", "best_epoch", "images")
        return {
            "epoch": self.epoch - 1,
            "best_ap": self.best_ap,
            "progress": {key: own[key] for key in kept},
            "random": random_state(),
        }

    @classmethod
    def of(cls, config: Config, images: int, bucket: int = 0) -> "Progress":
        """The start of a run over so many training images, in batches of this bucket."""
        counted = (images, config.batch_size, config.accumulate_steps, config.seed)
        counted += (bucket, config.image_size if bucket else 0)
        return cls(epoch=config.start_epoch, images=counted)

    def resumed(self, checkpoint: dict[str, Any]) -> "Progress":
        """Where the run of a checkpoint stands; brings its random numbers back, too.

        Where batches or their order have changed, the epoch in hand begins anew.
        """
        progress = replace(
            self, epoch=checkpoint["epoch"] + 1, best_ap=checkpoint.get("best_ap", -1.0)
        )
        if "random" in checkpoint:
            restore_random_state(checkpoint["random"])
        stored = checkpoint.get("progress", {})
        progress = replace(progress, best_epoch=stored.get("best_epoch", checkpoint["epoch"]))
        if not stored.get("batch"):
            return progress
        # the first checkpoints of this package know official padding alone
        images = (*stored["images"], 0, 0)[: len(self.images)]
        if images != self.images:
            say(
                f"epoch {progress.epoch} begins anew: its (training images, batch size, batches "
                "per update, seed, bucket, image size; the last two 0 with --padding official) "
                f"were {images}, now {self.images}"
            )
            return progress
        say(f"continuing epoch {progress.epoch} after {stored['batch']} batches")
        return replace(
            progress,
            batch=stored["batch"],
            meters=stored["meters"],
            skipped=stored.get("skipped", 0),
        )
